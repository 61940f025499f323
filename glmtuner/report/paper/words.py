"""The words of a paper in English and in Chinese. Texts are LaTeX; `{name}` stands for what is filled in, which is LaTeX already."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Words:
    """One language's words."""

    chinese: bool
    comma: str
    last_comma: str  # before the last of three or more items
    both: str  # between two items
    opening: str  # of a parenthesis
    closing: str
    sentence_space: str
    continued: str
    unknown: str
    titles: dict[str, str]  # of metrics and hyper-parameters; others stand by their keys
    labels: dict[str, str]  # in pictures: the English label -> this language's; empty in English
    phrases: dict[str, str]

    def say(self, phrase: str, /, **filled: object) -> str:
        """The phrase with its places filled in."""
        return self.phrases[phrase].format(**filled)

    def listed(self, items: Sequence[str]) -> str:
        """The items as a list in a sentence."""
        if len(items) < 3:
            return self.both.join(items)
        return f"{self.comma.join(items[:-1])}{self.last_comma}{items[-1]}"

    def in_brackets(self, remarks: Sequence[str]) -> str:
        """The remarks in parentheses; empty without any."""
        return f"{self.opening}{self.comma.join(remarks)}{self.closing}" if remarks else ""


ENGLISH = Words(
    chinese=False,
    comma=", ",
    last_comma=", and ",
    both=" and ",
    opening=" (",
    closing=")",
    sentence_space=" ",
    continued=" (continued)",
    unknown="unknown",
    titles={
        "trainer.learning_rate": "learning rate", "trainer.lr_scheduler_type": "learning-rate schedule",
        "trainer.warmup_steps": "warm-up (steps, or a share below 1)", "trainer.optim": "optimizer", "trainer.weight_decay": "weight decay",
        "trainer.max_grad_norm": "largest norm of the gradient", "trainer.per_device_train_batch_size": "batch size per device",
        "trainer.gradient_accumulation_steps": "gradient accumulation", "trainer.num_train_epochs": "epochs",
        "trainer.max_steps": "steps", "data.max_source_length": "longest prompt (tokens)",
        "data.max_target_length": "longest answer (tokens)", "finetuning.lora_rank": "LoRA rank", "finetuning.lora_alpha": r"LoRA $\alpha$",
        "finetuning.lora_dropout": "LoRA dropout", "finetuning.lora_target": "layers with LoRA", "finetuning.pre_seq_len": "prefix length",
        "finetuning": "method", "model": "model", "stage": "objective", "quant": "quantization", "data.dataset": "data",
        "eval_loss": "evaluation loss", "train_loss": "training loss", "train_runtime": "training time",
        "train_tokens_per_second": "tokens/s", "train_mfu": "MFU", "peak_memory_gib": "peak memory",
        "trained_parameters": "trained parameters",
    },
    labels={},
    phrases={
        "models": "Models and methods", "data": "Data", "training": "Training", "decoding": "Decoding", "statistics": "Statistics",
        "software": "Software and hardware", "left_out": "Runs without results",
        "setup_section": "Experimental set-up", "results_section": "Results", "assets_section": "Models, data and software",
        "fine_tune": "We train {models} by {objectives} with {methods}.",
        "not_trained": "We evaluate {models} without training.",
        "with": "{method} with {extras}",
        "parameters": "{number} parameters, those of the method included", "trained": "{number} trained parameters",
        "revision": "revision {revision}",
        "range": "{low} to {high}",
        "template": "The chat template is {templates}.",
        "train_data": "Training data: {items}.", "eval_data": "Evaluation data: {items}.",
        "records": "{number} records", "skipped": "{number} broken ones left out", "shortened": "{number} shortened to the limits of length",
        "held_out": "A share of {share} of the training data is held out for evaluation.",
        "evaluated": "The runs were evaluated on {number} records each.",
        "no_evaluation": "The runs were not evaluated.",
        "hyper": r"The optimizer is {optimizers}. The hyper-parameters that were not varied are in Table~\ref{{tab:common}}.",
        "hyper_alone": r"The hyper-parameters that were not varied are in Table~\ref{{tab:common}}.",
        "varied": r"What was varied is in Table~\ref{{tab:varied}}.",
        "parallel": "Runs on several devices use {strategies}.",
        "one_seed": "The random seed of all runs is {seed}.",
        "seeds": r"Settings were trained with the random seeds {seeds}; runs that differ in their seed only are one row of a table, with mean and standard deviation ($\pm$) over {counts} runs.",
        "greedy": "Answers are decoded greedily, with at most {tokens} new tokens.",
        "beams": "Answers are decoded by beam search with {beams} beams, with at most {tokens} new tokens.",
        "penalty": "The repetition penalty is {penalty}.",
        "metrics": "They are scored by {metrics}.",
        "intervals": r"Intervals are {level} percentile bootstrap intervals{efron} of {resamples} resamples of the evaluation records.",
        "paired": r"Differences to the best setting are paired{koehn}: both are scored on the same resampled records.",
        "p_values": r"$p$-values are two-sided and come from an approximate randomization test{noreen}, which exchanges the results of a record between the two settings: all exchanges for up to {exact} records, {sample} random ones for more. They are corrected for the {count} comparisons with the best setting by Holm's method{holm}.",
        "averaged": "Where a setting has several seeds, the results of a record are averaged over them.",
        "limits": "Intervals and $p$-values are about the evaluation records, not about other seeds; the best setting was chosen by the score that it is compared by.",
        "no_statistics": "There are no scores of single records, and so no intervals and no test.",
        "no_test": "No setting has the scores of the same records as the best one, and so nothing was tested.",
        "software_used": "We use {packages} on Python {python}.",
        "package": "{name} {version}", "commit": "commit {commit}",
        "repository": "The runs were started in a repository at commit {commits}.",
        "hardware": "The runs were computed on {machines}.", "no_hardware": "The hardware of the runs was not recorded.",
        "machine_cpu": "{name} (logical cores: {cores}, threads of torch: {threads})", "memory": "{memory} GiB",
        "hours": "Training took {total} in all ({count} runs, {range} each); failed and repeated attempts are not included.",
        "unreadable": "The set-up of {count} runs could not be read, and is not part of this section.",
        "left_out_runs": r"{summary}; see Table~\ref{{tab:unranked}}.",
        "nothing": "No run has finished, so there are no results.",
        "no_score": "No finished run measured a score.",
        "results_caption": "{metric} ({direction}) of {count} settings, the best first.",
        "results_one": "Results of the run.",
        "best": r"The best of the {count} settings by {metric} is {setting}, with {score} (Table~\ref{{tab:results}}).",
        "only": r"Table~\ref{{tab:results}} has the {metric} of {setting}: {score}.",
        "differ": r"Of the other settings, {compared} were compared with it, of which {count} differ significantly ($p_{{\mathrm{{Holm}}}} \leq {alpha}$).",
        "more_tables": "More is in {tables}.", "table_of": r"Table~\ref{{tab:{label}}}", "figure_of": r"Figure~\ref{{fig:{label}}}",
        "lower": "lower is better", "higher": "higher is better",
        "metrics_caption": "Other scores of the same settings.", "costs_caption": "Training costs (means over runs).",
        "common_caption": "Hyper-parameters that were not varied; in parentheses, what they belong to.", "varied_caption": "What was varied.",
        "unranked_caption": "Runs without results.", "assets_caption": "Models, data and software, with the licences under which they are published.",
        "marks": r"$^{{\dagger}}$ and $^{{\ddagger}}$: different from the best setting at the levels 0.05 and 0.01 (Holm-corrected).",
        "bold": "Bold: the best setting.",
        "interval_note": "Brackets: {level} intervals.", "seed_note": r"$\pm$: standard deviation over seeds.",
        "incomparable": "{count} settings were evaluated on other records than the best one, and are not compared with it.",
        "not_measured": "{count} settings did not measure it.",
        "assets": r"Table~\ref{{tab:assets}} lists what was used, with its licences.",
        "asset_note": "Licences as their publishers declare them; `unknown' is what glmtuner's registry does not have.",
        "loss_caption": "Training loss by step; dashed: evaluation loss.", "knob_caption": "{metric} by {knob}.",
        "h_run": "run", "h_runs": "runs", "h_difference": r"$\Delta$ to the best", "h_p": r"$p_{{\mathrm{{Holm}}}}$", "h_key": "hyper-parameter",
        "h_values": "values", "h_value": "value", "h_settings": "settings", "h_state": "state", "h_reason": "reason",
        "h_kind": "", "h_name": "name", "h_licence": "licence", "h_reference": "reference",
        "k_model": "model", "k_data": "data", "k_software": "software",
        "s_finished": "finished", "s_out of memory": "out of memory", "s_failed": "failed", "s_running": "running",
        "s_unfinished": "unfinished", "state_count": "{count} {state}",
    },
)  # fmt: skip

