"""An engine in one line, for whoever plans a run."""

from __future__ import annotations

from training.engines import EngineError
from training.engines.service import Service
from training.sections import Rollout

SOON = 5.0  # seconds that a server may take to say that it is there


def describe(rollout: Rollout) -> str:
    """Who draws the responses of a run, and whether the server answers where there is one."""
    if rollout.engine == "transformers":
        return "transformers, in the process of the run"
    if rollout.start:
        return f"vllm, a server that is started with {rollout.python}"
    try:
        version = Service(rollout.url, SOON).call("GET", "/version")["version"]
    except EngineError as error:
        return f"vllm; {error}"
    return f"vllm {version} at {rollout.url}, which answers"
