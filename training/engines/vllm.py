"""The engine behind a vLLM server: prompts and responses travel over HTTP as token ids, weights as a folder.

Tried with vLLM 0.32. An update writes the weights aside, pauses the server, has it read them again, clears its prefix
cache, names the version and resumes. Then the server must report that version, and its log-probs of a probe must be the
trainer's own. The first update is one with scrambled weights (`weights.scrambled`), so that a tensor that never arrives shows
before the first step.
"""

from __future__ import annotations

import base64
import io
import re
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1kernels.integrations import transformers as integration
from training import files
from training.encoder import Encoder
from training.engines import EngineError, Kept, Output, Request, SamplingParams, weights
from training.engines.server import Server, check_python
from training.engines.service import Refused, Service
from training.engines.workspace import Workspace, current_workspace
from training.model import is_patched
from training.sections import Rollout

PROBE = 64  # tokens of a probe
TOLD = "what is 1 + 2 ? Why ?"  # a text whose tokens any tokenizer has
# Entries of a config that transformers sets when it saves a model: they tell nothing about its sizes.
WRITTEN = ("architectures", "dtype", "transformers_version", "_name_or_path")
REPLAY = "sampling distribution replay"  # of a server that tells kept sets, where a request has none or an unbounded one
_NUMBER = re.compile(r"\.(\d+)\.")
UNKNOWN = -1  # version of weights that this engine did not hand over

_handed: set[str] = set()  # names of all versions that engines of this process gave to servers


