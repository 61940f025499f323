"""One composed run, from its words to its folder; reads top to bottom."""

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from glmtuner import ranks
from glmtuner.assemble import (
    SHAPE,
    attached_model,
    check_base,
    check_liger,
    check_liger_runs,
    compute_dtype,
    device_of,
    has_bfloat16,
    load_libraries,
    settle_family,
    template_of,
)
from glmtuner.config.compose import Composed
from glmtuner.config.paths import conf_dir
from glmtuner.config.schema import Parallel, Run, Tracker
from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.console import say, table
from glmtuner.data.splits import entries, longest_row
from glmtuner.errors import CheckpointError, ConfigError
from glmtuner.families.family import Family
from glmtuner.hub import read_config
from glmtuner.memory import (
    MARGIN,
    Estimate,
    device_memory,
    does_not_fit,
    estimate,
    gib,
    hollow,
    settle_checkpointing,
    settled_baseline,
    surely_fits,
)
from glmtuner.predict import answer_all
from glmtuner.preemption import Preempted, listening
from glmtuner.run_folder import (
    CONFIG,
    EVALUATIONS,
    METRICS,
    PROVENANCE,
    TEMPLATE,
    WORDS,
    RunFolder,
    claim,
    default_folder,
    newest_whole,
    provenance,
    shown_words,
    step_of,
    without_secrets,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from glmtuner.data.splits import Datasets
    from glmtuner.objectives.objective import Objective
    from glmtuner.trainer import GlmTrainer


def launch(composed: Composed, output_dir: Path | None = None, catalogue: list[Path] | None = None) -> dict[str, float]:
    """Do what the run says; returns the content of metrics.json. Everything it writes lands in the run folder.

    An error after the folder is claimed is recorded there (failed.json) and raised; Preempted is raised by a run that a
    signal stopped. A run of several processes is started here, and every one of them comes here again as one rank of it.
    """
    run = composed.run
    specs = entries(run, catalogue or catalogue_dirs(composed))
    run.stage.check(run)
    run.parallel.check_machine()
    if (count := ranks.to_start(run.parallel)) > 1:
        return in_ranks(composed, RunFolder(output_dir or output_folder(composed)), count)
    ranks.join(run.trainer)
    if not ranks.is_main():
        run.tracker = Tracker(name="none")
    folder, resumes = ranks.agreed(lambda: claimed(output_dir or output_folder(composed), composed))
    try:
        metrics = _launched(composed, specs, folder, resumes)
    except Exception as error:
        run.tracker.abandon()
        if folder.path.is_dir():
            folder.record_failure(error, composed.words, first_wins=ranks.world_size() > 1)
        raise
    finally:
        folder.unlock()
    return metrics


def claimed(path: Path, composed: Composed) -> tuple[RunFolder, bool]:
    """The run's folder, locked by this process where it exists, and whether the run in it is to be resumed."""
    return RunFolder(path), claim(path, composed.config, composed.run.trainer.overwrite_output_dir)


def in_ranks(composed: Composed, folder: RunFolder, count: int) -> dict[str, float]:
    """The run by `count` processes of this machine; raises RankFailed for the first that fails, Preempted when told to go."""
    claimed(folder.path, composed)
    folder.unlock()
    try:
        ranks.run_ranks(ranks.command_of(composed.flags, composed.words, folder.path), count)
    except ranks.RankFailed as failed:
        if failed.stopped_by is not None:
            checkpoint, _ = newest_whole(folder.path)
            raise Preempted.by(failed.stopped_by, step_of(checkpoint) if checkpoint else 0) from None
        if folder.path.is_dir():
            folder.record_failure(failed, composed.words, first_wins=not failed.killed)
        raise
    return folder.metrics()


def _launched(composed: Composed, specs: Any, folder: RunFolder, resumes: bool) -> dict[str, float]:
    run = composed.run
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    check_liger(run, model_config)
    family = settle_family(run, model_config)

    load_libraries(compiles=compiles(run), trains=True)
    from glmtuner.models.load import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    template = template_of(run, family, tokenizer)
    data = run.stage.datasets(run, specs, template, tokenizer)
    device = device_of(run)
    check_liger_runs(run, device)
    checkpoint_where_needed(composed, model_config, family, data, device)
    model, family = attached_model(composed, family, device)
    run.model.family = family.name
    objective = run.stage.objective(run, model, template, tokenizer)

    if ranks.is_main():
        folder.lock()
        describe(folder, composed, family, template, model_config, data, resumes)
    arguments = training_arguments(run, folder, model, device)
    run.tracker.start(run, folder.path)
    blocks = family.blocks(model.get_base_model() if hasattr(model, "get_base_model") else model)  # PEFT wraps it
    if ranks.world_size() > 1:
        run.parallel.spread(model, blocks)
    trainer = make_trainer(run, folder, model, tokenizer, template, data, arguments, objective)
    speed_up(run, trainer, data, blocks)
    show_plan(run, folder, model, data, trainer, device)
    metrics: dict[str, float] = {}
    if run.trainer.do_train:
        metrics |= train(run, folder, trainer, tokenizer, data, resumes)
    if run.trainer.do_eval:
        metrics |= numbers(trainer.evaluate())
    if run.trainer.do_predict:
        metrics |= run.stage.predict(run, folder, trainer, tokenizer, template, data)
    return finish(run, folder, trainer, metrics)


# -- before anything heavy is loaded -------------------------------------------------------------------------------------


def catalogue_dirs(composed: Composed) -> list[Path]:
    """The dataset catalogues: of the user's config folders, then the package's."""
    searched = [str(path).removeprefix("file://") for path in composed.hydra.searchpath or []]
    return [*(Path(path) / "dataset" for path in searched if not path.startswith("pkg:")), conf_dir() / "dataset"]


def compiles(run: Run) -> bool:
    """Whether the run needs torch's compiler: for its blocks, or for bitsandbytes' kernels on a CPU."""
    return run.quant.bits is not None or run.trainer.torch_compile


def output_folder(composed: Composed) -> Path:
    """Where the run lives: trainer.output_dir, or hydra.run.dir when it was typed, or outputs/<date>/<time>_<name>."""
    run = composed.run
    if run.trainer.output_dir:
        return Path(run.trainer.output_dir).expanduser()
    if "hydra.run.dir" in composed.typed:
        return Path(composed.hydra.run.dir)
    name = run.name or f"{Path(run.model.model_name_or_path).name}_{run.finetuning.finetuning_type}"
    return default_folder(Path("outputs"), name.replace("/", "_").replace(" ", "_"))


# -- model, template, arguments ------------------------------------------------------------------------------------------


def training_arguments(run: Run, folder: RunFolder, model: "nn.Module", device: "torch.device") -> Any:
    """transformers' arguments: what differs from its defaults, and the precision that trained parts of a half base need.

    `device` is where the run trains, which need not be in this machine.
    """
    import torch
    from transformers import Seq2SeqTrainingArguments

    known = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments) if field.init}
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(TrainerArguments):
        value = getattr(run.trainer, field.name)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        if value != default and field.name in known:
            chosen[field.name] = value.value if isinstance(value, Enum) else value
    if "activation_checkpointing" in known and "gradient_checkpointing" in chosen:  # its name from transformers 5.23 on
        chosen["activation_checkpointing"] = chosen.pop("gradient_checkpointing")
        if "gradient_checkpointing_kwargs" in chosen:
            chosen["activation_checkpointing_kwargs"] = chosen.pop("gradient_checkpointing_kwargs")
    # `speed_up` compiles blocks one by one, since the whole model breaks at every attention, and asks Liger for more models
    for name in (
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "use_liger_kernel",
        "liger_kernel_config",
    ):
        chosen.pop(name, None)
    chosen |= {"output_dir": str(folder.path), "report_to": "none", "run_name": run.name or folder.path.name}
    if ranks.world_size() > 1:
        chosen |= run.parallel.arguments()
    half = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} & {
        torch.float16,
        torch.bfloat16,
    }
    if run.trainer.do_train and half and not (run.trainer.fp16 or run.trainer.bf16):
        if run.finetuning.saved_as == "model":
            chosen["bf16" if torch.bfloat16 in half else "fp16"] = True  # float32 weights between half-precision ones
        elif torch.bfloat16 in half and has_bfloat16(device):
            chosen["bf16"] = True  # products with float32 adapters take bfloat16's tensor cores, too
    if not torch.cuda.is_available():
        chosen["dataloader_pin_memory"] = False  # transformers warns where there is nothing to pin for
        if ranks.world_size() > 1:
            chosen["use_cpu"] = True  # accelerate meets no ranks on a CPU that it was not told of
    chosen["eval_on_start"] = run.trainer.eval_on_start and run.trainer.do_train
    return Seq2SeqTrainingArguments(**{name: value for name, value in chosen.items() if value is not None})


