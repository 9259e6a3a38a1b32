"""A stand-in for a vLLM server: its routes, its versions, its way of reading weights, and answers that the real one gave.

`recording.vllm.json` holds what vLLM answered to the conversation of `talk`; this makes it again, where `make vllm` was run:

    python -m tests.support.vllm_stand_in

Its token ids are those of `TOKENIZER`, a tokenizer in a folder beside it, whatever words the tasks have.

Answers are found by the weights that the server has at that time, in the way that the real one has them: a tensor that is
left out of an update stays what it was. With `computes`, transformers answers what the recording does not hold. The other
arguments are faults.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from training import checkpoint, seeding
from training.engines import Output, Request, SamplingParams, server
from training.engines.describe import describe
from training.engines.service import Refused, Service
from training.engines.transformers import TransformersEngine
from training.engines.vllm import VllmEngine
from training.engines.workspace import workspace_in
from training.model import prepare
from training.sections import Rollout

RECORDING = Path(__file__).with_name("recording.vllm.json")
TOKENIZER = checkpoint.load_tokenizer(Path(__file__).with_name("recording.tokenizer"))
PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
PROMPTS = ((1, 40, 41, 42), (1, 50, 60, 70, 80, 90, 100), (1, 200))
WAYS = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=20),
    SamplingParams(temperature=0.0),
)
UPDATES = 3
LENGTH = 8  # tokens of a response in the recording
NO_TOKENIZER = {
    "error": {
        "message": "Tokenizer not available when `skip_tokenizer_init=True`",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }
}


def policy(tokenizer: Any = TOKENIZER) -> Any:
    """A small Qwen2 model with tied embeddings, of a size that vLLM's attention serves; the same weights on every machine."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=192,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            parameter.add_(1.0 if "norm" in name else 0.0)
    return moved(model, 0, by=0.1)


def moved(model: Any, number: int, by: float = 0.02) -> Any:
    """`model` with every weight moved, in place, as a training step would: a function of the number."""
    draws = seeding.numpy_rng("stand-in", number)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = draws.standard_normal(tuple(parameter.shape), dtype=np.float32)
            parameter.add_(torch.from_numpy(by * noise))
    return model


def requests() -> list[Request]:
    """Two responses to every prompt."""
    return [
        Request(prompt, seeding.key("stand-in", i, number), LENGTH)
        for i, prompt in enumerate(PROMPTS)
        for number in range(2)
    ]


def talk(engine: VllmEngine, model: Any) -> list[list[Output]]:
    """Three updates, and after each the same requests in every way of drawing."""
    drawn = []
    for version in range(1, UPDATES + 1):
        engine.update(moved(model, version), version)
        drawn += [engine.sample(requests(), params) for params in WAYS]
    return drawn


