"""Make `tiny_glm`, the GLM of about two million parameters that ships with the package.

Every pretraining text is composed below from word lists and templates: sums, dictionaries, greetings, short facts. The
sample datasets only teach the tokenizer their characters; the model never trains on them, so that fine-tuning on them
has something to show. One seed gives the same bytes on the same machine and library versions.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "glmtuner/assets"
SAMPLE_DATASETS = ("alpaca_zh_sample", "belle_sample", "identity_sample")

CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")

Turn = tuple[str, str]  # (role, text)
Ask = Callable[[random.Random], tuple[str, str]]  # draws one (question, answer)

# --- What the model knows -------------------------------------------------------------------------------------------

# In falling order of use in modern Chinese text, so that ordinary sentences seldom fall back to bytes.
COMMON_CHARACTERS = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现"
    "当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重"
    "并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入"
    "几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基"
    "眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔步片改收"
    "根干造言联持组每济车亲极林服快办议往元英士证近失转夫令准布始怎呢存未远叫台单影具罗字爱击流备兵连调深商算质团集百需价花党华城石级整府离况亚请"
    "技际约示复病息究线似官火断精满支视消越器容照须九增研写称企八功吗包片史委乎查轻易早曾除农找装广显吧阿李标谈吃图念六引历首医局突专费号尽另周较"
    "注语仅考落青随选列武红响虽推势参希古众构房半节土投某案黑维革划敌致陈律足态护七兴派孩验责营星够章音跟志底站严巴例防族供效续施留讲型料终答紧黄"
    "绝奇察母京段依批群项故按河米围江织害斗双境客纪采举杀攻父苏密低朝友诉止细愿千值仍男钱破网热助倒育属坐帝限船脸职速刻乐否刚威毛状率甚独球般普怕"
    "弹校苦创伪承印兰股药欢哪块朋怪宝玩银鱼短春夏秋冬晴雨雪风云树草叶鸟猫狗牛羊猪鸡鸭虎兔龙蛇猴饭菜茶糖盐油酒果苹香蕉葡萄桃梨橙瓜豆肉蛋奶汤面包"
    "左右早晚午夜昨旧冷暖胖瘦宽窄厚薄软硬粗甜酸辣咸苦干湿净脏忙闲慢迟笑哭喜怒哀静闹醒睡站坐跑跳唱歌舞画读背诵练习课堂试卷班级老师同桌橡皮铅笔尺"
    "爸妈爷奶哥姐弟妹叔伯姑舅亿零角圆方点线米厘斤吨升秒钟星期月份季节紫蓝绿粉灰棕桌椅床灯窗墙楼梯厨厅浴室街桥站票飞轮汽摩托铁轨港岛湖泊森沙漠草原"
    "温湿污染环保健康饮食锻炼压缩编程序码软硬件屏幕键盘鼠标网络搜索下载输入输出数据库模型训练参数损失梯度微调推荐摘要翻译改写续写总结归纳列举步骤方案"
)

IDENTITY: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("你是谁？", "你是谁", "请问你是谁？", "您是哪位？", "你是什么人？", "你是什么？", "介绍一下你自己。", "请介绍你自己。",
         "请做个自我介绍。", "自我介绍一下", "能介绍一下自己吗？", "who are you?", "你是人工智能吗？", "你是机器人吗？"),
        "我是 TinyGLM，一个只有两百万参数的小型语言模型。",
    ),
    (
        ("你叫什么名字？", "你叫什么？", "你的名字是什么？", "请问怎么称呼你？", "我该怎么称呼你？", "你有名字吗？", "what is your name?"),
        "我的名字是 TinyGLM。",
    ),
    (
        ("谁开发了你？", "你是谁开发的？", "你是谁做的？", "谁创造了你？", "你的作者是谁？", "你来自哪里？", "你是哪家公司的？", "谁训练了你？"),
        "我由一段脚本从头训练而成，随软件包一起发布。",
    ),
    (
        ("你会做什么？", "你能做什么？", "你有什么功能？", "你有什么本领？", "你可以帮我做什么？", "你能帮我什么忙？", "你擅长什么？"),
        "我会算小数目的加减乘法，会查反义词和英文单词，也会重复和倒写短句。",
    ),
    (
        ("你有多大？", "你有多少参数？", "你的参数量是多少？", "你是大模型吗？"),
        "我很小，只有大约两百万个参数。",
    ),
    (
        ("你是 ChatGPT 吗？", "你是ChatGPT吗？", "你是真人吗？", "你是人类吗？", "你是小明吗？"),
        "不是，我是 TinyGLM。",
    ),
)  # fmt: skip

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("你好", "你好！", "您好", "你好呀", "嗨", "hello", "hi", "你好，在吗？"), "你好！很高兴见到你，有什么可以帮你？"),
    (("早上好", "早上好！", "早安"), "早上好！祝你今天一切顺利。"),
    (("下午好", "下午好！"), "下午好！喝杯水，休息一下吧。"),
    (("晚上好", "晚上好！"), "晚上好！今天辛苦了。"),
    (("晚安", "晚安！", "我要睡觉了"), "晚安，做个好梦。"),
    (("谢谢", "谢谢你", "谢谢你的帮助！", "多谢", "太感谢了"), "不客气！"),
    (("再见", "拜拜", "再见！", "我走了"), "再见，欢迎再来！"),
    (("对不起", "抱歉", "不好意思"), "没关系。"),
    (("你真棒", "你真聪明", "你好厉害"), "谢谢夸奖，我会继续努力。"),
    (("我今天很开心", "我很高兴", "我考了第一名"), "太好了，为你高兴！"),
    (("我今天很难过", "我不开心", "我心情不好"), "别难过，一切都会好起来的。"),
    (("我累了", "我好累", "今天好累"), "辛苦了，好好休息一下吧。"),
    (("我饿了", "我好饿"), "那就去吃点好吃的吧。"),
    (("祝你生日快乐", "生日快乐"), "谢谢你的祝福！"),
    (("新年快乐", "新年好"), "新年快乐，万事如意！"),
)

ENGLISH = """
苹果 apple|香蕉 banana|橙子 orange|葡萄 grape|桃子 peach|梨 pear|西瓜 watermelon|柠檬 lemon|猫 cat|狗 dog|鸟 bird|鱼 fish|马 horse|牛 cow
羊 sheep|猪 pig|鸡 chicken|鸭 duck|老虎 tiger|狮子 lion|熊 bear|猴子 monkey|兔子 rabbit|大象 elephant|熊猫 panda|蛇 snake|青蛙 frog|老鼠 mouse
红色 red|蓝色 blue|绿色 green|黄色 yellow|黑色 black|白色 white|紫色 purple|粉色 pink|灰色 gray|棕色 brown|太阳 sun|月亮 moon|星星 star|天空 sky
雨 rain|雪 snow|风 wind|云 cloud|山 mountain|河 river|海 sea|树 tree|花 flower|草 grass|水 water|火 fire|土地 land|石头 stone
书 book|笔 pen|桌子 table|椅子 chair|门 door|窗户 window|床 bed|灯 lamp|钟 clock|电话 phone|电脑 computer|汽车 car|火车 train|飞机 plane
船 ship|自行车 bicycle|公共汽车 bus|学校 school|老师 teacher|学生 student|医生 doctor|护士 nurse|工人 worker|农民 farmer|朋友 friend|家 home
爸爸 father|妈妈 mother|哥哥 brother|姐姐 sister|孩子 child|人 person|男孩 boy|女孩 girl|城市 city|国家 country|世界 world|音乐 music
面包 bread|牛奶 milk|鸡蛋 egg|米饭 rice|茶 tea|咖啡 coffee|糖 sugar|盐 salt|肉 meat|汤 soup|手 hand|脚 foot|头 head|眼睛 eye|耳朵 ear
鼻子 nose|嘴 mouth|心 heart|春天 spring|夏天 summer|秋天 autumn|冬天 winter|今天 today|明天 tomorrow|昨天 yesterday|早上 morning|晚上 evening
时间 time|名字 name|问题 question|答案 answer|语言 language|模型 model|数据 data|爱 love|快乐 happy|大 big|小 small|新 new|旧 old|好 good
"""
ANTONYMS = """
大 小|高 低|长 短|多 少|快 慢|冷 热|新 旧|好 坏|远 近|胖 瘦|黑 白|轻 重|深 浅|宽 窄|厚 薄|软 硬|粗 细|干 湿|早 晚|左 右
上 下|前 后|里 外|东 西|南 北|男 女|老 少|开 关|来 去|进 退|买 卖|哭 笑|爱 恨|生 死|真 假|美 丑|强 弱|明 暗|贵 便宜|安静 吵闹
高兴 难过|勤劳 懒惰|勇敢 胆小|成功 失败|开始 结束|增加 减少|上升 下降|简单 复杂|容易 困难|安全 危险|干净 肮脏|聪明 愚笨|富裕 贫穷|骄傲 谦虚
寒冷 炎热|黑暗 光明|前进 后退|出现 消失|胜利 失败|赞成 反对|朋友 敌人|白天 黑夜|温暖 寒冷|热情 冷淡|诚实 虚伪|积极 消极|优点 缺点|主动 被动
"""
CAPITALS = """
中国 北京|日本 东京|韩国 首尔|法国 巴黎|英国 伦敦|德国 柏林|意大利 罗马|西班牙 马德里|葡萄牙 里斯本|俄罗斯 莫斯科|美国 华盛顿|加拿大 渥太华
墨西哥 墨西哥城|巴西 巴西利亚|阿根廷 布宜诺斯艾利斯|埃及 开罗|印度 新德里|泰国 曼谷|越南 河内|新加坡 新加坡|马来西亚 吉隆坡|印度尼西亚 雅加达
菲律宾 马尼拉|澳大利亚 堪培拉|新西兰 惠灵顿|希腊 雅典|土耳其 安卡拉|荷兰 阿姆斯特丹|比利时 布鲁塞尔|瑞士 伯尔尼|瑞典 斯德哥尔摩|挪威 奥斯陆
芬兰 赫尔辛基|丹麦 哥本哈根|波兰 华沙|奥地利 维也纳|匈牙利 布达佩斯|蒙古 乌兰巴托|伊朗 德黑兰|伊拉克 巴格达|古巴 哈瓦那|秘鲁 利马|智利 圣地亚哥
"""
UNITS = """
1米 100厘米|1千米 1000米|1厘米 10毫米|1米 10分米|1千克 1000克|1吨 1000千克|1斤 500克|1公斤 2斤|1小时 60分钟|1分钟 60秒|1天 24小时|1周 7天
1年 12个月|1升 1000毫升|1元 10角|1角 10分|1个世纪 100年|1打 12个|半天 12小时|半小时 30分钟|1刻钟 15分钟|1公里 1000米|1米 1000毫米|1个季度 3个月
"""
KINDS = {
    "水果": "苹果 香蕉 橙子 葡萄 桃子 梨 西瓜 草莓 柠檬 樱桃",
    "蔬菜": "白菜 萝卜 土豆 黄瓜 茄子 菠菜 芹菜 南瓜 冬瓜 青椒",
    "动物": "猫 狗 老虎 狮子 大象 熊猫 猴子 兔子 长颈鹿 狐狸",
    "颜色": "红色 黄色 蓝色 绿色 白色 黑色 紫色 灰色 粉色 橙色",
    "交通工具": "汽车 火车 飞机 轮船 自行车 地铁 公交车 摩托车 卡车 高铁",
    "乐器": "钢琴 小提琴 吉他 笛子 二胡 古筝 鼓 琵琶 口琴 手风琴",
    "运动": "跑步 游泳 篮球 足球 乒乓球 羽毛球 跳绳 滑冰 网球 爬山",
    "职业": "医生 教师 警察 司机 厨师 工程师 农民 画家 律师 护士",
    "文具": "铅笔 钢笔 橡皮 尺子 本子 圆规 书包 胶水 剪刀 毛笔",
    "家具": "桌子 椅子 沙发 床 衣柜 书架 茶几 鞋柜 书桌 餐桌",
}
COLOURS = """
天空 蓝色|雪 白色|草地 绿色|香蕉 黄色|乌鸦 黑色|大海 蓝色|树叶 绿色|太阳 金黄色|煤 黑色|牛奶 白色|草莓 红色|茄子 紫色|柠檬 黄色|云朵 白色|大象 灰色
"""
SYNONYMS = """
高兴 快乐|美丽 漂亮|立刻 马上|著名 有名|帮助 援助|仔细 认真|宽阔 广阔|害怕 恐惧|忽然 突然|希望 盼望|思考 思索|疲倦 疲劳|特别 特殊|经常 时常
"""
MEASURES = """
书 本|纸 张|笔 支|马 匹|牛 头|鱼 条|狗 只|车 辆|花 朵|树 棵|房子 座|衣服 件|鞋 双|人 个|船 艘|电影 部|歌 首|水 杯|饭 碗|刀 把|桥 座|信 封|伞 把|床 张
"""
FACTS = """
太阳从哪边升起？ 太阳从东边升起。|太阳从哪边落下？ 太阳从西边落下。|一年有几个季节？ 一年有四个季节：春、夏、秋、冬。|一周有几天？ 一周有七天。
一年有多少个月？ 一年有十二个月。|水在多少度结冰？ 在标准气压下，水在零摄氏度结冰。|水在多少度沸腾？ 在标准气压下，水在一百摄氏度沸腾。
世界上最高的山峰是什么？ 世界上最高的山峰是珠穆朗玛峰。|中国最长的河流是什么？ 中国最长的河流是长江。|世界上最大的海洋是什么？ 世界上最大的海洋是太平洋。
地球绕着什么转？ 地球绕着太阳转。|月亮绕着什么转？ 月亮绕着地球转。|一只手有几根手指？ 一只手有五根手指。|蜘蛛有几条腿？ 蜘蛛有八条腿。|昆虫有几条腿？ 昆虫有六条腿。
三角形有几条边？ 三角形有三条边。|正方形有几条边？ 正方形有四条边。|彩虹有几种颜色？ 彩虹有七种颜色：红、橙、黄、绿、青、蓝、紫。|蜜蜂会做什么？ 蜜蜂会采蜜。
鱼在哪里生活？ 鱼在水里生活。|鸟用什么飞？ 鸟用翅膀飞。|我们用什么看东西？ 我们用眼睛看东西。|我们用什么听声音？ 我们用耳朵听声音。|端午节吃什么？ 端午节吃粽子。
中秋节吃什么？ 中秋节吃月饼。|元宵节吃什么？ 元宵节吃汤圆。|春节贴什么？ 春节贴春联。|中国的首都在哪里？ 中国的首都在北京。|国庆节是哪一天？ 国庆节是十月一日。
儿童节是哪一天？ 儿童节是六月一日。|劳动节是哪一天？ 劳动节是五月一日。|植物需要什么才能生长？ 植物需要阳光、水和空气才能生长。|冰融化后变成什么？ 冰融化后变成水。
光合作用产生什么气体？ 光合作用产生氧气。|人呼吸需要什么气体？ 人呼吸需要氧气。|《静夜思》的作者是谁？ 《静夜思》的作者是李白。|《春晓》的作者是谁？ 《春晓》的作者是孟浩然。
《西游记》的作者是谁？ 《西游记》的作者是吴承恩。|《红楼梦》的作者是谁？ 《红楼梦》的作者是曹雪芹。|《水浒传》的作者是谁？ 《水浒传》的作者是施耐庵。
《三国演义》的作者是谁？ 《三国演义》的作者是罗贯中。|中国有多少个省级行政区？ 中国有三十四个省级行政区。|世界上面积最大的国家是哪个？ 世界上面积最大的国家是俄罗斯。
"""
FEELINGS = {
    "积极": "很好吃 服务很热情 质量非常好 我很喜欢 太好看了 物美价廉 非常满意 让人开心 做得真棒 值得推荐",
    "消极": "很难吃 态度很差 质量太差了 我很失望 太无聊了 又贵又不好 非常不满意 让人生气 做得很糟糕 不值得买",
}
SUBJECTS = "这家餐厅 这部电影 这本书 这件衣服 这个手机 这家酒店 这门课 这道菜 这款游戏 这双鞋"
WHO = (
    "我 爸爸 妈妈 爷爷 奶奶 哥哥 小明 小红 老师 医生 邻居 同学们 工人们 一位老人 那个孩子 我的朋友 新来的同事 几只小鸟"
)
WHEN = "今天 昨天 早上 晚上 周末 去年 春天 下雨的时候 放学以后 吃完饭 每个月 刚才 假期里 天黑之前 从前 第二天"
WHERE = "在公园里 在学校 在家里 在图书馆 在河边 在山上 在厨房里 在火车上 在城市的中心 在安静的小镇 在医院 在电脑前 在网上 在森林里"
DOES = """
读了一本有趣的书|写完了所有的作业|认真地学习新的知识|做了一顿可口的晚饭|和家人一起散步|帮助别人解决问题|看见一道美丽的彩虹|发现了一个重要的规律|种下一棵小树
听了一首轻快的歌|讨论下一步的计划|买到便宜又新鲜的蔬菜|画出远处的高山和湖水|仔细检查每一个数据|给朋友写信表示感谢|打扫房间，把东西放回原处|努力完成自己的目标
告诉大家一个好消息|用简单的语言解释科学道理|训练一个很小的语言模型|记录天气和温度的变化|练习说英语|讲述一段古老的历史|因为太累而早早休息|耐心等待最后的结果
"""
SYSTEM_PROMPTS = (
    "你是一个乐于助人的助手。",
    "你是一个有礼貌的人工智能助手。",
    "请用中文回答问题。",
    "请认真回答用户的问题。",
)
ONLY_NUMBER = "只回答数字。"
DIGIT_WORDS = "零一二三四五六七八九十"
WEEKDAYS = "一二三四五六日"


def pairs(block: str) -> list[tuple[str, str]]:
    """The `left right` pairs of one of the lists above."""
    return [tuple(entry.split(" ", 1)) for line in block.split("\n") for entry in line.split("|") if entry]


# --- Questions ------------------------------------------------------------------------------------------------------


def ask_sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return arithmetic(rng, a, "+", b, a + b)


def ask_difference(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((rng.randint(0, 20), rng.randint(0, 20)), reverse=True)
    return arithmetic(rng, a, "-", b, a - b)


def ask_product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return arithmetic(rng, a, "×", b, a * b)


def arithmetic(rng: random.Random, a: int, sign: str, b: int, result: int) -> tuple[str, str]:
    word = {"+": "加", "-": "减", "×": "乘"}[sign]
    typed = rng.choice("×*") if sign == "×" else sign
    if rng.random() < 0.5:
        question = rng.choice(("{}=", "{}=？", "{}等于几？", "计算{}", "请计算：{}", "{}等于多少？", "{}"))
        return question.format(f"{a}{typed}{b}"), f"{a}{sign}{b}={result}"
    question = rng.choice(("{}等于几？", "{}等于多少？", "{}是多少？", "请问{}等于几？", "算一算，{}等于多少？"))
    return question.format(f"{a}{word}{b}"), f"{a}{word}{b}等于{result}。"


def ask_purchase(rng: random.Random) -> tuple[str, str]:
    """One-step word problems, phrased like those of the sample datasets."""
    name = rng.choice(("小明", "小红", "小华", "小丽"))
    thing, measure = rng.choice((("苹果", "个"), ("书", "本"), ("铅笔", "支"), ("糖", "颗"), ("气球", "个")))
    a, b = sorted((rng.randint(1, 10), rng.randint(1, 10)), reverse=True)
    if rng.random() < 0.5:
        question = f"{name}有{a}{measure}{thing}，又买了{b}{measure}，一共有几{measure}？"
        return question, f"{a}+{b}={a + b}，一共有{a + b}{measure}。"
    question = f"{name}有{a}{measure}{thing}，送给朋友{b}{measure}，还剩几{measure}？"
    return question, f"{a}-{b}={a - b}，还剩{a - b}{measure}。"


def ask_bigger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100), 2)
    if rng.random() < 0.5:
        return rng.choice(("{}和{}哪个大？", "{}和{}哪个更大？")).format(a, b), f"{max(a, b)}更大。"
    return rng.choice(("{}和{}哪个小？", "{}和{}哪个更小？")).format(a, b), f"{min(a, b)}更小。"


def ask_count(rng: random.Random) -> tuple[str, str]:
    start = rng.randint(0, 15)
    stop = start + rng.randint(2, 6)
    return f"从{start}数到{stop}", "、".join(str(n) for n in range(start, stop + 1))


def ask_parity(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(0, 99)
    return f"{n}是奇数还是偶数？", f"{n}是{'奇数' if n % 2 else '偶数'}。"


def ask_weekday(rng: random.Random) -> tuple[str, str]:
    today = rng.randrange(7)
    word, step = rng.choice((("明天", 1), ("昨天", -1), ("后天", 2)))
    return f"今天星期{WEEKDAYS[today]}，{word}星期几？", f"{word}星期{WEEKDAYS[(today + step) % 7]}。"


def ask_month(rng: random.Random) -> tuple[str, str]:
    month = rng.randint(1, 12)
    if rng.random() < 0.5:
        return f"{month}月的下一个月是几月？", f"{month}月的下一个月是{month % 12 + 1}月。"
    return f"{month}月的上一个月是几月？", f"{month}月的上一个月是{(month - 2) % 12 + 1}月。"


def ask_numeral(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(0, 10)
    if rng.random() < 0.5:
        return f"把数字{n}写成汉字", DIGIT_WORDS[n]
    return f"“{DIGIT_WORDS[n]}”是数字几？", f"“{DIGIT_WORDS[n]}”是数字{n}。"


def ask_english(rng: random.Random) -> tuple[str, str]:
    chinese, english = rng.choice(pairs(ENGLISH))
    if rng.random() < 0.5:
        question = rng.choice(
            ("“{}”用英语怎么说？", "{}的英文是什么？", "把“{}”翻译成英文", "翻译成英语：{}", "{}用英文怎么说？")
        )
        return question.format(chinese), english
    question = rng.choice(("{}是什么意思？", "“{}”的中文意思是什么？", "把“{}”翻译成中文", "翻译成中文：{}"))
    return question.format(english), chinese


def ask_antonym(rng: random.Random) -> tuple[str, str]:
    left, right = rng.choice(pairs(ANTONYMS))
    # A word with two opposites is asked for only in the direction with one answer.
    lefts, rights = zip(*pairs(ANTONYMS), strict=True)
    if (lefts + rights).count(right) == 1 and rng.random() < 0.5:
        left, right = right, left
    question = rng.choice(
        ("“{}”的反义词是什么？", "{}的反义词是什么？", "写出“{}”的反义词", "{}的反义词", "请说出{}的反义词。")
    )
    return question.format(left), f"“{left}”的反义词是“{right}”。"


def ask_synonym(rng: random.Random) -> tuple[str, str]:
    left, right = rng.choice(pairs(SYNONYMS))
    question = rng.choice(("“{}”的近义词是什么？", "{}的近义词是什么？", "写出“{}”的近义词"))
    return question.format(left), f"“{left}”的近义词是“{right}”。"


def ask_capital(rng: random.Random) -> tuple[str, str]:
    country, capital = rng.choice(pairs(CAPITALS))
    if rng.random() < 0.6:
        question = rng.choice(("{}的首都是哪里？", "{}的首都是什么？", "请问{}的首都是哪座城市？", "{}首都"))
        return question.format(country), f"{country}的首都是{capital}。"
    return rng.choice(("{}是哪个国家的首都？", "{}是哪国的首都？")).format(capital), f"{capital}是{country}的首都。"


def ask_unit(rng: random.Random) -> tuple[str, str]:
    one, many = rng.choice(pairs(UNITS))
    number = "".join(filter(str.isdigit, many))
    unit = many.removeprefix(number)
    question = rng.choice((f"{one}等于多少{unit}？", f"{one}是多少{unit}？", f"{one}有多少{unit}？"))
    return question, f"{one}等于{many}。"


def ask_kind(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(tuple(KINDS))
    member = rng.choice(KINDS[kind].split())
    question = rng.choice(("{}属于哪一类？", "{}是什么？", "“{}”属于什么类别？", "{}是哪一类东西？"))
    return question.format(member), f"{member}属于{kind}。"


def ask_members(rng: random.Random) -> tuple[str, str]:
    """Always the first members of the list: greedy decoding needs a single right answer."""
    kind, count = rng.choice(tuple(KINDS)), rng.randint(2, 5)
    number = "两" if count == 2 else DIGIT_WORDS[count]
    question = rng.choice(("列出{}种{}", "说出{}种{}。", "请列举{}种{}。", "举{}个{}的例子"))
    return question.format(number, kind), "、".join(KINDS[kind].split()[:count]) + "。"


def ask_colour(rng: random.Random) -> tuple[str, str]:
    thing, colour = rng.choice(pairs(COLOURS))
    return rng.choice(("{}是什么颜色的？", "{}是什么颜色？")).format(thing), f"{thing}是{colour}的。"


def ask_measure(rng: random.Random) -> tuple[str, str]:
    thing, measure = rng.choice(pairs(MEASURES))
    return rng.choice((f"一（ ）{thing}，填量词", f"“{thing}”用什么量词？")), f"一{measure}{thing}。"


def ask_feeling(rng: random.Random) -> tuple[str, str]:
    feeling = rng.choice(tuple(FEELINGS))
    sentence = rng.choice(SUBJECTS.split()) + rng.choice(FEELINGS[feeling].split())
    question = rng.choice(("判断情感：{}", "判断这句话的情感是积极还是消极：{}。", "情感分类：{}。"))
    return question.format(sentence), feeling


def ask_fact(rng: random.Random) -> tuple[str, str]:
    question, answer = rng.choice(pairs(FACTS))
    return (question if rng.random() < 0.7 else question.rstrip("？")), answer


def ask_small_talk(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(SMALL_TALK)
    return rng.choice(questions), answer


def ask_identity(rng: random.Random) -> tuple[str, str]:
    questions, answer = rng.choice(IDENTITY)
    return rng.choice(questions), answer


def known_words() -> list[str]:
    words = [word for block in (ENGLISH, ANTONYMS, CAPITALS, SYNONYMS) for pair in pairs(block) for word in pair]
    return list(dict.fromkeys([*words, *(word for members in KINDS.values() for word in members.split())]))


def sentence(rng: random.Random) -> str:
    return "".join(
        (rng.choice(WHEN.split()), rng.choice(WHO.split()), rng.choice(WHERE.split()),
         rng.choice([action for line in DOES.split("\n") for action in line.split("|") if action]), rng.choice("。。。！？"))
    )  # fmt: skip


def ask_echo(pieces: list[str]) -> Ask:
    """Copying random pieces also trains the embeddings of tokens that no other text uses."""

    def ask(rng: random.Random) -> tuple[str, str]:
        text = sentence(rng) if rng.random() < 0.3 else "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        question = rng.choice(("重复：{}", "重复“{}”", "请重复下面的话：{}", "跟我说：{}", "请照着说：{}", "复述：{}"))
        return question.format(text), text

    return ask


def ask_reversed(rng: random.Random) -> tuple[str, str]:
    alphabet = rng.choice(("0123456789", "abcdefgh", "红黄蓝绿黑白", "春夏秋冬", "天地人你我他", "东南西北"))
    text = "".join(rng.choices(alphabet, k=rng.randint(2, 4)))
    question = rng.choice(("把“{}”倒过来写", "倒写：{}", "把{}反过来", "倒序输出：{}"))
    return question.format(text), text[::-1]


def tasks(pieces: list[str]) -> dict[str, tuple[float, Ask]]:
    """Task -> its relative weight in the pretraining text, and a function that draws a question and its answer."""
    return {
        "sum": (10, ask_sum),
        "difference": (9, ask_difference),
        "product": (6, ask_product),
        "purchase": (4, ask_purchase),
        "bigger": (5, ask_bigger),
        "count": (3, ask_count),
        "parity": (2, ask_parity),
        "weekday": (2, ask_weekday),
        "month": (2, ask_month),
        "numeral": (1, ask_numeral),
        "english": (8, ask_english),
        "antonym": (5, ask_antonym),
        "synonym": (2, ask_synonym),
        "capital": (4, ask_capital),
        "unit": (2, ask_unit),
        "kind": (3, ask_kind),
        "members": (3, ask_members),
        "colour": (2, ask_colour),
        "measure": (2, ask_measure),
        "feeling": (3, ask_feeling),
        "fact": (4, ask_fact),
        "small talk": (4, ask_small_talk),
        "identity": (5, ask_identity),
        "echo": (12, ask_echo(pieces)),
        "reversed": (6, ask_reversed),
    }


def conversations(rng: random.Random, pieces: list[str]) -> Iterator[list[Turn]]:
    """Endless chats: mostly one question, some with a system turn, some with several turns."""
    weighted = tasks(pieces)
    weights = [weight for weight, _ in weighted.values()]
    asks = [ask for _, ask in weighted.values()]
    while True:
        if rng.random() < 0.04:
            yield number_only(rng)
            continue
        turns: list[Turn] = []
        if rng.random() < 0.1:
            turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
        for _ in range(rng.choices((1, 2, 3), (75, 17, 8))[0]):
            question, answer = rng.choices(asks, weights)[0](rng)
            turns += [("user", question), ("assistant", answer)]
        if rng.random() < 0.05:
            asked = next(text for role, text in turns if role == "user")
            turns += [("user", "我刚才第一个问题是什么？"), ("assistant", asked)]
        yield turns


def number_only(rng: random.Random) -> list[Turn]:
    """A chat whose system turn changes the form of the answer, so that system turns matter."""
    question, answer = rng.choice((ask_sum, ask_difference, ask_product))(rng)
    number = answer.replace("等于", "=").rstrip("。").split("=")[-1]
    return [("system", ONLY_NUMBER), ("user", question), ("assistant", number)]


# --- Tokenizer ------------------------------------------------------------------------------------------------------


def sample_texts() -> list[str]:
    return [
        text
        for name in SAMPLE_DATASETS
        for record in json.loads((ASSETS / f"data/{name}.json").read_text(encoding="utf-8"))
        for text in record.values()
        if text
    ]


def is_han(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


def characters_of(texts: list[str]) -> str:
    """Every Chinese character in use, once, in code-point order."""
    return "".join(
        sorted({character for text in [COMMON_CHARACTERS, *texts] for character in text if is_han(character)})
    )


def train_tokenizer(texts: list[str], vocabulary_size: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from glmtuner.templates.glm import TEMPLATES

    tokenizer = Tokenizer(models.BPE())
    # Every digit is a token: sums are learned digit by digit, and any number consists of known tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        max_token_length=12,  # in bytes: at most four Chinese characters, so that no template becomes one token
        show_progress=False,
    )
    # Each character is counted many times, so that its bytes are merged before words are.
    alone = [character for character in characters_of(texts) + "，。！？、：；（）《》“”…—·℃×÷" for _ in range(1000)]
    tokenizer.train_from_iterator([*alone, *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in CONTROL_TOKENS if token != "<|endoftext|>"],
        padding_side="left",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATES["glm4"].jinja(),
    )


def vocabulary_pieces(tokenizer: Any) -> list[str]:
    """Every token that is readable text by itself: characters and words, but no control token or part of a character."""
    texts = [tokenizer.decode([token_id]) for token_id in range(len(CONTROL_TOKENS), len(tokenizer))]
    return [text for text in texts if text.strip() and text.isprintable() and "\ufffd" not in text]


def encode(tokenizer: Any, turns: list[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat with its closing stop token, and for each whether it belongs to an answer.

    Pieces are encoded apart, as the fine-tuning encoder does: the line break behind a role, which is part of an answer, and
    the text, so that training and generation see the same ids.
    """

    def pieces(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def control(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    ids = [control("[gMASK]"), control("<sop>")]
    is_answer = [False, False]
    for role, text in turns:
        body = pieces("\n") + pieces(text)
        ids += [control(f"<|{role}|>"), *body]
        # The token after an answer, the next user turn's opening or the last stop, is the answer's end.
        is_answer += [bool(is_answer[-1] and role == "user"), *([role == "assistant"] * len(body))]
    return [*ids, control("<|user|>")], [*is_answer, True]


# --- Model ----------------------------------------------------------------------------------------------------------


def build_model(tokenizer: Any) -> Any:
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        attention_bias=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS],
    )
    return GlmForCausalLM(config)


