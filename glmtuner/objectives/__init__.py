"""What the stages minimize where it is not the model's own loss; one file a stage, imported when it trains."""
