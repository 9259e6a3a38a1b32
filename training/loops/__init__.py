"""The three loops under every stage: next-token training, sampling, GRPO."""
