"""What `--help` prints."""

from glmtuner.config.key_meanings import GROUPS

EXAMPLES = """\
  python -m glmtuner experiment=quickstart                          one minute, offline, on the model that ships
  python -m glmtuner finetuning=freeze data.dataset=alpaca_zh,belle one run on the mix of two datasets
  python -m glmtuner model=causal_lm model.model_name_or_path=Qwen/Qwen3-0.6B data.dataset=my.jsonl trainer.bf16=true
  python -m glmtuner trainer=predict model.checkpoint_dir=outputs/<date>/<run> data.dataset=identity_sample
  python -m glmtuner -m finetuning=lora,freeze,p_tuning trainer.learning_rate=1e-3,5e-4   a sweep of six runs
"""
MEANINGS = {group: words["en"] for group, words in GROUPS.items() if not group.startswith("hydra/")}


def help_text(config_dir: str | None = None) -> str:
    """The groups, what they mean, their presets, and five examples."""
    from glmtuner.config.compose import presets, searched_dirs

    names_by_group = presets(searched_dirs(config_dir))
    width = max(map(len, names_by_group))
    lines = [
        "glmtuner fine-tunes ChatGLM, GLM and other causal language models from composed YAML.",
        "",
        "  python -m glmtuner [options] group=preset group.key=value …     one run",
        "  python -m glmtuner -m group=a,b group.key=1,2 …                 a sweep: every combination",
        *(f"  {f'python -m glmtuner {verb} …':<64}{line}" for verb, line in _verbs()),
        "",
        "Groups (the default preset comes first):",
    ]
    defaults = _default_presets()
    for group in [*MEANINGS, *sorted(names_by_group.keys() - MEANINGS.keys())]:
        names = names_by_group.get(group, [])
        default = defaults.get(group)
        names = [default, *(name for name in names if name != default)] if default else names
        lines += [f"  {group:<{width}}  {MEANINGS.get(group, '')}", f"  {'':<{width}}  {', '.join(names)}"]
    lines += [
        "  benchmark=ceval,mmlu,…  scores the model with tasks of lm-evaluation-harness, at the end of a run or by trainer=benchmark",
        "",
        "A comma means 'and' in a run (data.dataset=a,b trains on both) and 'each' in a sweep; brackets always mean 'and'.",
        "",
        "Examples:",
        EXAMPLES,
        "Options:",
        "  --cfg job --resolve     show the composed run and stop      --package GROUP   only one part of it",
        "  --info defaults-tree    why each file was composed          --config-dir DIR  more presets, in DIR/<group>/",
        "  --check                 estimate the memory of a training and measure a few steps: what the run, or with -m the whole sweep,",
        "                          will take in time, hours, energy and money; with --json as one object",
        "  --preview [N]           the first N (3) rows of each dataset: prompt, learned, stop, cut, and the prompt that is served;",
        "                          nothing is loaded but the tokenizer; with --ids the token ids, with --json an object a row",
        "  -m, --multirun          a sweep                             --version, --hydra-help",
    ]
    return "\n".join(lines)


def _verbs() -> list[tuple[str, str]]:
    """Every verb with what it takes, and its help line."""
    from importlib import import_module

    from glmtuner.cli.verbs import VERBS

    modules = {verb: import_module(f"glmtuner.cli.{verb}") for verb in VERBS}
    return [(f"{verb} {getattr(module, 'TAKES', 'RUN')}", module.HELP) for verb, module in modules.items()]


def _default_presets() -> dict[str, str]:
    import yaml

    from glmtuner.config.paths import conf_dir

    listed = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = {group: name for entry in listed if isinstance(entry, dict) for group, name in entry.items()}
    return {group: name for group, name in pairs.items() if name and not group.startswith("override")}
