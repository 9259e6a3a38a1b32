"""``python -m bench prefix``: the passes and the update of a GRPO step with a prompt computed once for its group, and without.

A random Llama of SmolLM2's size (135M), one prompt of P tokens with G completions of R tokens each. A step is what GRPO
does after its rollout: log-probs of the old policy and of the reference, those of the new policy with loss and backward,
and one update by AdamW. Three ways to do it, in turns: shared prefixes; each sequence for itself, with the same fused
head and loss; TRL's GRPOTrainer. The ideal is the ratio of their FLOPs, which no update and no overhead enters.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.integrations import transformers as r1

from . import memory, results
from .environment import environment
from .measure import load_average
from .peers import Unavailable
from .report.table import Cell, Table, size, times

SCHEMA = 1
SHARED, REPEATED = "r1kernels, shared prefixes", "r1kernels, each sequence for itself"
TRL, TRL_SHARED = "TRL", "TRL, patch(prefix=True)"
PARTS = ("old", "reference", "new", "update")
GOAL = 0.8  # of the ideal
KL, RATE = 0.04, 1e-6


@dataclass(frozen=True)
class Shape:
    """One prompt of P tokens, G completions of R tokens, and the model (SmolLM2-135M)."""

    P: int
    R: int
    G: int
    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    key_heads: int = 3
    vocabulary: int = 49152

    @property
    def text(self) -> str:
        return f"P {self.P}, R {self.R}, G {self.G}"

    def flops(self, shared: bool) -> float:
        """GEMM and attention FLOPs of one forward, the head over the completions alone; a backward has twice as many."""
        head_size = self.hidden // self.heads
        projections = 2 * self.hidden * self.hidden + 2 * self.hidden * self.key_heads * head_size
        a_token = 2.0 * self.layers * (projections + 3 * self.hidden * self.intermediate)
        a_pair = 4.0 * self.layers * self.hidden  # of a query and a key that it sees
        prompts = 1 if shared else self.G
        tokens = prompts * self.P + self.G * self.R
        pairs = prompts * self.P * (self.P + 1) / 2 + self.G * (self.R * self.P + self.R * (self.R + 1) / 2)
        return a_token * tokens + a_pair * pairs + 2.0 * self.G * self.R * self.hidden * self.vocabulary

    def model(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            tie_word_embeddings=True, max_position_embeddings=8192, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
        return LlamaForCausalLM(config)


SHAPES = (Shape(256, 32, 8), Shape(1024, 128, 8))
TINY = (Shape(24, 6, 4, hidden=32, intermediate=48, layers=2, heads=4, key_heads=2, vocabulary=64),)


@dataclass
class Batch:
    """A prompt (P,), its completions (G, R) and their advantages (G,)."""

    prompt: Tensor
    completions: Tensor
    advantages: Tensor

    @classmethod
    def of(cls, shape: Shape) -> Batch:
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(2, shape.vocabulary, (shape.P,), generator=generator)
        completions = torch.randint(2, shape.vocabulary, (shape.G, shape.R), generator=generator)
        return cls(prompt, completions, torch.linspace(-1.0, 1.0, shape.G))


LogProbs = Callable[[Any], Tensor]


def _shared(batch: Batch) -> LogProbs:
    """The tree is part of the pass: a step has tokens that no step before it had."""
    prompts = [batch.prompt.tolist()] * len(batch.completions)

    def logprobs(model: Any) -> Tensor:
        tree = r1.prefix_tree(prompts, batch.completions.tolist())
        return torch.as_tensor(r1.shared_prefix_logprobs(model, tree))

    return logprobs


def _repeated(batch: Batch) -> LogProbs:
    prompts = batch.prompt.expand(len(batch.completions), -1)
    ids = torch.cat([prompts, batch.completions], dim=1)
    labels = torch.cat([torch.full_like(prompts, -100), batch.completions], dim=1)

    def logprobs(model: Any) -> Tensor:
        logp = torch.as_tensor(r1.fused_logprobs(model, ids, labels=labels))
        return logp[:, prompts.shape[1] - 1 :]

    return logprobs


def _own_loss(logprobs: LogProbs, batch: Batch) -> Callable[[Any, Tensor, Tensor], Tensor]:
    mask = torch.ones_like(batch.completions)

    def loss(model: Any, old: Tensor, reference: Tensor) -> Tensor:
        output = r1kernels.grpo_loss(
            logprobs(model), old, batch.advantages, mask, ref_logp=reference, kl_coef=KL, reduction="token"
        )
        return output.loss

    return loss


def _of_trl(model: Any, batch: Batch) -> tuple[LogProbs, Callable[[Any, Tensor, Tensor], Tensor]]:
    """The two methods of a real trainer that pass through the model.

    Raises:
        Unavailable: what TRL's trainer needs is not installed.
    """
    try:
        import datasets
        import trl
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from missing
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    prompts = batch.prompt.expand(len(batch.completions), -1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, loss_type="bnpo",
                per_device_train_batch_size=len(prompts), num_generations=len(prompts),
            ),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["<eos>"]}),
        )  # fmt: skip
    trainer.beta = KL
    trainer.current_gradient_accumulation_steps = 1
    ids, mask = torch.cat([prompts, batch.completions], dim=1), torch.ones_like(batch.completions)
    everywhere = torch.ones_like(ids)

    def logprobs(model: Any) -> Tensor:
        found, *_ = trainer._get_per_token_logps_and_entropies(model, ids, everywhere, mask.shape[1])
        return torch.as_tensor(found)

    def loss(model: Any, old: Tensor, reference: Tensor) -> Tensor:
        inputs = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": batch.completions,
            "completion_mask": mask,
            "advantages": batch.advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "num_items_in_batch": mask.sum(),
        }
        return torch.as_tensor(trainer._compute_loss(model, inputs))

    return logprobs, loss


class Step:
    """One way to do a step: its parts timed, on weights that go back to what they were before the next."""

    def __init__(self, name: str, model: Any, batch: Batch) -> None:
        self.patched = name == TRL_SHARED
        if name in (TRL, TRL_SHARED):
            self.logprobs, self.loss = _of_trl(model, batch)
        else:
            self.logprobs = (_shared if name == SHARED else _repeated)(batch)
            self.loss = _own_loss(self.logprobs, batch)
        self.model = model

    def __call__(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, float], float, float]:
        """(seconds of each part, loss, norm of the gradient)."""
        if not self.patched:
            return self._step(optimizer)
        from r1kernels.integrations import trl

        with trl.patch(prefix=True):
            return self._step(optimizer)

    def _step(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, float], float, float]:
        marks = [time.perf_counter()]
        with torch.no_grad():
            old = self.logprobs(self.model)
            marks.append(time.perf_counter())
            reference = self.logprobs(self.model) - 0.1
            marks.append(time.perf_counter())
        loss = self.loss(self.model, old, reference)
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        norm = torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()
        optimizer.zero_grad()
        seconds = {part: after - before for part, before, after in zip(PARTS, marks, marks[1:], strict=False)}
        return {**seconds, "step": sum(seconds.values())}, loss.item(), float(norm)


def measure(shape: Shape, rounds: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The record of one shape.

    Raises:
        RuntimeError: one way gives another loss or gradient than the others, so that its time means nothing.
    """
    batch, model = Batch.of(shape), shape.model().eval()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    before = load_average()

    def one(name: str) -> tuple[dict[str, float], float, float]:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        gc.collect()
        return steps[name](optimizer)

    for name in (SHARED, REPEATED, TRL, TRL_SHARED):
        try:
            steps[name] = Step(name, model, batch)
        except Unavailable as reason:
            rows[name] = {"reason": str(reason)}
            continue
        with memory.Peak(torch.device("cpu")) as peak:
            _, loss, norm = one(name)  # a warm-up too
        rows[name] = {"loss": loss, "gradient": norm, "peak_bytes": peak.bytes, "samples": {}}
        for value in ("loss", "gradient"):
            expected = rows[SHARED][value]
            if abs(rows[name][value] - expected) > 1e-3 * abs(expected):
                raise RuntimeError(f"{name}: {value} {rows[name][value]:.6g}, of the others {expected:.6g}")
    for number in range(rounds):
        for name in steps:
            for part, seconds in one(name)[0].items():
                rows[name]["samples"].setdefault(part, []).append(results.short(seconds))
        say(
            f"  {shape.text}, round {number + 1}: "
            + ", ".join(f"{rows[n]['samples']['step'][-1]:.2f} s" for n in steps)
        )
    return {
        "shape": asdict(shape),
        "text": shape.text,
        "flops": {"shared": shape.flops(True), "repeated": shape.flops(False)},
        "load": [round(before, 2), round(load_average(), 2)],
        "rows": rows,
        "profile": _profile(lambda: one(SHARED)),
    }


