"""Checks of the optimizer: its package, its arguments, and the arguments that it ignores, without importing torch."""

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from glmtuner.config.trainer_arguments import TrainerArguments
from glmtuner.errors import did_you_mean

BITSANDBYTES = (
    "adamw_bnb_8bit", "adamw_8bit", "ademamix", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
GALORE = (
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
)  # fmt: skip
APOLLO = ("apollo_adamw", "apollo_adamw_layerwise")
TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")
LOMO = ("lomo", "adalomo")
SHORT_NAMES = {"galore": "galore_adamw", "apollo": "apollo_adamw", "schedule_free": "schedule_free_adamw"}
OWN = ("muon", "adam_mini")  # which transformers does not make
# Optimizers whose state is not in a checkpoint, so that a resumed run would silently be another one; what to type instead.
WITHOUT_STATE = {
    **{name: name.removesuffix("_layerwise") for name in (*GALORE, *APOLLO) if name.endswith("_layerwise")},
    "adalomo": "adafactor",
    "grokadamw": "adamw_torch",
}
# Optimizers that need whole matrices, or their own copy of every weight, which strategies with shards do not have, or whose step does not
# take shards: bitsandbytes' kernels, and the row and column means of transformers' Adafactor.
WHOLE_WEIGHTS = (*OWN, *GALORE, *APOLLO, *SCHEDULE_FREE, *BITSANDBYTES, "adafactor")
# The module that an optimizer needs besides torch, and how it is installed.
PACKAGES: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(BITSANDBYTES, ("bitsandbytes", "pip install bitsandbytes")),
    **dict.fromkeys(GALORE, ("galore_torch", "pip install galore-torch")),
    **dict.fromkeys(APOLLO, ("apollo_torch", "pip install apollo-torch")),
    **dict.fromkeys(TORCHAO, ("torchao", "pip install torchao")),
    **dict.fromkeys(SCHEDULE_FREE, ("schedulefree", "pip install schedulefree")),
    **dict.fromkeys(LOMO, ("lomo_optim", "pip install lomo-optim")),
    "adam_mini": ("adam_mini", "pip install adam-mini"),
    "grokadamw": ("grokadamw", "pip install grokadamw"),
    "stable_adamw": ("optimi", "pip install torch-optimi"),
    "adamw_torch_xla": ("torch_xla", "pip install torch-xla"),
    "adamw_torch_npu_fused": ("torch_npu", "pip install torch-npu"),
    "adamw_anyprecision": ("torchdistx", "install https://github.com/pytorch/torchdistx"),
}
ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
LOW_RANK = ("rank", "update_proj_gap", "scale", "proj_type")
FREE_ARGUMENTS = ("weight_lr_power", "r")
# What trainer.optim_args may hold; transformers ignores anything else. weight_decay has a key of its own.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **{name: ADEMAMIX for name in BITSANDBYTES if "ademamix" in name},
    **dict.fromkeys(GALORE, LOW_RANK),
    **dict.fromkeys(APOLLO, (*LOW_RANK, "proj", "scale_type")),
    **dict.fromkeys(TORCHAO, ("block_size", "bf16_stochastic_round")),
    **dict.fromkeys(SCHEDULE_FREE, FREE_ARGUMENTS),
    "adamw_anyprecision": ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    "muon": ("momentum", "nesterov", "ns_steps", "adjust_lr_fn"),
}
TRUTHS = ("nesterov", "centered", "bf16_stochastic_round", "use_kahan_summation")
WORDS = ("momentum_dtype", "variance_dtype", "compensation_buffer_dtype")
ONE_OF = {
    "adjust_lr_fn": ("match_rms_adamw", "original"),
    "proj_type": ("std", "reverse_std", "left", "right", "full"),
    "proj": ("random", "svd"),
    "scale_type": ("channel", "tensor"),
}
WHOLE = ("rank", "update_proj_gap", "block_size", "t_alpha", "t_beta3", "ns_steps")
# Optimizers that ignore all of adam_beta1, adam_beta2 and adam_epsilon; Lion ignores adam_epsilon.
WITHOUT_ADAM = (
    "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "adafactor", "schedule_free_sgd",
    "grokadamw", *LOMO, *GALORE,
)  # fmt: skip
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def optimizer_errors(trainer: TrainerArguments) -> Iterator[str]:
    """One sentence for each reason for which the optimizer cannot be built, or would ignore an argument."""
    name = trainer.optim.value
    setting = f"trainer.optim={name}"
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        package, install = PACKAGES[name]
        yield f"{setting}: {package} is not installed; {'type ' if install.startswith('pip') else ''}{install}, or trainer.optim=adamw_torch"
    yield from _argument_errors(trainer.optim_args, name, setting)
    for field, default in ADAM.items():
        ignored = name in WITHOUT_ADAM or ("lion" in name and field == "adam_epsilon")
        value = getattr(trainer, field)
        if ignored and value != default:
            yield f"trainer.{field}={value:g} with {setting}, which has no such argument; leave it out"
    if name in WITHOUT_STATE:
        yield (
            f"{setting}: its state is not in checkpoints, so that a resumed run would silently go on without it; type "
            f"trainer.optim={WITHOUT_STATE[name]}"
        )
    if name == "lomo":
        for field, value, why in (
            ("gradient_accumulation_steps", 1, "which steps within every backward pass"),
            ("weight_decay", 0, "which transformers makes without"),
            ("max_grad_norm", 0, "which has used a gradient before the norm of all is known"),
        ):
            if (given := getattr(trainer, field)) != value:
                yield f"trainer.{field}={given:g} with {setting}, {why}; type trainer.{field}={value}"
    yield from _schedule_free_errors(trainer, name, setting)
    targets = trainer.optim_target_modules
    if name in (*GALORE, *APOLLO):
        if not targets:
            yield f"{setting} needs the layers that it projects; type trainer.optim_target_modules=all-linear"
    elif targets:
        yield f"trainer.optim_target_modules={targets} with {setting}, which is not GaLore's or APOLLO's; leave it out"


