"""The table of cases: algorithmic work against numbers worked out by hand, and every op at a tiny shape."""

import json

import pytest
import torch

from bench import measure, noise, report, results, run
from bench.ceilings import Ceilings
from bench.ops import families, logprob
from bench.ops.cases import CASES, Case, Work, lengths, tiny
from bench.ops.numerics import allowed
from bench.results import Row


@pytest.mark.parametrize("case", tiny(), ids=lambda case: case.id)
def test_every_implementation_of_ours_gives_right_results_and_a_time(case):
    rows = run.rows(case, 0.0, compiles=False)
    ours = [row for row in rows if row.kind == "ours"]
    eager = rows[0].errors
    assert ours
    for row in ours:
        assert row.status == "ok", row.reason
        assert row.errors and row.seconds
        limits = {name: allowed(eager.get(name), case.torch_dtype) for name in row.errors}
        assert all(row.errors[name] <= limits[name] for name in row.errors)
    for row in rows:
        assert row.status == "ok" or row.reason


def test_where_torch_multiplies_slowly_ours_alone_are_called():
    (case, *_) = (case for case in tiny() if case.op == "linear_logprobs" and case.dtype == "bfloat16")
    slow = Ceilings(1e12, {"float32": 1e12, "bfloat16": case.work()["forward+backward"].flops / 3600}, 1e12)
    rows = run.rows(case, 0.0, compiles=False, of_torch=slow.of_torch(case))
    assert {row.kind for row in rows} > {"ours"}
    for row in rows:
        assert row.status == ("ok" if row.kind == "ours" else "unavailable"), row.peer
        assert bool(row.seconds) == (row.kind == "ours")
        assert row.kind == "ours" or row.reason == "torch's own products take 3600 s here in bfloat16"


def test_the_floor_of_16_bits_is_not_above_that_of_32():
    slow = Ceilings(1e12, {"float32": 1e12, "bfloat16": 1e9}, 1e12)
    assert slow.floor(Work(flops=1e12), "bfloat16") == (1.0, "GEMM")
    assert slow.floor(Work(flops=1e9), "float32") == (1e-3, "GEMM")


def test_the_work_of_logits_by_hand():
    # 10 x 100 float32 logits: read once forward, read and written backward, one exponential each
    work = Case("token_logprobs", "cpu", "float32", {"N": 10, "V": 100}).work()
    assert (work["forward"].bytes, work["forward"].exps) == (4000, 1000)
    assert (work["backward"].bytes, work["backward"].flops) == (8000, 0)


def test_the_work_of_a_fused_head_by_hand():
    # 2 N V H = 2 * 10 * 100 * 8 FLOPs a GEMM: one forward, two backward; bf16 inputs of 80 and 800 values
    work = Case("linear_logprobs", "cpu", "bfloat16", {"N": 10, "V": 100, "H": 8}).work()
    assert work["forward"].flops == 16000 and work["backward"].flops == 32000
    assert work["forward"].bytes == 2 * 880


def test_the_work_of_experts_by_hand():
    # 6 T K H I = 6 * 3 * 2 * 4 * 5; of one expert everyone is hit
    work = Case("moe_experts", "cpu", "float32", {"T": 3, "H": 4, "I": 5, "E": 1, "K": 1}).work()
    assert work["forward"].flops == 6 * 3 * 4 * 5 and work["backward"].flops == 12 * 3 * 4 * 5
    assert work["forward"].bytes == 4 * (3 * 5 * 4 + 2 * 3 * 4)


def test_masked_places_are_not_read_but_written():
    case = Case("grouped_logprobs", "cpu", "float32", {"B": 8, "L": 10, "G": 2, "V": 7}, "padded")
    tokens = int(lengths(case).sum())
    assert tokens < 80
    assert case.work()["forward"].bytes == 4 * 7 * tokens
    assert case.work()["backward"].bytes == 4 * 7 * (tokens + 80)


def test_ids_are_unique_and_every_op_is_known():
    names = [(case.device, case.id) for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.op for case in CASES} == {*families.OPS, "grpo_step"}