# -- memory, before anything is loaded -----------------------------------------------------------------------------------


def check(composed: Composed) -> None:
    """Say what the training of this run holds at its peak, without weights or data; nothing is written.

    Raises ConfigError where it surely does not fit into this machine's device, or cannot be told.
    """
    run = composed.run
    device = device_of(run)
    available = device_memory(device)
    needed, line = checked(composed, device, available)
    table("", ("", ""), needed.told(), show_header=False)
    if line is not None:
        say(line)
    if run.stage.name == "ppo":
        say("stage=ppo also generates answers and holds a value head and a reward model, which are not counted")
    if available is None:
        return
    if needed.peak > available * (1 + MARGIN):
        raise does_not_fit(run, needed, available)
    verdict = "fits" if needed.peak < available else "may not fit"
    say(f"{verdict}: {gib(needed.peak)} of the {gib(available)} that this machine's {needed.device} has")


def check_elsewhere(composed: Composed) -> None:
    """Say in one line what a GPU must have for this run, which starts on another machine; never refuses."""
    import torch

    run = composed.run
    if not run.trainer.do_train:
        return
    device = device_of(run)
    if not (run.trainer.use_cpu or device.type == "cuda"):
        device = torch.device("cuda")
    try:
        needed, _ = checked(composed, device, None)
    except ConfigError as error:
        say(f"memory: {error}")
        return
    say(
        f"memory: the first job needs about {gib(needed.peak)} of a {needed.device}'s at its peak, with {needed.rows} rows of "
        f"{needed.longest:,} tokens (python -m glmtuner --check … tells more)"
    )


