"""The DeepSeek-R1 training pipeline, stage by stage: `python -m training run`."""
