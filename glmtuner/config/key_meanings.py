"""What each key means, in one line, in English and Chinese: glmtuner/assets/keys.yaml."""

import os
from functools import cache

from glmtuner.config.paths import ASSETS

LANGUAGES = ("en", "zh")
MEANINGS = ASSETS / "keys.yaml"
ENTRY = "dataset_info"  # what the keys of a dataset's entry stand below there
GROUPS = {  # what each group of presets is, in the order of help and form
    "model": {"en": "which pretrained model", "zh": "哪个预训练模型"},
    "quant": {"en": "in how many bits its frozen weights are stored", "zh": "冻结的权重用多少位存储"},
    "data": {"en": "which records, and how they become tokens", "zh": "用哪些数据，以及怎样变成词元"},
    "finetuning": {"en": "which weights are trained", "zh": "训练哪些权重"},
    "stage": {"en": "what is learned", "zh": "学习什么"},
    "reward": {
        "en": "how stage=grpo scores answers; several as reward=[number,format], with their weights at reward.number.weight",
        "zh": "stage=grpo 怎样给回答打分；多个写成 reward=[number,format]，权重在 reward.number.weight",
    },
    "trainer": {
        "en": "train, evaluate, predict or benchmark; every field of transformers' Seq2SeqTrainingArguments",
        "zh": "训练、评估、预测或基准测试；transformers 的 Seq2SeqTrainingArguments 的全部字段",
    },
    "metric": {"en": "how answers are scored", "zh": "怎样给回答评分"},
    "generation": {"en": "how chat decodes", "zh": "对话怎样解码"},
    "tracker": {"en": "where metrics are logged besides the run folder", "zh": "除运行文件夹外，指标还记录到哪里"},
    "kernels": {"en": "kernels that replace torch's own", "zh": "替换 torch 自带算子的内核"},
    "parallel": {
        "en": "how many processes train one run, and what each of them stores",
        "zh": "一次运行用多少进程训练，各自存储什么",
    },
    "budget": {
        "en": "the hours and the money that a sweep may take, and prices for its forecast",
        "zh": "扫描可用的机时与费用，以及预测所用的价格",
    },
    "experiment": {"en": "whole recipes", "zh": "完整的配方"},
    "hydra/launcher": {"en": "where and how the jobs of a sweep are started", "zh": "扫描的作业在哪里、怎样启动"},
    "hydra/sweeper": {
        "en": "which jobs a sweep has: every combination, a race, a search",
        "zh": "扫描包含哪些作业：全部组合、竞赛或搜索",
    },
    "hydra/sweeper/sampler": {"en": "how a search chooses its trials", "zh": "搜索怎样选取试验"},
    "hydra/sweeper/pruner": {"en": "which trials of a search are stopped early", "zh": "搜索提前终止哪些试验"},
}


@cache
def key_meanings() -> dict[str, dict[str, str]]:
    """Dotted key -> language -> its meaning."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is installed
    meanings: dict[str, dict[str, str]] = yaml.load(MEANINGS.read_text(encoding="utf-8"), Loader=loader)
    return meanings


def meaning_of(key: str, language: str) -> str:
    """The meaning of a key in a language; empty for a key of a plugin."""
    return key_meanings().get(key, {}).get(language, "")


def language_of_locale() -> str:
    """`zh` where the locale is a Chinese one (LC_ALL, else LC_MESSAGES, else LANG), and `en` otherwise."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.lower().startswith("zh") else "en"