def checked(composed: Composed, device: "torch.device", available: int | None) -> tuple[Estimate, str | None]:
    """The estimate of the run's largest batch, and the line of gradient checkpointing that is turned on for it."""
    run = composed.run
    entries(run, catalogue_dirs(composed))
    run.stage.check(run)
    run.parallel.check_machine()
    if not run.trainer.do_train:
        raise ConfigError("--check states the memory of a training, and trainer.do_train=false; type trainer=train")
    model_config = read_config(run.model)
    check_base(run.model, model_config)
    check_liger(run, model_config)
    family = settle_family(run, model_config)
    load_libraries(compiles=compiles(run), trains=True)  # what a run would, since they count
    rows, longest = run.stage.largest_batch(run)
    estimated = estimator(composed, family, device, rows, longest, ranks.to_start(run.parallel))
    line = settle_checkpointing(composed, estimated, available)
    return estimated(run.trainer.gradient_checkpointing or line is not None), line


def estimator(
    composed: Composed, family: Family | None, device: "torch.device", rows: int, longest: int, processes: int
) -> Callable[[bool], Estimate]:
    """What says the peak of the run on batches of that size, given whether gradient checkpointing is on."""
    import torch

    run = composed.run
    baseline = settled_baseline(device, run.tracker.name)

    @cache  # told more than once of one run, and a large model takes seconds
    def estimated(checkpointing: bool) -> Estimate:
        model = hollow(run, family, device, compute_dtype(run, device))
        there = copy.copy(run)
        there.trainer = copy.copy(run.trainer)
        there.parallel = Parallel(name="none")  # DeepSpeed's configuration would change how models are built
        there.trainer.use_cpu = not torch.cuda.is_available()  # transformers refuses bf16 for a GPU that is not here
        arguments = training_arguments(there, RunFolder(Path("outputs")), model, device)
        arguments.activation_checkpointing = checkpointing
        found = estimate(
            model, arguments, device, rows=rows, longest=longest, baseline=baseline, scores=not run.stage.policy,
            **may_take(run),
        )  # fmt: skip
        return found.shared(run.parallel.shares, processes)

    return estimated


