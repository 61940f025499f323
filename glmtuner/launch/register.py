"""Registration of all presets, in one place."""


def register_presets() -> None:
    """Import the modules of all methods, stages, metrics, rewards, model families, quantizations, trackers and parallel strategies."""
    import glmtuner.families
    import glmtuner.finetuning
    import glmtuner.metrics
    import glmtuner.parallel
    import glmtuner.quant
    import glmtuner.rewards
    import glmtuner.stages
    import glmtuner.trackers  # noqa: F401
