"""All presets made known, in one place."""


def register_presets() -> None:
    """Make every method, stage, metric, model family, quantization, tracker and way of several processes known."""
    import glmtuner.families
    import glmtuner.finetuning
    import glmtuner.metrics
    import glmtuner.parallel
    import glmtuner.quant
    import glmtuner.stages
    import glmtuner.trackers  # noqa: F401