def checkpoint_where_needed(
    composed: Composed,
    model_config: Mapping[str, Any],
    family: Family | None,
    data: "Datasets",
    device: "torch.device",
) -> None:
    """Turn gradient checkpointing on where the longest batch of these data would not fit without it."""
    run = composed.run
    if data.train is None or run.stage.name == "ppo":
        return
    rows, longest = run.stage.largest_batch(run)[0], longest_row(data.train)

    def decide() -> str | None:
        available = device_memory(device)
        if available is None or surely_fits(model_config, run, rows, longest, available):
            return None
        estimated = estimator(composed, family, device, rows, longest, ranks.world_size())
        return settle_checkpointing(composed, estimated, available)

    if line := ranks.agreed(decide):
        run.trainer.gradient_checkpointing = True
        say(line)


# -- the folder and the terminal -----------------------------------------------------------------------------------------


def describe(
    folder: RunFolder,
    composed: Composed,
    family: Family,
    template: Any,
    model_config: Mapping[str, Any],
    data: "Datasets",
    resumes: bool,
) -> None:
    """config.yaml, overrides.txt, provenance.json: what runs, and where it came from."""
    run, config = composed.run, composed.config
    resolved = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    resolved["model"] |= {
        "family": family.name,
        "template": run.model.template,
        "checkpoint_dir": [str(Path(path).expanduser().resolve()) for path in run.model.checkpoint_dir],
    }
    for name in ("model_name_or_path", "reward_model"):
        value = getattr(run.model, name)
        if value and Path(value).expanduser().is_dir():
            resolved["model"][name] = str(Path(value).expanduser().resolve())
    for field in dataclasses.fields(run.finetuning):
        value = getattr(run.finetuning, field.name)
        resolved["finetuning"][field.name] = value.value if isinstance(value, Enum) else value
    about = provenance(
        composed.words,
        seed=run.trainer.seed,
        template=template.describe(),
        base={key: model_config[key] for key in SHAPE if key in model_config},
        data=data.about(),
    )
    if resumes:
        before = folder.provenance()
        about = {
            **about,
            "started": before.get("started", about["started"]),
            "resumed": [*before.get("resumed", []), about["started"]],
        }
    write_text(folder / CONFIG, OmegaConf.to_yaml(without_secrets(OmegaConf.create(resolved))))
    write_text(folder / WORDS, "".join(f"{word}\n" for word in shown_words(composed.words)))
    write_json(folder / PROVENANCE, about)
    if "jinja" in about["template"]:
        write_text(folder / TEMPLATE, about["template"]["jinja"])


def show_plan(
    run: Run, folder: RunFolder, model: "nn.Module", data: "Datasets", trainer: "GlmTrainer", device: "torch.device"
) -> None:
    """The short table of what will run."""
    from glmtuner.data.segments import Packs
    from glmtuner.throughput import size_of

    arguments, trained_on = trainer.args, trainer.train_dataset

    total = sum(map(size_of, model.parameters()))
    trained = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
    rows = [("model", f"{run.model.model_name_or_path} ({run.model.family}), {total:,} parameters")]
    rows += [("data", f"{part.spec.name}: {part.counts.told()}") for part in data.prepared]
    if run.data.mix_probabilities and data.train is not None:
        rows.append(("mix", ", ".join(f"{name} {share:.1%}" for name, share in data.shares.items())))
    if data.evaluation is not None:
        rows.append(("evaluation", f"{len(data.evaluation):,} records"))
    if data.train is not None:
        rows.append(("method", f"{run.finetuning.finetuning_type}: {trained:,} of them trained, {trained / total:.4%}"))
        kind = "records"
        if isinstance(trained_on, Packs):
            filled = sum(trained_on.lengths) / (len(trained_on) * trained_on.capacity)
            rows.append(("packed", f"{len(trained_on):,} rows of {trained_on.capacity:,} tokens, {filled:.1%} full"))
            kind = "packed rows"
        rows.append(("steps", steps_told(arguments, len(trained_on), kind)))
    precision = (
        "bf16"
        if arguments.bf16
        else "fp16"
        if arguments.fp16
        else str(next(model.parameters()).dtype).removeprefix("torch.")
    )
    rows.append(("device", f"{device}, {precision}"))
    rows.append(("run folder", str(folder.path)))
    table("", ("", ""), rows, show_header=False)


