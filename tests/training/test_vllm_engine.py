"""The engine behind a vLLM server, against a stand-in that answers as the real one did: updates, versions, every fault."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.support import mixtures
from tests.support.vllm_stand_in import (
    LEFT_OUT,
    LENGTH,
    TOKENIZER,
    UPDATES,
    WAYS,
    StandIn,
    moved,
    policy,
    requests,
    talk,
)
from training.checkpoint import save_model
from training.cli import main
from training.engines import EngineError, Request, SamplingParams, connect, workspace
from training.engines.server import Server
from training.engines.service import Service
from training.engines.transformers import TransformersEngine
from training.files import read_jsonl
from training.model import prepare
from training.sections import Rollout


@pytest.fixture(autouse=True)
def at_home(tmp_path):
    with workspace.workspace_in(tmp_path):
        yield


def reached(stand_in, model=None):
    return connect(stand_in.rollout, model or policy(), TOKENIZER)


def error_of(stand_in, model=None):
    with stand_in, pytest.raises(EngineError) as caught:
        reached(stand_in, model)
    return one_line(caught.value)


def one_line(error):
    assert "\n" not in str(error)
    return str(error)


def own_logprobs(model, output, request, params):
    """The log-prob of every drawn token under the distribution it was drawn from, by its definition."""
    ids = torch.tensor([[*request.prompt_ids, *output.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double() / params.temperature
    if params.top_k:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs, order = logits.softmax(-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= params.top_p, 0)
    kept = torch.zeros_like(logits).scatter(-1, order, probs / probs.sum(-1, keepdim=True))
    return kept[torch.arange(len(output.token_ids)), list(output.token_ids)].log()


def test_after_each_update_the_answers_are_those_of_the_model():
    model = policy()
    with StandIn() as stand_in:
        engine = reached(stand_in, model)
        drawn = talk(engine, model)
    assert len(drawn) == UPDATES * len(WAYS)
    again = policy()
    for version in range(1, UPDATES + 1):
        moved(again, version)
        for params, outputs in zip(WAYS, drawn[(version - 1) * len(WAYS) :], strict=False):
            for request, output in zip(requests(), outputs, strict=True):
                assert output.version == version
                assert 1 <= len(output.token_ids) == len(output.logp) <= LENGTH
                if params.temperature:
                    torch.testing.assert_close(
                        torch.tensor(output.logp, dtype=torch.float64),
                        own_logprobs(again, output, request, params),
                        rtol=0,
                        atol=1e-4,
                    )
                else:
                    ids = torch.tensor([[*request.prompt_ids, *output.token_ids]])
                    with torch.no_grad():
                        best = again(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
                    assert best.tolist() == list(output.token_ids)
                    assert set(output.logp) == {0.0}


def test_an_update_pauses_reads_clears_names_and_resumes():
    with StandIn() as stand_in:
        engine = reached(stand_in)
        stand_in.seen.clear()
        engine.update(moved(policy(), 1), 1)
    assert stand_in.seen == [
        "/pause",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/update_weight_version",
        "/resume",
        "/weight_info",
        "/inference/v1/generate",
    ]


def test_the_trial_update_leaves_the_weights_of_the_policy_as_they_were():
    model = policy()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with StandIn() as stand_in:
        reached(stand_in, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_two_engines_share_a_server_and_each_draws_with_its_own_weights():
    model, other = policy(), moved(policy(), 1)
    with StandIn(computes=True) as stand_in:
        first, second = reached(stand_in, model), reached(stand_in, other)
        asked, ways = [Request((1, 40, 41), 1, 6)], SamplingParams(temperature=0.0)
        found = [engine.sample(asked, ways) for engine in (first, second, first)]
    own = [TransformersEngine(each, TOKENIZER).sample(asked, ways) for each in (model, other, model)]
    assert [drawn[0].token_ids for drawn in found] == [drawn[0].token_ids for drawn in own]


# Updates that are not whole


@pytest.mark.parametrize("name", [LEFT_OUT, "model.layers.1.self_attn.k_proj.bias", "lm_head.weight"])
def test_a_tensor_that_never_arrives_is_found_before_the_first_step(name):
    with StandIn(computes=True) as stand_in:
        reached(stand_in)  # a server has weights before its first update
        stand_in.leaves_out = {name}
        with pytest.raises(
            EngineError, match="trial update, which changes every tensor: it left a tensor out"
        ):
            reached(stand_in)


def test_a_router_bias_that_never_arrives_is_found_before_the_first_step():
    """The bias of a router decides by little which experts a token goes to."""
    model = prepare(mixtures.build("DeepseekV3", vocab_size=len(TOKENIZER), max_position_embeddings=128))
    name = next(name for name in model.state_dict() if name.endswith("e_score_correction_bias"))
    with StandIn(computes=True) as stand_in:
        connect(stand_in.rollout, model, TOKENIZER)
        stand_in.leaves_out = {name}
        with pytest.raises(EngineError, match="left a tensor out"):
            connect(stand_in.rollout, model, TOKENIZER)


TRUNCATED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, record_kept=True)


def test_kept_sets_are_read_from_a_server_that_takes_no_request_without_a_bound():
    model = policy()
    with StandIn(computes=True, tells=["sampling_mask"]) as stand_in:
        engine = reached(stand_in, model)
        found = engine.sample(requests(), TRUNCATED)
        all_of_them = engine.sample(requests(), SamplingParams(top_p=0.8, record_kept=True))
        greedy = engine.sample(requests(), SamplingParams(temperature=0.0))
    own = TransformersEngine(model, TOKENIZER)
    expected = own.sample(requests(), TRUNCATED)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert torch.equal(mine.kept.ids, theirs.kept.ids)
        assert torch.equal(mine.kept.offsets, theirs.kept.offsets)
    for mine, theirs in zip(
        all_of_them, own.sample(requests(), SamplingParams(top_p=0.8, record_kept=True)), strict=True
    ):
        assert mine.token_ids == theirs.token_ids and torch.equal(mine.kept.ids, theirs.kept.ids)
    expected = own.sample(requests(), SamplingParams(temperature=0.0))
    assert [each.token_ids for each in greedy] == [each.token_ids for each in expected]


def test_a_server_that_tells_no_kept_sets_is_named_with_its_option():
    with StandIn(computes=True) as stand_in:
        engine = reached(stand_in)
        assert engine.sample(requests(), replace(TRUNCATED, record_kept=False))
        assert engine.sample(requests(), replace(TRUNCATED, top_p=1.0, top_k=0))[0].kept is None
        with pytest.raises(EngineError, match="start vLLM with --return-sampling-mask") as caught:
            engine.sample(requests(), TRUNCATED)
    one_line(caught.value)


def test_the_experts_that_a_server_chose_are_those_of_the_layers_with_a_router():
    model = prepare(mixtures.build("DeepseekV3", vocab_size=len(TOKENIZER), max_position_embeddings=128))
    params = SamplingParams(record_routing=True)
    with StandIn(computes=True, tells=["routed_experts"]) as stand_in:
        found = connect(stand_in.rollout, model, TOKENIZER).sample(requests(), params)
    expected = TransformersEngine(model, TOKENIZER).sample(requests(), params)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.routing.dtype == torch.int16 and torch.equal(mine.routing, theirs.routing)


def test_a_tensor_left_out_of_a_later_update_is_found_then_as_the_real_server_answered():
    model = policy()
    with StandIn() as stand_in:
        engine = reached(stand_in, model)
        talk(engine, model)
        stand_in.leaves_out = {LEFT_OUT}
        with pytest.raises(EngineError, match=r"computes with other weights .* after update 4") as caught:
            engine.update(moved(model, UPDATES + 1), UPDATES + 1)
    one_line(caught.value)


def test_a_server_that_reads_an_old_folder_is_found():
    model = policy()
    with StandIn() as stand_in:
        engine = reached(stand_in, model)
        stand_in.forgets = True
        with pytest.raises(EngineError, match=r"computes with other weights .* after update 1"):
            engine.update(moved(model, 1), 1)


def test_a_server_that_reports_another_version_is_found():
    assert "reports weights '7' after an update to 'proof-" in error_of(StandIn(reports="7"))


def test_weights_of_someone_else_are_found_before_a_response_is_drawn():
    with StandIn() as stand_in:
        engine = reached(stand_in)
        stand_in.version = "default"  # it was started again
        with pytest.raises(EngineError, match="has weights 'default', not '0-"):
            engine.sample(requests(), WAYS[0])


def test_a_response_of_an_older_version_says_so():
    model = policy()
    with StandIn(computes=True) as stand_in:
        engine = reached(stand_in, model)
        engine.update(moved(model, 1), 1)
        stand_in.version, stand_in.reports = f"0-{engine._identity}", engine._name
        older = engine.sample(requests()[:1], WAYS[0])
        stand_in.version = "3-of-another-run"
        unknown = engine.sample(requests()[:1], WAYS[0])
    assert (older[0].version, unknown[0].version) == (0, -1)


# Servers that do not fit


def test_no_server():
    with StandIn() as gone:
        rollout = gone.rollout
    with pytest.raises(EngineError, match=rf"no server answers at {gone.url} \(.*refused\): start it"):
        connect(rollout, policy(), TOKENIZER)


def test_a_server_that_takes_no_weights():
    missing = {"/weight_info": (404, {"detail": "Not Found"}), "/resume": (404, {"detail": "Not Found"})}
    assert "takes no weights: start vLLM with VLLM_SERVER_DEV_MODE=1" in error_of(StandIn(refuses=missing))


def test_a_server_that_takes_no_token_ids():
    message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
    refuses = {"/inference/v1/generate": (403, {"error": {"message": message}})}
    assert "takes no token ids: start vLLM with --enable-scale-out" in error_of(StandIn(refuses=refuses))


def test_a_server_that_tells_log_probs_before_the_temperature():
    raw = {"choices": [{"logprobs": {"content": [{"logprob": -5.3}]}}]}
    error = error_of(StandIn(refuses={"/inference/v1/generate": (200, raw)}))
    assert "start vLLM with --logprobs-mode processed_logprobs" in error


@pytest.mark.parametrize("entries", [100, 500])
def test_another_vocabulary(entries):
    error = error_of(StandIn(vocabulary=entries))
    assert "another vocabulary than the 240 entries of this one" in error


def test_another_tokenizer():
    ids = TOKENIZER.convert_tokens_to_ids(["1", "+", "2"])
    same = {"tokens": ids, "token_strs": ["1", "+", "2"]}
    with StandIn(tokens=same) as stand_in:
        reached(stand_in)
    other = {"tokens": ids, "token_strs": ["1", "Ġplus", "2"]}
    assert f"token {ids[1]} is 'Ġplus' there and '+' here" in error_of(StandIn(tokens=other))


def test_a_shorter_context_than_is_asked():
    with StandIn(context=70) as stand_in:
        engine = reached(stand_in)
        with pytest.raises(
            EngineError, match="reads 70 tokens, and a prompt of 50 with a response of 30 is asked"
        ):
            engine.sample([Request((1,) * 50, 0, 30)], WAYS[0])


# Servers that fail


def test_a_server_that_dies_in_the_middle():
    model = policy()
    with StandIn() as stand_in:
        engine = reached(stand_in, model)
        engine.update(moved(model, 1), 1)
        stand_in.dies_at = stand_in.drawn + 3
        with pytest.raises(
            EngineError, match="died before it answered /inference/v1/generate .* draws the step again"
        ):
            engine.sample(requests(), WAYS[0])
        with pytest.raises(EngineError, match="died before it answered"):
            engine.update(policy(), 2)


def test_an_engine_that_dies_behind_its_server():
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    with StandIn() as stand_in:
        engine = reached(stand_in)
        stand_in.refuses = {"/inference/v1/generate": (500, {"error": {"message": message, "code": 500}})}
        with pytest.raises(EngineError, match=re.escape(f"(500): {message}")):
            engine.sample(requests(), WAYS[0])


def test_a_slow_server_and_nothing_of_it_goes_on():
    with StandIn() as stand_in:
        engine = reached(stand_in)
        stand_in.slow, engine._service.timeout = 60.0, 0.2
        began = time.monotonic()
        with pytest.raises(
            EngineError, match=r"did not answer /inference/v1/generate within 0.2 s \(rollout.timeout\)"
        ):
            engine.sample(requests(), WAYS[0])
        assert time.monotonic() - began < 20


@pytest.fixture
def interruptible():
    """Ctrl-C as at a terminal: a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_breaks_off_what_is_under_way():
    with StandIn() as stand_in:
        engine = reached(stand_in)
        stand_in.slow = 60.0
        began = time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            engine.sample(requests(), WAYS[0])
        assert time.monotonic() - began < 20