def _schedule_free_errors(trainer: TrainerArguments, name: str, setting: str) -> Iterator[str]:
    if name not in SCHEDULE_FREE:
        return
    if (schedule := trainer.lr_scheduler_type.value) != "constant":
        yield (
            f"{setting} with trainer.lr_scheduler_type={schedule}: it takes the place of a schedule; type "
            "trainer.lr_scheduler_type=constant"
        )
    if name == "schedule_free_radam" and trainer.warmup_steps:
        yield f"{setting} with trainer.warmup_steps={trainer.warmup_steps:g}: it needs no warm-up; leave it out"


def optimizer_arguments(text: str | None) -> dict[str, str]:
    """The arguments in trainer.optim_args by name, whose form was checked."""
    parts = (part.partition("=") for part in (text or "").replace(" ", "").split(",") if part)
    return {name: value for name, _, value in parts}


def _argument_errors(text: str | None, name: str, setting: str) -> Iterator[str]:
    legal = ARGUMENTS.get(name, ())
    for part in (text or "").replace(" ", "").split(","):
        if not part:
            continue
        argument, sign, value = part.partition("=")
        knob = f"trainer.optim_args={text}"
        if not sign or not value or "=" in value:
            yield f"{knob}: expected <name>=<value>, separated by commas; type 'trainer.optim_args=\"momentum=0.9\"'"
        elif argument == "weight_decay":
            yield f"{knob}: the weight decay is a key of its own; type trainer.weight_decay={value}"
        elif argument not in legal:
            listed = (
                f"its arguments are {', '.join(legal)}" if legal else "it has no arguments of its own; leave them out"
            )
            yield f"{knob} with {setting}: {argument!r} would be ignored{did_you_mean(argument, legal, listed)}"
        elif (expected := _expected(argument, value)) is not None:
            yield f"{knob} with {setting}: {argument} is {expected}"
    if name == "sgd" and "nesterov=true" in (text or "").replace(" ", "").lower() and "momentum=" not in (text or ""):
        yield f"trainer.optim_args={text} with {setting}: nesterov needs a momentum; type 'trainer.optim_args=\"momentum=0.9,nesterov=true\"'"


def _expected(argument: str, value: str) -> str | None:
    """What an argument takes, if not this value; None for a legal one."""
    if argument in ("kahan_sum", "decouple_lr"):  # transformers reads any text as true
        return None if value.lower() == "true" else "true, or left out"
    if argument in TRUTHS:
        return None if value.lower() in ("true", "false", "1", "0", "yes", "no") else "true or false"
    if argument in ONE_OF:
        return None if value in ONE_OF[argument] else " or ".join(ONE_OF[argument])
    if argument in WORDS:
        return None
    try:
        number = float(value)
    except ValueError:
        return "a number"
    if argument in WHOLE:
        return None if value.isdecimal() and number >= 1 else "a whole number, 1 or more"
    return None if math.isfinite(number) and number >= 0 else "a number, 0 or more"