def steps_told(arguments: Any, records: int, kind: str) -> str:
    world = max(arguments.world_size, 1)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * world
    an_epoch = max(
        math.ceil(
            math.ceil(records / world / arguments.per_device_train_batch_size) / arguments.gradient_accumulation_steps
        ),
        1,
    )
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)
    return f"{steps:,} of {batch} {kind}, {steps / an_epoch:g} epochs"


# -- training, evaluation, prediction ------------------------------------------------------------------------------------


def make_trainer(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    template: Any,
    data: "Datasets",
    arguments: Any,
    objective: "Objective | None",
) -> "GlmTrainer":
    from glmtuner.trainer import GlmTrainer

    arguments.remove_unused_columns = False  # a batch is made of all columns, whatever a model's forward is called with
    generates = run.trainer.predict_with_generate and data.evaluation is not None

    def score(step: int) -> dict[str, float]:
        return answer_all(run, folder, model, tokenizer, template, data, folder / EVALUATIONS / f"step-{step}.jsonl")

    return GlmTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation.select_columns(list(data.columns)) if data.evaluation is not None else None,
        data_collator=run.stage.collator(
            pad_id=tokenizer.pad_token_id, ignore_pad_token_for_loss=run.data.ignore_pad_token_for_loss
        ),
        finetuning=run.finetuning,
        tracker=run.tracker,
        folder=folder,
        score=score if generates else None,
        sharded=run.parallel.sharded and ranks.world_size() > 1,
        objective=objective,
        derived=run.stage.derived,
    )


def may_take(run: Run) -> dict[str, bool]:
    """What of `fast_paths` the run allows."""
    plain = run.stage.models_loss
    return {
        "without_padding": plain and run.data.padding_free and run.data.ignore_pad_token_for_loss,
        "on_weights": plain and run.parallel.whole_modules,
    }


def speed_up(run: Run, trainer: "GlmTrainer", data: "Datasets", blocks: "list[nn.Module]") -> None:
    """Batches without padding, packs and a loss in chunks, where the model's loss stays what it is; kernels, compiled blocks."""
    from glmtuner.data.segments import Packs
    from glmtuner.fast_paths import fast_paths, short_samples, take_liger

    rows = data.train if data.train is not None else data.evaluation
    plain, autocast = trainer.data_collator, trainer.accelerator.autocast
    samples = short_samples(rows) if rows is not None and run.stage.models_loss else []
    kernels = (run.trainer.liger_kernel_config or {}) if run.trainer.use_liger_kernel else {}
    if run.trainer.use_liger_kernel:
        take_liger(trainer.model, kernels, samples, plain, autocast)
    if run.trainer.torch_compile:
        options = {"backend": run.trainer.torch_compile_backend, "mode": run.trainer.torch_compile_mode}
        for block in blocks:
            block.compile(dynamic=True, **{name: value for name, value in options.items() if value})
    if not samples:
        return
    own_loss = not kernels.get("fused_linear_cross_entropy")  # Liger's, where it was chosen
    taken = fast_paths(trainer.model, samples, plain, autocast=autocast, own_loss=own_loss, **may_take(run))
    trainer.data_collator, trainer.chunks_loss = taken.collate, taken.chunks_loss
    for reason in taken.refused:
        say(f"computed the plain way, {reason}")
    if not run.data.packing or data.train is None:
        return
    if taken.collate is plain:
        say(
            "data.packing=true: this model's samples see each other in one row; batches of similar length "
            "(trainer.train_sampling_strategy=group_by_length) are used in its place"
        )
        trainer.args.train_sampling_strategy = "group_by_length"
        return
    trainer.train_dataset = Packs(data.train, run.data.max_source_length + run.data.max_target_length)
    if trainer.args.train_sampling_strategy == "group_by_length":
        trainer.args.train_sampling_strategy = "random"  # packs are all but equally long