def test_an_update_that_was_cut_off_leaves_no_paused_server():
    with StandIn() as stand_in:
        stand_in.paused = True
        reached(stand_in)
        assert not stand_in.paused


# A run


@pytest.fixture
def brought(tmp_path, monkeypatch):
    """A folder `own` and recipe words for three steps of GRPO on it."""
    monkeypatch.chdir(tmp_path)
    save_model(policy(), TOKENIZER, tmp_path / "own")
    return [
        *("run", "smoke", "stages=[base,zero]", "model.pretrained=own", "zero.steps=3", "zero.prompts=2"),
        *("zero.group_size=2", "zero.minibatches=1", "zero.max_new_tokens=8", "zero.lr=1e-3"),
        "rollout.engine=vllm",
    ]


def numbers(folder):
    rows = read_jsonl(folder / "zero/metrics.jsonl")
    timed = ("_seconds", "_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in rows]


def test_a_run_whose_server_dies_draws_the_step_again(brought, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.cli.run.write_report", lambda run_dir: run_dir.path)  # not looked at here
    with StandIn(computes=True) as whole:
        assert main([*brought, "--run", "whole", f"rollout.url={whole.url}"]) == 0
    capsys.readouterr()
    with StandIn(computes=True) as stand_in:
        # examined, proven and brought up to date, a step, an update and the middle of the next
        stand_in.dies_at = 2 + 2 + 4 + 3
        assert main([*brought, "--run", "cut", f"rollout.url={stand_in.url}"]) == 2
    told = capsys.readouterr()
    assert len([line for line in told.err.splitlines() if line.startswith("error:")]) == 1
    assert "draws the step again" in told.err
    assert 0 < len(numbers(tmp_path / "cut")) < 3
    with StandIn(computes=True, port=stand_in.port):
        assert main([*brought, "--run", "cut", f"rollout.url={stand_in.url}"]) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert not (tmp_path / "cut" / workspace.WEIGHTS).exists()


def test_a_dry_run_names_the_engine_and_says_whether_its_server_answers(brought, capsys):
    with StandIn() as stand_in:
        assert main([*brought, "--dry-run", f"rollout.url={stand_in.url}"]) == 0
    assert f"rollouts: vllm 0.32.0 at {stand_in.url}, which answers" in capsys.readouterr().out
    assert main([*brought, "--dry-run", f"rollout.url={stand_in.url}"]) == 0
    assert f"rollouts: vllm; no server answers at {stand_in.url}" in capsys.readouterr().out
    assert main(["run", "smoke", "--dry-run"]) == 0
    assert "rollouts: transformers, in the process of the run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["rollout.engine=vllm"],
            "vllm takes either rollout.url=http://HOST:PORT of a server, or rollout.start=true",
        ),
        (["rollout.engine=vllm", "rollout.start=true", "rollout.url=http://a:1"], "vllm takes either"),
        (["rollout.url=http://127.0.0.1:1"], "rollout.engine: expected vllm"),
        (
            ["rollout.engine=vllm", "rollout.url=127.0.0.1:1"],
            "rollout.url: expected such as http://127.0.0.1:8000",
        ),
        (
            ["rollout.engine=vllm", "rollout.start=true", "rollout.python=none/python"],
            "rollout.python: there is no none/python: `make vllm` makes",
        ),
        (
            ["rollout.engine=vllm", "rollout.start=true", "zero.top_p=0.9", "zero.top_k=50"],
            "rollout.options: expected --return-sampling-mask among them, so that the server tells what zero.top_p=0.9 left",
        ),
        (
            ["rollout.stale=correct", "rl_reasoning.old_logprobs=sampler"],
            "rl_reasoning.old_logprobs: expected recomputed with rollout.stale=correct",
        ),
    ],
)
def test_settings_that_do_not_go_together(words, message, capsys):
    assert main(["run", "tiny", "--dry-run", *words]) == 2
    assert message in capsys.readouterr().err