def _profile(step: Callable[[], object]) -> dict[str, float]:
    """Operator -> its share of the time of a step, those of at least one percent, the largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    total = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])
    return {name: round(value / total, 4) for name, value in largest if value >= 0.01 * total}


def gain(case: Mapping[str, Any], name: str) -> float | None:
    """How many times as long a step takes, the median over the rounds, each against the shared one beside it."""
    ours, theirs = (case["rows"].get(row, {}).get("samples", {}).get("step") for row in (SHARED, name))
    if not ours or not theirs:
        return None
    return statistics.median(other / own for own, other in zip(ours, theirs, strict=True))


def ideal(case: Mapping[str, Any]) -> float:
    """How many times as many FLOPs each sequence for itself takes."""
    return float(case["flops"]["repeated"] / case["flops"]["shared"])


def table(record: Mapping[str, Any]) -> Table:
    """A row for each way at each shape."""
    machine = record["environment"]
    note = (
        f"Seconds of one GRPO step after its rollout, medians of the rounds, {machine['threads']} threads of "
        f"{machine['processor']}, float32: log-probs of the old policy and of the reference, loss and gradient of the new one, update. "
        "Gain: how many times as long as with shared prefixes, paired within the rounds; in brackets its share of the ideal, the "
        f"ratio of the FLOPs; the goal is at least {GOAL:.0%}."
    )
    found = Table(
        "Shared prefixes", ("shape", "way", *PARTS, "step", "gain", "ideal", "peak memory"), note=note
    )
    for case in record["cases"]:
        for name, row in case["rows"].items():
            if "samples" not in row:
                missing = [Cell("-", "muted")] * (len(PARTS) + 3)
                found.rows.append([Cell(case["text"]), Cell(name), *missing, Cell(row["reason"], "muted")])
                continue
            seconds = [Cell(f"{statistics.median(row['samples'][part]):.2f}") for part in (*PARTS, "step")]
            own = name in (SHARED, TRL_SHARED)
            against = None if own else gain(case, name)
            share = None if against is None else against / ideal(case)
            shown = "-" if share is None else f"{times(against)} ({share:.0%})"
            mark = "failed" if name == REPEATED and share is not None and share < GOAL else ""
            found.rows.append(
                [Cell(case["text"]), Cell(name, "ours" if own else ""), *seconds, Cell(shown, mark),
                 Cell("-" if own else times(ideal(case))), Cell(size(row["peak_bytes"]))]
            )  # fmt: skip
    return found


def profile_table(record: Mapping[str, Any]) -> Table:
    """Where the time of a step with shared prefixes goes."""
    note = "Share of each operator in the time of a step with shared prefixes, as torch.profiler counts it; those of 1 % and more."
    found = Table("Profile", ("shape", "operators"), note=note)
    for case in record["cases"]:
        shares = ", ".join(f"`{name}` {share:.0%}" for name, share in case["profile"].items())
        found.rows.append([Cell(case["text"]), Cell(shares)])
    return found


def main(out: Path, rounds: int, tiny: bool) -> None:
    """The command."""
    from .report import markdown

    record: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "environment": environment("cpu"),
        "cases": [],
    }
    for shape in TINY if tiny else SHAPES:
        record["cases"].append(measure(shape, rounds))
        results.save(out, record)
    print(markdown.section(table(record)))
    print(markdown.section(profile_table(record)))
    print(out)