def train(
    run: Run,
    folder: RunFolder,
    trainer: "GlmTrainer",
    tokenizer: "PreTrainedTokenizerBase",
    data: "Datasets",
    resumes: bool,
) -> dict[str, float]:
    """Train to the end, from the newest whole checkpoint when there is one; save what was trained and read it back."""
    from glmtuner.preflight import check_first_batch
    from glmtuner.trainer import StopWhenAsked

    checkpoint = Path(run.trainer.resume_from_checkpoint) if run.trainer.resume_from_checkpoint else None
    if resumes and checkpoint is None:
        checkpoint, passed = ranks.agreed(lambda: newest_whole(folder.path, ranks.world_size()))
        for sentence in passed:
            say(sentence)
        say(f"resumed from {checkpoint.name}" if checkpoint else "no whole checkpoint yet: started again from step 0")
    if checkpoint is not None:
        refuse_flawed(checkpoint)
        trainer.args.eval_on_start = False
    assert data.train is not None
    collate = trainer.data_collator
    trainer.checkpoint_activations()
    check_first_batch(
        trainer.model,
        collate([trainer.train_dataset[0]]),
        trainer.accelerator.autocast,
        lambda: first_words(trainer.model, tokenizer, data.train[0]),
        trainer.objective.trial if trainer.objective is not None else None,
    )
    with listening() as asked:
        trainer.add_callback(StopWhenAsked(asked))
        out = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if asked.signum is not None and trainer.state.global_step < trainer.state.max_steps:
        run.tracker.abandon(preempted=True)
        raise asked.preempted(trainer.state.global_step)
    save_trained(run, folder, trainer.model, tokenizer, trainer.objective)
    return numbers(out.metrics)


def refuse_flawed(checkpoint: Path) -> None:
    from glmtuner.run_folder import flaw

    reason = flaw(checkpoint, ranks.world_size()) if checkpoint.is_dir() else "no such folder"
    if reason:
        raise CheckpointError(
            f"trainer.resume_from_checkpoint={checkpoint} cannot be resumed from: {reason}; name another checkpoint, or leave "
            "it out: the same command with the same trainer.output_dir takes the newest whole one"
        )


def first_words(model: "nn.Module", tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, Any]) -> None:
    """Generate two tokens: a model that trains and cannot generate is found out now, not at the end."""
    from glmtuner.generate import Decoding, answers

    labels = row.get("labels", [-100] * len(row["input_ids"]))
    prompt = [token for token, label in zip(row["input_ids"], labels, strict=True) if label < 0]
    decoding = Decoding(
        max_new_tokens=2, num_beams=1, repetition_penalty=1.0, stop_ids=(), pad_id=tokenizer.pad_token_id
    )
    list(answers(model, [prompt or row["input_ids"][:1]], decoding, batch_size=1))


def save_trained(
    run: Run,
    folder: RunFolder,
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerBase",
    objective: "Objective | None",
) -> None:
    """Write adapter/ or model/ whole or not at all, and compare what was written with what was trained (CET#262)."""
    from glmtuner.finetuning.trained import digest_of, gathered

    final = folder / run.finetuning.saved_as
    partial = final.with_name(f".{final.name}.partial")
    with gathered(model, everything=run.finetuning.saved_as == "model"):
        if ranks.is_main():
            shutil.rmtree(partial, ignore_errors=True)
            run.finetuning.save(model, partial)
            tokenizer.save_pretrained(partial)
            if objective is not None:
                objective.save(partial)
            trained = digest_of(model)
            run.finetuning.restore(model, partial)
            if digest_of(model) != trained:
                raise CheckpointError(
                    f"what was written to {partial} is not what was trained; is the disk full or failing?"
                )
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
    ranks.meet()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def finish(run: Run, folder: RunFolder, trainer: "GlmTrainer", metrics: dict[str, float]) -> dict[str, float]:
    """Pictures, the report, and metrics.json last: with it the run counts as finished."""
    from glmtuner.report import draw_loss, show_results, write_run

    metrics |= trainer.resources()
    if not ranks.is_main():
        return metrics
    if run.model.plot_loss and run.trainer.do_train:
        draw_loss(folder)
    closing = run.tracker.finish(folder.path, metrics)
    write_run(folder, metrics)
    write_json(folder / METRICS, metrics)
    show_results(folder)
    if closing:
        say(closing)
    return metrics