def test_the_exact_log_probs_are_those_of_torch_in_float64():
    case = Case("token_logprobs", "cpu", "float32", {"N": 5, "V": 11})
    inputs = logprob.token_inputs(case, torch.device("cpu"))
    exact = logprob.token_exact(case, inputs)
    logits = inputs["logits"].double().requires_grad_()
    log_probs = logits.log_softmax(-1)
    logp = log_probs.gather(1, inputs["targets"].unsqueeze(1)).squeeze(1)
    entropy = -(log_probs.exp() * log_probs).sum(1)
    above = [inputs.upstream[name].double() for name in ("logp", "entropy")]
    (gradient,) = torch.autograd.grad([logp, entropy], logits, above)
    for name, value in (("logp", logp), ("entropy", entropy), ("d logits", gradient)):
        torch.testing.assert_close(exact[name].values, value.detach(), rtol=1e-12, atol=1e-12)


def test_a_case_that_does_not_fit_is_not_run():
    huge = Case("token_logprobs", "cpu", "float32", {"N": 1 << 24, "V": 1 << 20})
    with pytest.raises(run.Unavailable, match="GiB of memory"):
        run.rows(huge, 0.0)


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="got logprobs"):
        run.Plan("cpu", ["logprobs"]).cases()


def test_every_case_is_either_run_or_listed_with_a_reason():
    todo, left = run.Plan("cpu", quick=True).cases()
    assert len(todo) + len(left) == len(CASES)
    assert all(case.device == "cpu" and case.quick for case in todo)
    assert {reason for case, reason in left if case.device == "cuda"} == {run.OTHER_DEVICE["cpu"]}


@pytest.fixture
def known_ceilings(monkeypatch):
    """A quiet machine whose ceilings need no measuring, another copy rate each time."""
    found = (Ceilings(speed * 1e9, {"float32": 1e9, "bfloat16": 2e9}, 1e9) for speed in (2, 1, 3, 1, 1))
    monkeypatch.setattr(run.ceilings, "measure", lambda device: next(found))
    monkeypatch.setattr(run.noise, "of_machine", lambda device: 1.0)


def test_times_that_repeat_are_no_noise(monkeypatch):
    monkeypatch.setattr(noise, "_TIMES", 3)
    assert noise.of_machine(torch.device("cpu")) >= 1 == noise.spread([2.0, 2.0, 2.0])


def test_a_run_keeps_what_is_done_and_can_be_added_to(tmp_path, known_ceilings):
    out = tmp_path / "cpu.json"
    first = run.run(run.Plan("cpu", ["route"], tiny=True), out)
    routers = len([case for case in tiny() if case.op == "route"])
    assert [one.case.op for one in first.cases] == ["route"] * routers
    both = run.run(run.Plan("cpu", ["grouped_logprobs"], tiny=True, add=True), out)
    assert [one.case.op for one in both.cases].count("route") == routers
    assert len(both.cases) == routers + 4
    added = {one.case.op: one.ceilings for one in both.cases}
    assert added["route"] is None and added["grouped_logprobs"].bytes_per_second == 1e9
    late = run.run(run.Plan("cpu", ["route"], tiny=True, limit=-1), out)
    assert not late.cases and next(iter(late.not_run.values())) == "no time was left"


def test_what_is_added_changes_nothing_else_in_the_file(tmp_path, known_ceilings, monkeypatch):
    out = tmp_path / "cpu.json"
    before = run.run(run.Plan("cpu", ["route", "router_logits"], tiny=True), out)
    written = json.loads(out.read_text())
    today = {**before.environment, "packages": {"torch": "9"}, "commit": "later"}
    monkeypatch.setattr(run, "environment", lambda device: today)
    run.run(run.Plan("cpu", ["route"], tiny=True, add=True), out)
    after, found = results.load(out), json.loads(out.read_text())
    added = [one for one in after.cases if one.ceilings]
    assert added and {(one.case.op, one.commit) for one in added} == {("route", "later")}
    keep = [case for case in written.pop("cases") if case["case"]["op"] != "route"]
    assert (
        keep and [case for case in found.pop("cases") if "ceilings" not in case] == keep and found == written
    )
    was, floors = (
        {one.case.op: found.floors(one)["inference"][0] for one in found.cases} for found in (before, after)
    )
    assert floors["router_logits"] == was["router_logits"] and floors["route"] == 2 * was["route"]
    assert report.environment(after).rows[-1][1] == "; ".join(one.title for one in added)


