"""The registry of works and licences: what it says is well-formed, and what ships with glmtuner is in it."""

import re
from pathlib import Path

import pytest
import yaml

from glmtuner.config.compose import compose
from glmtuner.config.paths import PACKAGE_DATA, conf_dir
from glmtuner.launch.register import register_presets
from glmtuner.report.paper.references import Use, Work, cite, registry
from glmtuner.run_folder.redaction import flatten

# Data sets of the catalogue that have no publication that we are sure of.
WITHOUT_WORK = {
    "airoboros_de", "alpaca_en_demo", "alpaca_zh_demo", "booksum_de", "chinese_r1_distill", "code_alpaca", "codealpaca", "dolly_15k_de",
    "dolphin_de", "dpo_mix_en", "dpo_mix_zh", "firefly", "guanaco", "guanaco_chat", "infinity_instruct", "kto_mix_14k", "kto_mix_15k",
    "nectar_sft", "open_r1_math", "open_thoughts", "openo1_sft", "openschnabeltier_de", "ruozhiba", "sharegpt4",
    "sharegpt_hyperfiltered", "sharegpt_zh", "stem_zh", "webnovel", "wikipedia_en", "wikipedia_zh",
}  # fmt: skip


def presets(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def values_of(*words: str) -> dict[str, object]:
    from omegaconf import OmegaConf

    register_presets()
    return flatten(
        OmegaConf.to_container(compose(["data.dataset=belle_sample", *words]).config, resolve=True, enum_to_str=True)
    )


def test_every_work_has_its_facts_in_plain_bibtex():
    works = registry().works
    assert len(works) > 70
    for key, work in works.items():
        assert work.title and work.authors and 1900 < work.year <= 2026, key
        assert all("," in name or "{" in name or name == "others" for name in work.authors.split(" and ")), key
        if work.arxiv:
            assert re.fullmatch(r"\d{4}\.\d{4,5}", work.arxiv), key
            assert 0 <= work.year - (2000 + int(work.arxiv[:2])) <= 2, (
                f"{key}: published within two years of the preprint"
            )
        texts = " ".join((work.title, work.authors, work.venue, work.journal, work.publisher))
        assert not re.search(r"[\\$&#_%^~<>\"]", texts), key
        assert all(sign < "\u0180" for sign in texts), key
        assert work.arxiv or work.url or work.venue or work.journal or work.publisher, key


def test_every_work_is_cited_by_something():
    known = registry()
    cited = {
        key
        for each in (*known.uses, *known.models.values(), *known.datasets.values(), *known.software.values())
        for key in each.cite
    }
    assert known.works.keys() - cited == {"efron1979bootstrap", "koehn2004significance", "noreen1989", "holm1979"}


def test_an_entry_of_bibtex():
    work = Work(
        title="LoRA: Low", authors="Hu, Edward J. and Shen, Yelong", year=2022, venue="ICLR", arxiv="2106.09685"
    )
    assert work.bibtex("hu") == (
        "@inproceedings{hu,\n  author = {Hu, Edward J. and Shen, Yelong},\n  title = {{LoRA: Low}},\n  booktitle = {ICLR},\n"
        "  year = {2022},\n  note = {arXiv:2106.09685},\n}"
    )
    software = Work(title="T", authors="A, B", year=2022, url="https://x.example/y")
    assert software.bibtex("s").startswith(
        "@misc{s,"
    ) and r"howpublished = {\url{https://x.example/y}}" in software.bibtex("s")
    assert (
        Work(title="T", authors="A, B", year=1979, journal="J", volume=6, number=2)
        .bibtex("h")
        .startswith("@article{h,")
    )
    assert Work(title="T", authors="A, B", year=1989, publisher="Wiley").bibtex("n").startswith("@book{n,")
    assert cite(["a", "b", "a"]) == r"~\cite{a,b}" and cite([]) == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["finetuning=lora"], {"method": ["hu2022lora"], "with": []}),
        (["finetuning=dora"], {"method": ["hu2022lora"], "with": ["liu2024dora"]}),
        (["finetuning=rslora"], {"method": ["hu2022lora"], "with": ["kalajdzievski2023rslora"]}),
        (["finetuning=pissa"], {"method": ["hu2022lora"], "with": ["meng2024pissa"]}),
        (["finetuning=qlora"], {"method": ["hu2022lora"], "with": ["dettmers2023qlora"]}),
        (["finetuning=lora", "finetuning.loraplus_lr_ratio=16"], {"with": ["hayou2024loraplus"]}),
        (["finetuning=p_tuning"], {"method": ["liu2022ptuning"], "with": []}),
        (["finetuning=freeze"], {"method": [], "with": []}),
        (["finetuning=peft", "finetuning.peft_type=adalora", "finetuning.config.total_step=10"], {"method": ["zhang2023adalora"]}),
        (["stage=dpo"], {"objective": ["rafailov2023dpo"]}),
        (["stage=dpo", "stage.loss=ipo"], {"objective": ["azar2024ipo"]}),
        (["stage=kto"], {"objective": ["ethayarajh2024kto"]}),
        (["stage=orpo"], {"objective": ["hong2024orpo"]}),
        (["stage=simpo"], {"objective": ["meng2024simpo"]}),
        (["stage=cpo"], {"objective": ["xu2024cpo"]}),
        (["stage=grpo", "reward=exact"], {"objective": ["shao2024grpo"]}),
        (["stage=grpo", "reward=exact", "stage.loss=dr_grpo"], {"objective": ["shao2024grpo", "liu2025drgrpo"]}),
        (["stage=grpo", "reward=exact", "stage.loss=dapo"], {"objective": ["shao2024grpo", "yu2025dapo"]}),
        (["stage=grpo", "reward=exact", "stage.loss=gspo"], {"objective": ["zheng2025gspo"]}),
        (["stage=grpo", "reward=exact", "stage.loss=rloo"], {"objective": ["ahmadian2024rloo"]}),
        (["stage=ppo", "model.reward_model=x"], {"objective": ["schulman2017ppo", "ouyang2022instructgpt"]}),
        (["stage=sft", "stage.loss=dft"], {"objective": ["wu2025dft"]}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_a_run_does_is_cited(words, expected):
    values, known = values_of(*words), registry()
    for kind, keys in expected.items():
        assert [key for use in known.uses_of(values, kind) for key in use.cite] == keys, kind


def test_every_preset_of_a_method_and_a_stage_has_a_rule():
    known = registry()
    asked = {
        "peft": ["finetuning.peft_type=ia3"],
        "grpo": ["reward=exact"],
        "ppo": ["model.reward_model=x"],
        "none": ["trainer=predict"],
    }
    for group, kind in (("finetuning", "method"), ("stage", "objective")):
        for name in presets(group):
            assert known.uses_of(values_of(f"{group}={name}", *asked.get(name, [])), kind), f"{group}={name}"


def test_every_loss_of_a_stage_has_a_rule():
    from glmtuner.config.groups import PreferenceLoss, SftLoss
    from glmtuner.config.rewards import PolicyLoss

    for stage, losses in (("dpo", PreferenceLoss), ("grpo", PolicyLoss), ("sft", SftLoss)):
        for loss in losses:
            assert registry().uses_of({"stage.name": stage, "stage.loss": loss.value}, "objective"), (
                f"{stage} {loss.value}"
            )


def test_a_recorded_strategy_that_was_removed_is_cited():
    (use,) = registry().uses_of({"parallel.name": "zero3"}, "parallel")
    assert use.cite == ["rajbhandari2020zero"]


def test_every_model_of_the_presets_is_known():
    for name in presets("model"):
        source = yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text(encoding="utf-8"))["model_name_or_path"]
        asset = registry().model(source)
        assert source == "???" or (asset is not None and asset.licence), name
    assert registry().model("ZAI-org/glm-4.5") is registry().model("zai-org/GLM-4.5")
    assert registry().model("someone/glm-4.5") is None and registry().model("/models/GLM-4.5") is None


def test_every_data_set_of_the_catalogue_is_known_or_listed():
    unknown = set()
    for name in presets("dataset"):
        entry = yaml.safe_load((conf_dir() / f"dataset/{name}.yaml").read_text(encoding="utf-8"))
        shipped = f"package://{entry.get('file_name')}"
        if registry().dataset(entry.get("hf_hub_url") or entry.get("url") or shipped) is None:
            unknown.add(name)
    assert unknown == WITHOUT_WORK
    assert {f"package://{path.name}" for path in PACKAGE_DATA.glob("*.json")} <= registry().datasets.keys()


def test_rules_with_lists_and_off_switches():
    use = Use(kind="with", when={"a": "set", "b": [1, "x"]}, name={"en": "n", "zh": "n"}, cite=[])
    assert use.fits({"a": 16, "b": "x"}) and use.fits({"a": "y", "b": 1.0})
    for off in (None, False, "none", "", []):
        assert not use.fits({"a": off, "b": 1})
    assert not use.fits({"a": 1, "b": 2}) and not use.fits({"a": 1})


def test_the_registry_ships_with_the_package():
    import glmtuner

    assert (Path(glmtuner.__file__).parent / "assets/references.yaml").is_file()
