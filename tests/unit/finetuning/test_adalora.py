"""AdaLoRA: the ranks, values and loss of PEFT's own loop, in a checkpoint bit by bit, and as small a file as its ranks."""

import json
import re
from pathlib import Path

import pytest
import torch
from adapter_bases import IDS, base, loss
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.structure import family_from_structure
from glmtuner.finetuning.adalora import ALLOCATOR, orthogonality
from glmtuner.finetuning.adapter import ADAPTER, ADAPTER_CONFIG
from glmtuner.finetuning.none import NoTuning
from glmtuner.finetuning.peft import Peft, peft_settings
from glmtuner.finetuning.start import TUNED, Checkpoint, build_trainable_model
from glmtuner.finetuning.trained import trained_parameters

CONFIG = {"target_modules": ["q_proj", "v_proj"], "target_r": 2, "init_r": 4, "tinit": 2, "tfinal": 3, "lora_alpha": 16}
STEPS = 12


def method(**more: object) -> Peft:
    return Peft(finetuning_type="peft", peft_type="adalora", config={**CONFIG, **more})


def attached(how: Peft, seed: int = 3) -> torch.nn.Module:
    model = base("qwen3")
    torch.manual_seed(seed)
    return how.attach(model, family_from_structure(model)).train()


def batch(step: int) -> torch.Tensor:
    return torch.randint(4, 48, IDS.shape, generator=torch.Generator().manual_seed(step))