@pytest.mark.parametrize("how", [{"add": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize(
    ("fact", "told"),
    [
        ({"threads": 99}, "but this is .*, 99 threads"),
        ({"extension": "of a laptop"}, "extension of a laptop"),
    ],
)
def test_a_file_of_another_machine_is_not_gone_on_with(
    tmp_path, known_ceilings, monkeypatch, fact, told, how
):
    out = tmp_path / "cpu.json"
    known = run.run(run.Plan("cpu", ["router_logits"], tiny=True), out).environment
    monkeypatch.setattr(run, "environment", lambda device: {**known, **fact})
    with pytest.raises(SystemExit, match=told):
        run.run(run.Plan("cpu", ["route"], tiny=True, **how), out)


def test_a_run_that_is_resumed_makes_what_is_missing_and_nothing_again(tmp_path, known_ceilings):
    out = tmp_path / "cpu.json"
    late = run.run(run.Plan("cpu", ["route"], tiny=True, limit=-1), out)
    assert set(late.not_run.values()) == {run.OUT_OF_TIME} and not late.cases
    done = run.run(run.Plan("cpu", ["route"], tiny=True, resume=True), out)
    assert {one.case.op for one in done.cases} == {"route"} and not done.not_run
    assert len(done.cases) == len(late.not_run)
    again = run.run(run.Plan("cpu", ["route"], tiny=True, resume=True), out)
    assert [row.seconds for row in again.cases[0].rows] == [row.seconds for row in done.cases[0].rows]
    # floors are those of the best ceilings of all parts
    assert [found.ceilings.bytes_per_second for found in (late, done, again)] == [2e9, 2e9, 3e9]


def test_a_case_that_stops_with_an_error_takes_no_other_with_it(tmp_path, monkeypatch, known_ceilings):
    measured = run.rows

    def breaks(case, *args, **kwargs):
        if case.layout == "packed":
            raise RuntimeError("the device is gone")
        return measured(case, *args, **kwargs)

    monkeypatch.setattr(run, "rows", breaks)
    plan = run.Plan("cpu", ["grouped_logprobs"], tiny=True)
    found = run.run(plan, tmp_path / "cpu.json")
    assert {one.case.layout for one in found.cases} == {"padded"}
    assert run.failed(found) and all("the device is gone" in line for line in run.failed(found))


def test_an_implementation_that_stops_while_it_is_timed_has_no_time(monkeypatch):
    case = Case("token_logprobs", "cpu", "float32", {"N": 8, "V": 33})
    timed = measure.timing.train
    calls = []

    def stops(call, inputs, clock):
        calls.append(call)
        if len(calls) > 3 and call is calls[0]:
            raise RuntimeError("no memory is left")
        return timed(call, inputs, clock)

    monkeypatch.setattr(measure.timing, "train", stops)
    rows = run.rows(case, 0.0, compiles=False)
    assert rows[0].reason == "stopped while it was timed: RuntimeError: no memory is left"
    assert rows[0].status == "unavailable" and not rows[0].seconds and rows[1].seconds


def test_rounds_are_fewer_where_they_are_long():
    counts = [measure._rounds(seconds, 10.0) for seconds in (0.001, 1.0, 3.0, 20.0, 100.0)]
    assert counts == [40, 10, 5, 3, 2]


def test_whoever_is_far_behind_our_fastest_is_known():
    def row(name, kind, seconds, status="ok"):
        return Row(name, kind, "torch", status, rounds={"forward+backward": [seconds]})

    everyone = [
        row("ours", "ours", 2.0),
        row("ours, other", "ours", 1.0),
        row("slow", "peer", 3.1),
        row("close", "peer", 2.9),
        row("out", "peer", 9.0, "failed"),
    ]
    assert measure._far_behind(everyone) == {"slow"}
    assert measure._far_behind(everyone[2:]) == set()