CHINESE = Words(
    chinese=True,
    comma="、",
    last_comma="和",
    both="和",
    opening="（",
    closing="）",
    sentence_space="",
    continued="（续）",
    unknown="未知",
    titles={
        "trainer.learning_rate": "学习率", "trainer.lr_scheduler_type": "学习率调度", "trainer.warmup_steps": "预热（步数，小于 1 时为比例）",
        "trainer.optim": "优化器", "trainer.weight_decay": "权重衰减", "trainer.max_grad_norm": "梯度范数上限",
        "trainer.per_device_train_batch_size": "单设备批大小", "trainer.gradient_accumulation_steps": "梯度累积步数",
        "trainer.num_train_epochs": "训练轮数", "trainer.max_steps": "训练步数", "data.max_source_length": "提示最大长度（词元）",
        "data.max_target_length": "回答最大长度（词元）", "finetuning.lora_rank": "LoRA 秩", "finetuning.lora_alpha": r"LoRA $\alpha$",
        "finetuning.lora_dropout": "LoRA 丢弃率", "finetuning.lora_target": "带 LoRA 的层", "finetuning.pre_seq_len": "前缀长度",
        "finetuning": "方法", "model": "模型", "stage": "目标", "quant": "量化", "data.dataset": "数据",
        "eval_loss": "评估损失", "train_loss": "训练损失", "train_runtime": "训练时间", "train_tokens_per_second": "词元/秒",
        "train_mfu": "MFU", "peak_memory_gib": "峰值内存", "trained_parameters": "训练参数量",
    },
    labels={
        "step": "步数", "loss": "损失", "training loss": "训练损失", "training loss, smoothed": "训练损失（平滑）",
        "evaluation loss": "评估损失", "the best first": "最好的在前", "the winner": "最好的一次", "mean": "平均值", "more": "其余",
    },
    phrases={
        "models": "模型与方法", "data": "数据", "training": "训练", "decoding": "解码", "statistics": "统计方法",
        "software": "软件与硬件", "left_out": "没有结果的运行",
        "setup_section": "实验设置", "results_section": "结果", "assets_section": "模型、数据与软件",
        "fine_tune": "我们以{objectives}训练{models}，方法为{methods}。",
        "not_trained": "我们直接评估{models}，不作训练。",
        "with": "{method} 加 {extras}",
        "parameters": "含方法自身共 {number} 个参数", "trained": "训练 {number} 个参数",
        "revision": "版本 {revision}",
        "range": "{low} 至 {high}",
        "template": "对话模板为 {templates}。",
        "train_data": "训练数据：{items}。", "eval_data": "评估数据：{items}。",
        "records": "{number} 条", "skipped": "略去 {number} 条损坏的记录", "shortened": "{number} 条按长度上限截短",
        "held_out": "训练数据中 {share} 的比例留作评估。",
        "evaluated": "每次运行在 {number} 条记录上评估。",
        "no_evaluation": "这些运行没有评估。",
        "hyper": r"优化器为 {optimizers}。未变化的超参数见表~\ref{{tab:common}}。",
        "hyper_alone": r"未变化的超参数见表~\ref{{tab:common}}。",
        "varied": r"变化的设置见表~\ref{{tab:varied}}。",
        "parallel": "多设备运行使用{strategies}。",
        "one_seed": "所有运行的随机种子为 {seed}。",
        "seeds": r"各设置以随机种子 {seeds} 训练；只有种子不同的运行在表中合为一行，给出 {counts} 次运行的平均值与标准差（$\pm$）。",
        "greedy": "回答以贪心解码生成，最多 {tokens} 个新词元。",
        "beams": "回答以束宽 {beams} 的束搜索生成，最多 {tokens} 个新词元。",
        "penalty": "重复惩罚为 {penalty}。",
        "metrics": "评分指标为{metrics}。",
        "intervals": r"区间为 {level} 百分位自助法区间{efron}，对评估记录重采样 {resamples} 次。",
        "paired": r"与最好设置的差为配对差{koehn}：两者在相同的重采样记录上评分。",
        "p_values": r"$p$ 值为双侧，来自近似随机化检验{noreen}：在两个设置之间交换一条记录的结果，{exact} 条以内的记录取全部交换，更多时随机取 {sample} 种。对与最好设置的 {count} 次比较按 Holm 方法{holm}校正。",
        "averaged": "一个设置有多个种子时，每条记录的结果取其平均。",
        "limits": "区间与 $p$ 值只关于评估记录，不关于其他种子；最好的设置正是按所比较的分数选出的。",
        "no_statistics": "没有单条记录的分数，因此没有区间，也没有检验。",
        "no_test": "没有设置与最好的设置在相同的记录上评分，因此没有检验。",
        "software_used": "我们使用 {packages}，Python 版本为 {python}。",
        "package": "{name} {version}", "commit": "提交 {commit}",
        "repository": "运行时所在仓库的提交为 {commits}。",
        "hardware": "运行所用硬件：{machines}。", "no_hardware": "没有记录运行所用的硬件。",
        "machine_cpu": "{name}（逻辑核心 {cores} 个，torch 线程 {threads} 个）", "memory": "{memory} GiB",
        "hours": "训练共用 {total}（{count} 次运行，每次 {range}）；不含失败和重复的尝试。",
        "unreadable": "有 {count} 次运行的设置无法读取，不在本节之内。",
        "left_out_runs": r"{summary}；见表~\ref{{tab:unranked}}。",
        "nothing": "没有运行完成，因此没有结果。",
        "no_score": "完成的运行都没有测量分数。",
        "results_caption": "{count} 个设置的 {metric}（{direction}），最好的在前。",
        "results_one": "该次运行的结果。",
        "best": r"{count} 个设置中 {metric} 最好的是{setting}，为 {score}（表~\ref{{tab:results}}）。",
        "only": r"表~\ref{{tab:results}} 给出{setting}的 {metric}：{score}。",
        "differ": r"其余设置中有 {compared} 个与其比较，其中 {count} 个有显著差异（$p_{{\mathrm{{Holm}}}} \leq {alpha}$）。",
        "more_tables": "其余见{tables}。", "table_of": r"表~\ref{{tab:{label}}}", "figure_of": r"图~\ref{{fig:{label}}}",
        "lower": "越低越好", "higher": "越高越好",
        "metrics_caption": "相同设置的其他分数。", "costs_caption": "训练开销（各次运行的平均值）。",
        "common_caption": "未变化的超参数；括号内为其所属的选择。", "varied_caption": "变化的设置。",
        "unranked_caption": "没有结果的运行。", "assets_caption": "模型、数据与软件及其发布许可。",
        "marks": r"$^{{\dagger}}$ 与 $^{{\ddagger}}$：在 0.05 与 0.01 水平上与最好的设置不同（经 Holm 校正）。",
        "bold": "粗体：最好的设置。",
        "interval_note": "方括号：{level} 区间。", "seed_note": r"$\pm$：各种子的标准差。",
        "incomparable": "{count} 个设置在与最好设置不同的记录上评估，不与其比较。",
        "not_measured": "{count} 个设置没有测量它。",
        "assets": r"所用的模型、数据与软件及其许可见表~\ref{{tab:assets}}。",
        "asset_note": "许可以发布者的声明为准；“未知”表示 glmtuner 的登记表中没有。",
        "loss_caption": "各步的训练损失；虚线：评估损失。", "knob_caption": "{metric} 随 {knob} 的变化。",
        "h_run": "运行", "h_runs": "运行数", "h_difference": r"与最好设置之差", "h_p": r"$p_{{\mathrm{{Holm}}}}$", "h_key": "超参数",
        "h_values": "取值", "h_value": "取值", "h_settings": "设置", "h_state": "状态", "h_reason": "原因",
        "h_kind": "", "h_name": "名称", "h_licence": "许可", "h_reference": "文献",
        "k_model": "模型", "k_data": "数据", "k_software": "软件",
        "s_finished": "已完成", "s_out of memory": "内存不足", "s_failed": "失败", "s_running": "运行中",
        "s_unfinished": "未完成", "state_count": "{count} 次{state}",
    },
)  # fmt: skip

LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
