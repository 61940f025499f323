"""What a race refuses before a job is started: illegal options, and jobs that cannot be compared."""

import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from glmtuner.config.compose import compose_every_job
from glmtuner.config.paths import ASSETS, conf_dir
from glmtuner.errors import ConfigError
from glmtuner.launch.register import register_presets
from glmtuner.sweep.launchers import register
from glmtuner.sweep.race_options import RaceOptions, check_race

register_presets()
BASE = ["hydra/sweeper=race", "model=tiny_glm", "data.dataset=belle_sample", "trainer.do_eval=true", "tracker=none"]
DEV, RATES = "data.dev_ratio=0.2", "trainer.learning_rate=1e-3,1e-4"


def check(*overrides: str) -> None:
    register()
    jobs = []
    compose_every_job([*BASE, *overrides], seen=jobs.append)
    check_race(jobs)


@pytest.mark.parametrize(
    "overrides",
    [
        [DEV, RATES, "hydra.sweeper.rungs=[10,20]", "trainer.max_steps=30"],
        [DEV, RATES, "hydra.sweeper.rule=halving", "hydra.sweeper.rungs=[0.5]"],
        [DEV, "trainer.seed=1,2", "trainer.data_seed=7"],
        ["data.eval_dataset=belle_sample", "data.dataset=belle_sample,alpaca_zh_sample", "trainer.seed=1,2"],
        [DEV, "data.max_source_length=64,128", "trainer.predict_with_generate=true", "objective=rouge-l"],
        [DEV, "stage=dpo", "data.dataset=preference_sample", "stage.beta=0.1,0.2", "objective=accuracy"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_jobs_that_can_be_compared_race(overrides: list[str]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rule=best"], "rule=best: legal: paired, halving"),
        (["alpha=5"], "alpha=5: an error rate between 0 and 1"),
        (["alpha=high"], "alpha=high: an error rate"),
        (["keep=0"], "keep=0: a whole number, 1 or more"),
        (["reduction_factor=1"], "reduction_factor=1: a whole number, 2 or more"),
        (["recall=job"], "type hydra.sweeper.recall=[job]"),
        (["rungs=0.5"], "a list of shares or steps"),
        (["rungs=[0.5]"], "rule=paired drops a job by two rungs"),
        (["rungs=[]"], "two or more"),
        (["rungs=[0.5,0.2]"], "rungs=[0.5,0.2]: each rung is later"),
        (["rungs=[0.5,0.5]"], "each rung is later"),
        (["rungs=[0.5,10]"], "either shares of the training, or numbers of steps"),
        (["rungs=[0.5,1.0]"], "rungs=1.0: a pause is a number of steps"),
        (["rungs=[0,10]"], "rungs=0: a pause"),
        (["rungs=[true,nan]"], "rungs=True: a pause"),
        (["rungs=[nan,10]"], "rungs=nan: a pause"),
        (["keep=0", "alpha=2"], "; also: hydra.sweeper.keep=0"),
    ],
)  # fmt: skip
def test_illegal_options_are_refused_in_one_paragraph(options: list[str], message: str) -> None:
    sweeper = OmegaConf.load(conf_dir() / "hydra/sweeper/race.yaml")
    sweeper.merge_with_dotlist(options)
    with pytest.raises(ConfigError) as refused:
        RaceOptions.of(sweeper)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # a job alone
        ([DEV, RATES, "hydra.sweeper.rungs=[10,30]", "trainer.max_steps=30"], "the rung 30 is not before the end"),
        ([RATES, "trainer.do_eval=false"], "type data.eval_dataset=…, or data.dev_ratio=0.1"),
        ([DEV, RATES, "trainer.do_eval=false"], "type trainer.do_eval=true"),
        ([DEV, RATES, "objective=train_loss"], "no record has a value of it; type objective=eval_loss"),
        ([DEV, RATES, "objective=rouge-l"], "trainer.predict_with_generate=true, or objective=eval_loss"),
        ([DEV, RATES, "objective=rouge-1l", "trainer.do_predict=true", "trainer.predict_with_generate=true"], "did you mean 'rouge-1' or 'rouge-l'"),
        ([DEV, RATES, "stage=pt", "data.dataset=text_sample", "objective=perplexity"], "type objective=eval_loss"),
        ([DEV, RATES, "trainer.overwrite_output_dir=true"], "type another name=… to start over"),
        # jobs together
        ([DEV, "data.dataset=belle_sample,alpaca_zh_sample"], "data.dataset=belle_sample,alpaca_zh_sample: the jobs hold out"),
        ([DEV, "trainer.seed=1,2"], "or trainer.data_seed=42"),
        (["data.dev_ratio=0.1,0.2"], "data.dev_ratio=0.1,0.2: the jobs hold out other records"),
        ([DEV, "data.max_samples=20,40"], "type data.eval_dataset=…"),
        ([DEV, "data.max_target_length=32,64"], "data.max_target_length=32,64: the same records become other tokens"),
        ([DEV, "data.new_tokens=[t1],[t2]"], "the same records become other tokens"),
        ([DEV, "objective=eval_loss,null"], "all jobs of a race have one objective"),
        ([DEV, "data.dataset=preference_sample", "stage=dpo,orpo"], "the losses of two stages are of two kinds"),
        ([DEV, "data.dataset=preference_sample", "stage=dpo", "stage.beta=0.1,0.2"], "stage.beta=0.1,0.2: eval_loss is of another kind"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_race_is_refused_in_one_paragraph(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(*overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_models_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(ASSETS / "tiny_glm", tmp_path / name)
    models = f"model.model_name_or_path={tmp_path}/one,{tmp_path}/two"
    check(DEV, models)
    file = tmp_path / "two/tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="their tokenizers differ"):
        check(DEV, models)
    check(DEV, models, "objective=rouge-l", "trainer.predict_with_generate=true")