class StandIn:
    """A server in a thread; a context manager. `rollout` is the section of a recipe that names it.

    upstream: a real server, whose answers are recorded. port: 0 takes a free one.
    """

    def __init__(
        self,
        upstream: Service | None = None,
        *,
        port: int = 0,
        computes: bool = False,
        context: int | None = None,
        dies_at: int | None = None,
        forgets: bool = False,
        leaves_out: Sequence[str] = (),
        refuses: dict[str, tuple[int, Any]] | None = None,
        slow: float = 0.0,
        reports: str = "",
        tokens: Any = None,
        vocabulary: int | None = None,
        tells: Sequence[str] = (),
    ) -> None:
        self.upstream, self.computes, self.context, self.dies_at = upstream, computes, context, dies_at
        self.forgets, self.leaves_out, self.refuses = forgets, set(leaves_out), refuses or {}
        self.slow, self.reports, self.tokens, self.vocabulary = slow, reports, tokens, vocabulary
        self.tells = tells  # of "sampling_mask" and "routed_experts", as started with the options for them
        self.recording = {"plain": {}, "weights": []} if upstream else json.loads(RECORDING.read_text())
        self.version, self.paused, self.drawn = "default", False, 0
        self.seen: list[str] = []  # the calls, in order
        self.weights: dict[str, torch.Tensor] = {}
        self.folder: Path | None = None
        self._model: Any = None
        self._lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def rollout(self) -> Rollout:
        return Rollout(engine="vllm", url=self.url, timeout=60.0)

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops listening, as a server that has died."""
        self._http.shutdown()
        self._http.server_close()

    # Answers

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any] | None:
        """Status and answer of a call; None: the server dies."""
        route = path.partition("?")[0]
        with self._lock:
            self.seen.append(route)
            if route in self.refuses:
                return self.refuses[route]
            if route == "/inference/v1/generate":
                self.drawn += 1
                if self.dies_at is not None and self.drawn >= self.dies_at:
                    return None
                assert not self.paused, "a request to a paused server waits forever"
        if route == "/inference/v1/generate":
            time.sleep(self.slow)
            return self._generate(body)
        if route == "/collective_rpc":
            return self._reload(body)
        if route == "/health":
            return 200, None
        if route in ("/version", "/v1/models", "/tokenize"):
            return self._plain(method, route, body)
        return self._state(method, path, route, body)

    def _state(self, method: str, path: str, route: str, body: Any) -> tuple[int, Any]:
        """Pausing, versions and the cache, which are simple enough to be had here."""
        if self.upstream is not None:
            self.upstream.call(method, path, body)
        if route == "/pause":
            self.paused = True
            return 200, {"status": "paused"}
        if route == "/resume":
            self.paused = False
            return 200, {"status": "resumed"}
        if route == "/reset_prefix_cache":
            return 200, {"success": True}
        if route == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if route == "/weight_info":
            return 200, {"weight_version": self.reports or self.version}
        return 404, {"detail": "Not Found"}

    def _plain(self, method: str, route: str, body: Any) -> tuple[int, Any]:
        """What does not depend on weights."""
        key = f"{method} {route}"
        if self.upstream is not None:
            self.recording["plain"][key] = self.upstream.call(method, route, body)
        if route == "/tokenize" and self.upstream is None and self.tokens is None:
            return 400, NO_TOKENIZER
        found = json.loads(json.dumps(self.recording["plain"][key]))
        if route == "/tokenize" and self.tokens is not None:
            found |= self.tokens
        if route == "/v1/models" and self.context is not None:
            found["data"][0]["max_model_len"] = self.context
        return 200, found

    def _reload(self, body: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights" and self.paused
        self.folder, self._model = Path(body["kwargs"]["weights_path"]), None
        (file,) = self.folder.glob("*.safetensors")
        tensors = load_file(file)
        read = {name: tensor for name, tensor in tensors.items() if name not in self.leaves_out}
        if not self.forgets:
            self.weights |= read
        if self.upstream is not None:
            if self.leaves_out:
                save_file(read, file, metadata={"format": "pt"})
            self.upstream.call("POST", "/collective_rpc", body)
        return 200, {"results": [None]}

    def _generate(self, body: Any) -> tuple[int, Any]:
        params = body["sampling_params"]
        if "sampling_mask" in self.tells:
            if params["temperature"] <= 0 or params.get("top_k", 0) <= 0:
                return 400, {"error": {"message": "sampling distribution replay requires top_k > 0"}}
            if "allowed_token_ids" in params:
                del params["top_k"]  # it changes nothing where one token is allowed
        if self.vocabulary is not None and "allowed_token_ids" in params:
            (token,) = params["allowed_token_ids"]
            edge = policy().config.vocab_size
            body["sampling_params"]["allowed_token_ids"] = [edge - (token < self.vocabulary)]
        # the probability of a token that alone is allowed does not depend on weights
        known = self._known({} if "allowed_token_ids" in params else self.weights)
        key = json.dumps(body, sort_keys=True)
        if self.upstream is not None:
            try:
                known[key] = [200, self.upstream.call("POST", "/inference/v1/generate", body)]
            except Refused as refused:
                known[key] = [refused.status, {"error": {"message": str(refused).partition("): ")[2]}}]
        if key not in known:
            if not self.computes:
                return 500, {"error": {"message": f"not recorded: {key}"}}
            with self._lock:  # a model serves one pass at a time
                return 200, self._computed(body)
        status, found = json.loads(json.dumps(known[key]))
        for choice in found.get("choices", []):
            choice["weight_versions"][0]["version"] = self.version
        return status, found

    def _known(self, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The recorded answers of a server with these weights."""
        mark = {name: _mark(tensor) for name, tensor in weights.items()}
        for entry in self.recording["weights"]:
            if entry["mark"].keys() == mark.keys() and all(
                abs(entry["mark"][name] - value) < 1e-3 for name, value in mark.items()
            ):
                return entry["answers"]
        entry = {"mark": mark, "answers": {}}
        with self._lock:
            self.recording["weights"].append(entry)
        return entry["answers"]

    def _computed(self, body: Any) -> Any:
        """The answer of transformers with the weights that the server has."""
        ids, params = body["token_ids"], body["sampling_params"]
        model = self._model = self._model or self._loaded()
        if "prompt_logprobs" in params:
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            told = [
                {str(token): {"logprob": float(row[token])}} for token, row in zip(ids[1:], logp, strict=True)
            ]
            return {"prompt_logprobs": [None, *told], "choices": []}
        ways = SamplingParams(
            params["temperature"], params["top_p"], params["top_k"], tuple(params["stop_token_ids"]),
            record_routing="routed_experts" in self.tells, record_kept="sampling_mask" in self.tells,
        )  # fmt: skip
        engine = TransformersEngine(model, TOKENIZER)
        (drawn,) = engine.sample([Request(tuple(ids), params["seed"], params["max_tokens"])], ways)
        choice = {
            "finish_reason": "stop" if drawn.finished else "length",
            "token_ids": list(drawn.token_ids),
            "weight_versions": [{"version": self.version, "start": 0, "end": len(drawn.token_ids)}],
            "logprobs": {"content": [{"logprob": each} for each in drawn.logp]},
        }
        if "sampling_mask" in self.tells:
            everything = list(range(model.config.vocab_size))
            choice["sampling_mask"] = [
                drawn.kept.of(token).tolist() or everything for token in range(len(drawn.token_ids))
            ]
        if drawn.routing is not None:  # of the layers of the model, the first of which has no experts
            layers = torch.cat((torch.zeros_like(drawn.routing[:1]), drawn.routing))
            held = io.BytesIO()
            np.save(held, layers.transpose(0, 1).numpy().astype(np.uint8))
            choice["routed_experts"] = base64.b64encode(held.getvalue()).decode()
        return {"choices": [choice]}

    def _loaded(self) -> Any:
        """The model of transformers with the weights that the server has."""
        assert self.folder is not None
        with tempfile.TemporaryDirectory() as scratch:
            save_file(self.weights, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
            shutil.copy(self.folder / "config.json", scratch)
            return prepare(AutoModelForCausalLM.from_pretrained(scratch).eval())


def _mark(tensor: torch.Tensor) -> float:
    """A number that tells one tensor from another of its shape."""
    flat = tensor.double().flatten()
    return float(flat @ torch.arange(1, len(flat) + 1).cos().double()) / len(flat) ** 0.5


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._do("GET")

        def do_POST(self) -> None:
            self._do("POST")

        def _do(self, method: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            found = stand_in.answer(method, self.path, body)
            if found is None:
                threading.Thread(target=stand_in.stop, daemon=True).start()
                self.close_connection = True
                return
            text = json.dumps(found[1]).encode()
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                self.send_response(found[0])
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def record(path: Path = RECORDING) -> None:
    """Asks a real server what `talk` asks, once whole and once with an update that leaves out one tensor."""
    model = policy()
    rollout = Rollout(engine="vllm", start=True, python=str(PYTHON))
    # with a tokenizer, for its route
    server.OPTIONS = tuple(each for each in server.OPTIONS if each != "--skip-tokenizer-init")  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint.save_model(model, TOKENIZER, folder / "model")
        real = server.Server(rollout, folder / "model", folder / "log", None)
        try:
            with StandIn(real.service) as recorder, workspace_in(folder):
                describe(recorder.rollout)
                engine = VllmEngine(recorder.rollout, model, TOKENIZER)
                talk(engine, model)
                recorder.leaves_out = {LEFT_OUT}
                try:
                    engine.update(moved(model, UPDATES + 1), UPDATES + 1)
                except Exception as error:
                    print(error)
                path.write_text(json.dumps(_short(recorder.recording), separators=(",", ":")) + "\n")
        finally:
            real.stop()


LEFT_OUT = "model.norm.weight"


def _short(value: Any) -> Any:
    """A recording without the fields that hold nothing."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items() if each is not None and key not in SKIPPED}
    return [_short(each) for each in value] if isinstance(value, list) else value


SKIPPED = ("top_logprobs", "usage", "permission", "root", "created", "request_id")

if __name__ == "__main__":
    torch.set_num_threads(1)
    record()