def train(model: torch.nn.Module, how: Peft, first: int = 1, last: int = STEPS, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:  # fmt: skip
    """As the Trainer does: the loss with the method's penalty, a step, and the method told of it."""
    optimizer = optimizer or torch.optim.Adam(trained_parameters(model).values(), lr=0.05)
    how.before_training(model, STEPS)
    for step in range(first, last + 1):
        out = model(input_ids=batch(step), labels=batch(step))
        (out.loss + how.penalty(model)).backward()
        optimizer.step()
        how.after_step(model, step)
        optimizer.zero_grad()
    return optimizer


def by_peft() -> torch.nn.Module:
    """PEFT's own loop, whose model adds the penalty to its loss."""
    model = base("qwen3")
    torch.manual_seed(3)
    model = get_peft_model(model, AdaLoraConfig(**CONFIG, total_step=STEPS, task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for step in range(1, STEPS + 1):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def test_loss_and_penalty_are_those_of_peft() -> None:
    model = base("qwen3")
    torch.manual_seed(3)
    theirs = get_peft_model(model, AdaLoraConfig(**CONFIG, total_step=STEPS, task_type="CAUSAL_LM"))
    ours = attached(method())
    one = ours(input_ids=IDS, labels=IDS).loss
    assert float(one) == pytest.approx(loss(base("qwen3")), abs=1e-6)
    expected = theirs(input_ids=IDS, labels=IDS).loss
    assert float(one + method().penalty(ours)) == pytest.approx(float(expected), abs=1e-6)
    assert orthogonality(base("qwen3")) is None and orthogonality(attached(method(orth_reg_weight=0.0))) is None


def test_ranks_and_values_are_those_of_peft_s_own_loop(tmp_path: Path) -> None:
    how = method()
    ours = attached(how)
    train(ours, how)
    theirs = by_peft()
    one, other = trained_parameters(ours), trained_parameters(theirs)
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    pattern = theirs.peft_config["default"].rank_pattern
    assert ours.peft_config["default"].rank_pattern == pattern
    assert sum(map(sum, pattern.values())) == 8 and len({sum(mask) for mask in pattern.values()}) > 1

    expected = loss(ours)
    before = [*trained_parameters(ours)]
    how.save(ours, tmp_path)
    assert loss(ours) == pytest.approx(expected, abs=1e-5) and [*trained_parameters(ours)] == before
    saved = load_file(tmp_path / ADAPTER)
    assert sum(len(value) for name, value in saved.items() if "lora_E" in name) == 8
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["total_step"] == STEPS
    # asked for its loss, PEFT's model fails where it does not train
    loaded = PeftModel.from_pretrained(base("qwen3"), tmp_path)
    assert torch.allclose(loaded(input_ids=IDS).logits, ours(input_ids=IDS).logits, atol=1e-5)
    for finetuning in (Peft(finetuning_type="peft", peft_type="ADALORA"), NoTuning(finetuning_type="none")):
        model = base("qwen3")
        again, _ = build_trainable_model(
            model, finetuning, family_from_structure(model), [Checkpoint(TUNED, tmp_path)], resume_lora=True, trains=False, user_keys=set(),
        )  # fmt: skip
        assert loss(again) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("cut", [1, 5, 9, 10])
def test_a_resume_at_any_phase_is_bit_equal(tmp_path: Path, cut: int) -> None:
    """Before, in and after the steps in which ranks fall; what was masked may come back."""
    how = method()
    whole = attached(how)
    train(whole, how)
    first = attached(how)
    optimizer = train(first, how, last=cut)
    how.save_trained(first, tmp_path)
    assert (tmp_path / ALLOCATOR).is_file()
    assert loss(PeftModel.from_pretrained(base("qwen3"), tmp_path).merge_and_unload()) == pytest.approx(loss(first), abs=1e-5)  # fmt: skip

    again = attached(how, seed=9)
    how.restore(again, tmp_path)
    state = optimizer.state_dict()
    second = torch.optim.Adam(trained_parameters(again).values(), lr=0.05)
    second.load_state_dict(state)
    train(again.train(), how, first=cut + 1, optimizer=second)
    one, other = trained_parameters(whole), trained_parameters(again)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.peft_config["default"].rank_pattern == again.peft_config["default"].rank_pattern


def test_an_adapter_of_a_finished_training_keeps_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = method()
    model = attached(how)
    train(model, how)
    how.save(model, tmp_path)
    further = Peft(finetuning_type="peft", **peft_settings(tmp_path))
    again = attached(further)
    further.restore(again, tmp_path)
    train(again.train(), further)
    assert "were chosen by the training that it is from" in capsys.readouterr().out
    further.save_trained(again, tmp_path / "on")
    further.save(again, tmp_path / "end")
    shapes = [{name: value.shape for name, value in load_file(folder / ADAPTER).items()} for folder in (tmp_path, tmp_path / "on", tmp_path / "end")]  # fmt: skip
    assert shapes[0] == shapes[1] == shapes[2]
    third = attached(further)
    further.restore(third, tmp_path / "on")
    assert loss(third) == pytest.approx(loss(again), abs=1e-6)


def test_a_training_that_ends_early_keeps_all_ranks(tmp_path: Path) -> None:
    how = method(deltaT=4)
    model = attached(how)
    train(model, how, last=7)  # ranks fell after step 4, and what fell was trained again
    expected = loss(model)
    how.save(model, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["rank_pattern"] is None
    assert loss(PeftModel.from_pretrained(base("qwen3"), tmp_path).merge_and_unload()) == pytest.approx(expected, abs=1e-5)  # fmt: skip


def test_a_pattern_of_another_model_is_one_paragraph(tmp_path: Path) -> None:
    how = method()
    model = attached(how)
    train(model, how)
    how.save(model, tmp_path)
    path = tmp_path / ADAPTER_CONFIG
    saved = json.loads(path.read_text())
    saved["rank_pattern"] = {name.replace("layers.1", "layers.9"): mask for name, mask in saved["rank_pattern"].items()}
    path.write_text(json.dumps(saved))
    again = attached(Peft(finetuning_type="peft", peft_type="ADALORA", config={**CONFIG, "total_step": STEPS}))
    with pytest.raises(CheckpointError, match="its rank_pattern is that of other layers or ranks"):
        how.restore(again, tmp_path)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"target_r": 4}, "finetuning.config.target_r=4 with finetuning.config.init_r=4: the mean rank falls from init_r to target_r"),
        ({"r": 4}, "finetuning.config.r has no effect on finetuning.peft_type=ADALORA; leave it out"),
        ({"init_lora_weights": "pissa"}, "finetuning.config.init_lora_weights=pissa: ADALORA has one initialization"),
        ({"deltaT": 0}, "finetuning.config.deltaT=0: 1 or more"),
        ({"beta1": 1.0}, "finetuning.config.beta1=1.0: in (0, 1)"),
        ({"tinit": 6, "tfinal": 6}, "finetuning.config.tinit=6 and finetuning.config.tfinal=6 of 12 steps leave none in which ranks fall"),
        ({"target_rr": 4}, "unknown key finetuning.config.target_rr; did you mean 'target_r'?"),
    ],
)  # fmt: skip
def test_what_the_schedule_does_not_allow_is_one_paragraph(values: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        how = method(**values)
        how.before_training(attached(how), STEPS)


def test_a_schedule_longer_than_the_training_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    how = method(total_step=100)
    how.before_training(attached(how), STEPS)
    said = " ".join(capsys.readouterr().out.split())
    assert "finetuning.config.total_step=100: the training has 12 steps, so the ranks will not fall" in said