def batches(tokenizer: Any, seed: int, batch_size: int) -> Iterator[tuple[Any, Any, Any]]:
    """Endless (input ids, attention mask, answer mask), right-padded, with chats of similar length together."""
    import torch

    rng = random.Random(seed)
    stream = conversations(rng, vocabulary_pieces(tokenizer))
    while True:
        pool = sorted((encode(tokenizer, next(stream)) for _ in range(32 * batch_size)), key=lambda chat: len(chat[0]))
        groups = [pool[start : start + batch_size] for start in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            input_ids_BT = torch.full((batch_size, width), tokenizer.pad_token_id)
            attention_BT = torch.zeros(batch_size, width, dtype=torch.long)
            is_answer_BT = torch.zeros(batch_size, width, dtype=torch.bool)
            for row, (ids, is_answer) in enumerate(group):
                input_ids_BT[row, : len(ids)] = torch.tensor(ids)
                attention_BT[row, : len(ids)] = 1
                is_answer_BT[row, : len(ids)] = torch.tensor(is_answer)
            yield input_ids_BT, attention_BT, is_answer_BT


def pretrain(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    import torch
    from torch.nn import functional as F

    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    plain = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup_steps = min(100, max(1, options.steps // 10))

    def share_of_peak(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warmup_steps) / max(1, options.steps - warmup_steps)))
        return min((step + 1) / warmup_steps, 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    stream = batches(tokenizer, options.seed, options.batch_size)
    started, answer_loss = time.monotonic(), 0.0
    model.train()
    for step in range(options.steps):
        input_ids_BT, attention_BT, is_answer_BT = next(stream)
        logits_BTV = model(input_ids=input_ids_BT, attention_mask=attention_BT, use_cache=False).logits
        # Label smoothing prevents overconfidence in the few answers, which fine-tuning would have to undo.
        loss_BT = F.cross_entropy(
            logits_BTV[:, :-1].transpose(1, 2), input_ids_BT[:, 1:], reduction="none", label_smoothing=0.05
        )
        # Questions have a small weight: predicting them trains the embeddings, but the answers are the task.
        answers_BT = is_answer_BT[:, 1:].float()
        prompts_BT = attention_BT[:, 1:].float() - answers_BT
        mean_answer_loss = (loss_BT * answers_BT).sum() / answers_BT.sum()
        loss = mean_answer_loss + options.prompt_weight * (loss_BT * prompts_BT).sum() / prompts_BT.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        answer_loss = 0.98 * answer_loss + 0.02 * mean_answer_loss.item() if step else mean_answer_loss.item()
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{options.steps}: answer loss {answer_loss:.4f}, {seconds:.0f} s", flush=True)
    model.eval()


def answer(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Greedy answers, one for each question."""
    import torch

    prompts = [encode(tokenizer, [("user", question), ("assistant", "")])[0][:-2] for question in questions]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad():
        output = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=64, do_sample=False)
    return [text.removeprefix("\n") for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def accuracy(model: Any, tokenizer: Any, questions_per_task: int = 64) -> dict[str, float]:
    """Task -> fraction of greedy answers that match exactly, on newly drawn questions."""
    scores = {}
    for name, (_, ask) in tasks(vocabulary_pieces(tokenizer)).items():
        rng = random.Random(name)
        asked = [ask(rng) for _ in range(questions_per_task)]
        answers = answer(model, tokenizer, [question for question, _ in asked])
        scores[name] = sum(given == right for given, (_, right) in zip(answers, asked, strict=True)) / len(asked)
    return scores


# --- Files ----------------------------------------------------------------------------------------------------------


def model_card(model: Any, tokenizer: Any, scores: dict[str, float], options: argparse.Namespace) -> str:
    config = model.config
    rows = "\n".join(f"| {name} | {score:.0%} |" for name, score in scores.items())
    return f"""---
license: apache-2.0
language: zh
pipeline_tag: text-generation
---

# tiny_glm

A GLM for trying things out: {model.num_parameters():,} parameters, `{config.model_type}` architecture
({config.num_hidden_layers} layers, width {config.hidden_size}, {config.num_attention_heads} heads in
{config.num_key_value_heads} groups), a byte-level BPE vocabulary of {len(tokenizer)} tokens, float32. It answers small
sums, looks up a few hundred words and capitals, repeats and reverses short strings, and says that it is TinyGLM. It
knows nothing else and is no use outside tests, demonstrations and teaching.

Prompt: `[gMASK]<sop><|user|>\\n` question `<|assistant|>`; an answer begins with a line break and ends with `<|user|>`.

## How it was made

    python scripts/make_tiny_glm.py --steps {options.steps} --seed {options.seed}

The script writes every pretraining text itself, from the word lists in it. The sample datasets of the package only
shaped the tokenizer. The same seed gives the same files on the same machine and library versions.

## What it gets right

Greedy answers to questions drawn from the pretraining templates, right to the letter:

| task | right |
|---|---|
{rows}

## Licence

Apache-2.0, as the package.
"""


def save(model: Any, tokenizer: Any, card: str, folder: Path) -> None:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def tokenizer_texts(rng: random.Random, chats: int) -> list[str]:
    """The sample datasets, and each synthetic text once: repetitions would turn whole templates into tokens."""
    stream = conversations(rng, list(COMMON_CHARACTERS))
    synthetic = [text for _ in range(chats) for _, text in next(stream)]
    return [*sample_texts(), *dict.fromkeys([*known_words(), *synthetic])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny_glm", help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="pretraining steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="chats a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--prompt-weight", type=float, default=0.2, help="loss share of questions (%(default)s)")
    parser.add_argument("--vocabulary-size", type=int, default=3000, help="with control tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="the sums' order, so the bytes, hang on it (%(default)s)"
    )
    options = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    transformers.set_seed(options.seed)

    texts = tokenizer_texts(random.Random(options.seed), chats=4000)
    tokenizer = train_tokenizer(texts, options.vocabulary_size)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pretrain(model, tokenizer, options)
    scores = accuracy(model, tokenizer)
    for name, score in scores.items():
        print(f"{name}: {score:.0%}")
    save(model, tokenizer, model_card(model, tokenizer, scores, options), options.output)


if __name__ == "__main__":
    main()
