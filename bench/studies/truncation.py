"""What truncated sampling does to the importance ratios of GRPO, without kept sets and with them.

R1-Zero of the recipe `smoke` draws at top-p 0.9 and takes the sampler's log-probs as old ones. Without kept sets the policy scores a
token in the whole vocabulary: every ratio is off by the probability that the sampler kept (huggingface/trl#6789).
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

from training import engines, pipeline
from training.engines import Output, Request, SamplingParams
from training.engines.transformers import TransformersEngine
from training.progress import Progress
from training.recipe import load
from training.run_dir import RunDir

from ..table import Table

STEPS, TOP_P = 40, 0.9
WITHOUT, WITH = "without kept sets", "with kept sets"
SHOWN = ("ratio_mean", "sampler_gap", "reward", "entropy")
WORDS = (f"zero.top_p={TOP_P}", "zero.old_logprobs=sampler", "zero.minibatches=1", "zero.prompts=16")


class _Forgetful(TransformersEngine):
    """Draws from the likeliest tokens, and does not say which these were."""

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Output]:
        return [replace(each, kept=None) for each in super().sample(requests, params)]


def measure(tiny: bool = False) -> dict[str, Any]:
    """The metrics of both runs, which begin with the same checkpoint."""
    steps, shorter = (2, ["base.steps=5"]) if tiny else (STEPS, [])
    quiet = Progress(quiet=True)
    runs = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = RunDir(Path(scratch) / "base")
        pipeline.run(load("smoke", ["stages=[base]", *shorter]), base, progress=quiet)
        (start,) = base.stage("base").checkpoints().values()
        for name, engine in ((WITHOUT, _Forgetful), (WITH, TransformersEngine)):
            folder = RunDir(Path(scratch) / name.replace(" ", "_"))
            recipe = load("smoke", ["stages=[zero]", f"zero.start={start}", f"zero.steps={steps}", *WORDS])
            recipe.rollout.max_gap = math.inf
            with patch.object(engines, "connect", lambda _, *model, engine=engine: engine(*model)):
                pipeline.run(recipe, folder, progress=quiet)
            rows = folder.stage("zero").metrics()
            runs[name] = {key: [row[key] for row in rows] for key in SHOWN}
    return {"recipe": "smoke", "words": [f"zero.steps={steps}", *WORDS], "runs": runs}


def tables(record: Mapping[str, Any]) -> list[Table]:
    """The means of both runs, in a sentence."""
    means = {name: fmean(run["ratio_mean"]) for name, run in record["runs"].items()}
    note = (
        f"Over {len(record['runs'][WITH]['ratio_mean'])} steps the mean ratio before an update is {means[WITHOUT]:.3f} "
        f"{WITHOUT} and {means[WITH]:.6f} {WITH}."
    )
    return [Table("Importance ratios", (), note=note)]