# A server of the run's own


def a_server(tmp_path, program):
    """A `python` that runs `program` instead of vLLM."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{program}", "utf-8")
    path.chmod(0o755)
    return Rollout(engine="vllm", start=True, python=str(path), timeout=60.0)


SERVES = """
import http.server, pathlib, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
print("words:", sys.argv[1:], flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


FORWARDS = """
import socket, sys, threading
print("started", flush=True)
def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
listener = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
while True:
    near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", {port}))
    for ends in ((near, far), (far, near)):
        threading.Thread(target=copy, args=ends, daemon=True).start()
"""


def listens(service):
    try:
        service.call("GET", "/health")
    except EngineError:
        return False
    return True


def test_a_server_is_started_on_a_free_port_of_this_machine_and_stopped(tmp_path):
    log = tmp_path / "vllm.log"
    started = Server(a_server(tmp_path, SERVES), tmp_path, log, 256)
    assert listens(started.service)
    words = log.read_text()
    for word in ("'--host', '127.0.0.1'", "'--max-model-len', '256'", "'--enable-scale-out'", str(tmp_path)):
        assert word in words
    started.stop()
    assert not listens(started.service)


def test_one_server_is_started_for_all_engines_of_a_stage_whose_models_have_the_same_sizes(tmp_path):
    model = policy()
    with StandIn(computes=True) as stand_in, workspace.workspace_in(tmp_path):
        rollout = a_server(tmp_path, FORWARDS.format(port=stand_in.port))
        for version, each in enumerate((model, model, moved(policy(), 1))):
            engine = connect(rollout, each, TOKENIZER, version)
            assert engine.sample([Request((1, 40), 1, 4)], WAYS[0])[0].version == version
            engine.close()
        service = engine._service
        assert listens(service)
    assert (tmp_path / workspace.LOG).read_text().count("started") == 1
    assert not listens(service)
    assert not (tmp_path / workspace.WEIGHTS).exists()


PYDANTIC = "1 validation error for VllmConfig\\n  Value error, V2 requires Triton. [type=value_error, input_type=Args]\\n"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise ValueError('no such flag')", "ValueError: no such flag"),
        (
            f"class ValidationError(Exception): pass\nraise ValidationError('{PYDANTIC}')",
            r"ValidationError: 1 validation error for VllmConfig Value error, V2 requires Triton\.",
        ),
    ],
)
def test_a_server_that_does_not_start_tells_its_last_error(tmp_path, program, said):
    rollout = a_server(tmp_path, f"print('working')\n{program}")
    with pytest.raises(EngineError, match=rf"vLLM did not start: (__main__\.)?{said}; its log is .*vllm.log"):
        Server(rollout, tmp_path, tmp_path / "vllm.log", None)


def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    rollout = a_server(tmp_path, SERVES)
    told, tell = multiprocessing.Pipe(duplex=False)

    def starts():
        tell.send(Server(rollout, tmp_path, tmp_path / "log", None).service.url)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=starts, daemon=True)
    process.start()
    assert told.poll(60)
    service = Service(told.recv(), 5.0)
    assert listens(service)
    process.kill()
    process.join()
    for _ in range(100):
        if not listens(service):
            return
        time.sleep(0.05)
    pytest.fail("the server outlived the run")
