"""A vLLM server of the run's own: it is started for a model, serves this machine alone and is stopped by what started it."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from training.engines import EngineError, tether
from training.engines.service import Service
from training.errors import UserError
from training.sections import Rollout

# Development routes hand over weights; nothing is downloaded and nothing is told to anyone.
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
CACHE_GIB = "1"  # of keys and values on a CPU, where the environment names no other size
# pydantic tells what is wrong in the line behind its error
_ERROR = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception): .+(?:\n\s+Value error, .+?(?= \[type=))?")
OPTIONS = ("--enable-scale-out", "--skip-tokenizer-init", "--logprobs-mode", "processed_logprobs")


class Server:
    """A running server: `service` speaks to it, `stop` ends it."""

    def __init__(self, rollout: Rollout, folder: Path, log: Path, max_length: int | None) -> None:
        """Starts vLLM with the model of `folder` and waits until it answers.

        Args:
            folder: config.json and weights in safetensors.
            log: the file that the server writes to, behind what is there.
            max_length: tokens of prompt and response together; None: as many as the model's config says.

        Raises:
            EngineError: it does not start, or not within rollout.timeout.
        """
        port = _free_port()
        words = [
            *(rollout.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder.resolve())),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", rollout.dtype, *OPTIONS),
            *(("--max-model-len", str(max_length)) if max_length else ()),
            *(() if torch.cuda.is_available() else ("--enforce-eager",)),  # compiling does not pay on a CPU
            *rollout.options,
        ]
        environment = {"VLLM_CPU_KVCACHE_SPACE": CACHE_GIB, **os.environ, **ENVIRONMENT}
        self._log, self._before = log, log.stat().st_size if log.is_file() else 0
        self.service = Service(f"http://127.0.0.1:{port}", rollout.timeout, str(log))
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, tether.__file__, *words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C of a terminal is the run's alone, which then stops its server
            )
        try:
            self._wait(rollout.timeout)
        except BaseException:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the server and everything that it has started, and waits for that."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if not self.alive:
                raise EngineError(f"vLLM did not start: {self._reason()}; its log is {self._log}")
            with contextlib.suppress(EngineError):  # it does not listen yet
                self.service.call("GET", "/health")
                return
            time.sleep(0.5)
        raise EngineError(
            f"vLLM did not start within {timeout:g} s (rollout.timeout); its log is {self._log}"
        )

    def _reason(self) -> str:
        """The first error that the server wrote: those behind it tell what became of it."""
        text = self._log.read_bytes()[self._before :].decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if "WARNING" not in line]
        found = _ERROR.search("\n".join(lines))
        return " ".join(found.group().split()) if found else "it names no error"


def check_python(path: str) -> None:
    """Raises a UserError where there is no Python that could have vLLM."""
    if not Path(path).is_file():
        raise UserError(f"rollout.python: there is no {path}: `make vllm` makes an environment with vLLM")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
