"""A reward that knows nothing: heads or tails for each response, for the control of random rewards (recipe tiny-controls)."""

import hashlib

from training.rewards import Sample


def coin(sample: Sample) -> int:
    """1 or 0 by the hash of problem, sample and tokens: a resumed run tosses alike, equal texts of a group do not."""
    tossed = f"{sample.problem.id} {sample.sample_id} {sample.token_ids}"
    return hashlib.sha256(tossed.encode()).digest()[0] % 2
