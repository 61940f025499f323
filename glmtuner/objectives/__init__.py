"""Losses of the stages that do not train on the model's own loss; one file per stage, imported when it trains."""