class VllmEngine:
    """An `Engine` whose model is a copy inside of a server."""

    def __init__(
        self,
        rollout: Rollout,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        version: int = 0,
    ) -> None:
        """Reaches or starts the server of `rollout`, checks that it fits the model, and hands the weights over.

        Raises:
            EngineError: the server is absent, serves another model, or does not take the weights.
        """
        self.encoder = Encoder(model, tokenizer)
        self.version = version
        self._rollout, self._model = rollout, model
        self._dtype: torch.dtype = getattr(torch, rollout.dtype)
        self._identity = uuid.uuid4().hex[:8]  # versions of another run are not taken for ours
        self._name = ""
        self._bounded = False  # the server takes requests with a top_k alone
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._workspace = stack.enter_context(current_workspace())
            self._service = self._started(self._workspace) if rollout.start else self._found()
            self._context = self._examine()
            with weights.scrambled(model):
                self._hand_over("proof")
            self.update(model, version)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Gives up the server; one that was started outside of a stage is stopped."""
        self._stack.close()

    def update(self, model: PreTrainedModel, version: int) -> None:
        """Hands the weights of `model` over and checks that the server computes with them."""
        self._model, self.version = model, version
        if self._name != self._named(str(version)):  # the first step asks for what the engine has begun with
            self._hand_over(str(version))

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> list[Output]:
        """One output per request, in order; each is a call of its own with the seed of its key."""
        if not requests:
            return []
        self._hold()
        pool = ThreadPoolExecutor(min(params.batch_size, len(requests)))
        drawn: list[Future[Output]] = []
        try:
            drawn += (pool.submit(self._draw, request, params) for request in requests)
            done, _ = wait(drawn, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
            return [each.result() for each in drawn]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(
                each.done() for each in drawn
            ):  # one that was about to ask is met by the next round
                self._service.hang_up()
                time.sleep(0.02)
            raise
        finally:
            pool.shutdown()

    # One response

    def _draw(self, request: Request, params: SamplingParams) -> Output:
        length = len(request.prompt_ids)
        # the last token of a response is not read, but vLLM counts it
        if length + request.max_new_tokens - 1 > self._context or length >= self._context:
            raise EngineError(
                f"{self._service.url} reads {self._context} tokens, and a prompt of {length} with a response of "
                f"{request.max_new_tokens} is asked: start it with a longer --max-model-len"
            )
        answer = self._generate(
            request.prompt_ids,
            max_tokens=min(request.max_new_tokens, self._context - length),
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            seed=request.key,
            stop_token_ids=list(params.stop_ids),
            logprobs=0,
        )
        (choice,) = answer["choices"]
        ids = tuple(choice["token_ids"])
        if choice["finish_reason"] not in ("stop", "length") or not ids:
            raise EngineError(
                f"{self._service.url} broke a response off ({choice['finish_reason']}): run the same command again, which "
                "draws the step again"
            )
        logp = tuple(each["logprob"] for each in choice["logprobs"]["content"])
        return Output(
            ids,
            (0.0,) * len(ids) if params.temperature == 0 else logp,
            ids[-1] in params.stop_ids,
            min((self._version(span["version"]) for span in choice["weight_versions"]), default=UNKNOWN),
            self._routing(choice.get("routed_experts")) if params.record_routing else None,
            self._kept(choice.get("sampling_mask"), ids) if params.record_kept and params.truncated else None,
        )

    def _routing(self, told: str | None) -> Tensor | None:
        """The experts that a server with --enable-return-routed-experts tells: an array of NumPy (tokens, layers of the model, K)."""
        if told is None or not is_patched(self._model):
            return None
        recorded = np.load(io.BytesIO(base64.b64decode(told))).astype(np.int16)
        # of the layers that have a router, by the number in its name
        layers = [int(*_NUMBER.findall(name)[:1]) for name in integration.router_names(self._model)]
        return torch.from_numpy(recorded[:, layers]).transpose(0, 1)

    def _kept(self, told: list[list[int]] | None, ids: Sequence[int]) -> Kept:
        """The sets that the tokens of a response were drawn from, as the server tells them."""
        if told is None:
            raise EngineError(
                f"{self._service.url} does not tell which tokens top_p and top_k left, so log-probs among them are not known: "
                "start vLLM with --return-sampling-mask, which its Model Runner V2 has, or draw without top_p and top_k"
            )
        if len(told) != len(ids):
            raise EngineError(
                f"{self._service.url} told {len(told)} kept sets for a response of {len(ids)} tokens"
            )
        return Kept.of_sets([torch.tensor(one, dtype=torch.int32) for one in told])

    def _generate(self, ids: Sequence[int], **params: Any) -> Any:
        asked = self._with_bound(params) if self._bounded else params
        body = {
            "token_ids": list(ids),
            "sampling_params": {"ignore_eos": True, "detokenize": False, **asked},
        }
        try:
            return self._service.call("POST", "/inference/v1/generate", body)
        except Refused as refused:
            if self._bounded or REPLAY not in str(refused):
                raise
        self._bounded = True
        return self._generate(ids, **params)

    def _with_bound(self, params: dict[str, Any]) -> dict[str, Any]:
        """The same distribution with a temperature and a top_k above 0."""
        if params["temperature"] == 0:
            return {**params, "temperature": 1.0, "top_k": 1}
        return {**params, "top_k": params.get("top_k") or self._vocabulary}

    def _version(self, name: str) -> int:
        number, _, identity = name.rpartition("-")
        return int(number) if identity == self._identity and number.isdecimal() else UNKNOWN

    # Weights

    def _named(self, version: str) -> str:
        """What the server calls a version of this engine's."""
        return f"{version}-{self._identity}"

    def _hand_over(self, version: str) -> None:
        call, name = self._service.call, self._named(version)
        weights.write(self._model, self._workspace.weights, self._dtype)
        call("POST", "/pause?mode=abort")
        folder = str(self._workspace.weights.resolve())
        call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        if not call("POST", "/reset_prefix_cache")["success"]:
            raise EngineError(f"{self._service.url} keeps its prefix cache over an update: restart it")
        call("POST", "/update_weight_version", {"new_version": name})
        call("POST", "/resume")
        _handed.add(name)
        self._name = name
        reported = self._reported()
        if reported != name:
            raise EngineError(f"{self._service.url} reports weights {reported!r} after an update to {name!r}")
        self._verify(version)

    def _reported(self) -> str:
        reported: str = self._service.call("GET", "/weight_info")["weight_version"]
        return reported

    def _verify(self, version: str) -> None:
        """Raises where the server computes with other weights than the model has."""
        ids = weights.probe_ids(self._vocabulary, min(PROBE, self._context - 1))
        answer = self._generate(ids, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        told = [
            each[str(token)]["logprob"]
            for token, each in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True)
        ]
        gap = float((torch.tensor(told) - weights.logprobs(self._model, ids)).abs().mean())
        if not gap <= self._rollout.tolerance:
            raise EngineError(
                f"{self._service.url} computes with other weights than it was given: its log-probs differ by {gap:.2g} on "
                f"average (rollout.tolerance {self._rollout.tolerance:g}) after "
                + (
                    "the trial update, which changes every tensor"
                    if version == "proof"
                    else f"update {version}"
                )
                + ": it left a tensor out, has another model, or read an old folder"
            )

    def _hold(self) -> None:
        """Makes sure that the server has this engine's weights; another engine of the process may have given it its own."""
        reported = self._reported()
        if reported == self._name:
            return
        if reported not in _handed:
            raise EngineError(
                f"{self._service.url} has weights {reported!r}, not {self._name!r}: it was started again or serves someone else "
                "too; run the same command again"
            )
        self._hand_over(str(self.version))

    # The server

    @property
    def _vocabulary(self) -> int:
        size: int = self._model.config.get_text_config().vocab_size
        return size

    def _found(self) -> Service:
        return Service(self._rollout.url, self._rollout.timeout)

    def _started(self, workspace: Workspace) -> Service:
        """The server of the stage, started where there is none for a model of these sizes."""
        config = {k: v for k, v in self._model.config.to_dict().items() if k not in WRITTEN}
        wanted = files.value_hash([str(config), self._rollout.options, self._rollout.dtype])
        if workspace.server is None or workspace.serves != wanted or not workspace.server.alive:
            workspace.stop()
            check_python(self._rollout.python)
            weights.write(self._model, workspace.weights, self._dtype)
            workspace.server = Server(self._rollout, workspace.weights, workspace.log, self.encoder.positions)
            workspace.serves = wanted
        return workspace.server.service

    def _examine(self) -> int:
        """The context of the server in tokens, after checks that it can serve this model at all."""
        call, url = self._service.call, self._service.url
        try:
            call("POST", "/resume")  # an update that was cut off leaves a server paused
            self._reported()
        except Refused as refused:
            if refused.status != 404:
                raise
            raise EngineError(f"{url} takes no weights: start vLLM with VLLM_SERVER_DEV_MODE=1") from None
        context: int = call("GET", "/v1/models")["data"][0]["max_model_len"]
        last = self._vocabulary - 1
        if not self._knows(last) or self._knows(last + 1):
            raise EngineError(
                f"{url} serves a model with another vocabulary than the {last + 1} entries of this one: start it with the "
                "model of the run"
            )
        self._compare_tokenizer()
        return context

    def _knows(self, token: int) -> bool:
        """Whether the token is in the server's vocabulary; vLLM checks allowed ids, and dies of a prompt's."""
        try:
            answer = self._generate([0], max_tokens=1, temperature=1.0, logprobs=0, allowed_token_ids=[token])
        except Refused as refused:
            if refused.status == 403:
                raise EngineError(
                    f"{self._service.url} takes no token ids: start vLLM with --enable-scale-out"
                ) from None
            if refused.status != 400:
                raise
            return False
        # of one token that is allowed the probability is 1
        if answer["choices"][0]["logprobs"]["content"][0]["logprob"] != 0:
            raise EngineError(
                f"{self._service.url} tells log-probs of another distribution than it draws from: start vLLM with "
                "--logprobs-mode processed_logprobs"
            )
        return True

    def _compare_tokenizer(self) -> None:
        """Raises where the server has a tokenizer, and it names token ids otherwise."""
        body = {"prompt": TOLD, "add_special_tokens": False, "return_token_strs": True}
        try:
            answer = self._service.call("POST", "/tokenize", body)
        except Refused:
            return  # it was started without one: token ids alone travel
        own = self.encoder.tokenizer.convert_ids_to_tokens(answer["tokens"])
        for token, theirs, ours in zip(answer["tokens"], answer["token_strs"], own, strict=True):
            if theirs != ours:
                raise EngineError(
                    f"{self._service.url} has another tokenizer: token {token} is {theirs!r} there and {ours!r} here"
                )
