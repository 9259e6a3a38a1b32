"""The passes and the update of a GRPO step with a prompt computed once for its group, and without.

A random Llama of SmolLM2's size (135M), one prompt of P tokens with G completions of R tokens each. A step is what GRPO
does after its rollout: log-probs of the old policy and of the reference, those of the new policy with loss and backward,
and one update by AdamW. Three ways to do it, in turns: shared prefixes; each sequence for itself, with the same fused
head and loss; TRL's GRPOTrainer. The ideal is the ratio of their FLOPs, which no update and no overhead enters.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import r1kernels
from r1kernels.integrations import transformers as r1

from .. import memory, results
from ..measure import load_average
from ..ops.peers import Unavailable, needs
from ..table import Cell, Table, size, times
from ..timing import Clock

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


LogProbs = Callable[[Any, "Batch"], Tensor]
Loss = Callable[[Any, "Batch", Tensor, Tensor], Tensor]
Way = tuple[LogProbs, Loss]


class Batch:
    """A prompt (P,), its completions (G, R) and their advantages (G,)."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(2, shape.vocabulary, (shape.P,), generator=generator)
        self.completions = torch.randint(2, shape.vocabulary, (shape.G, shape.R), generator=generator)
        self.advantages = torch.linspace(-1.0, 1.0, shape.G)
        self.prompts = self.prompt.expand(shape.G, -1)
        self.ids = torch.cat([self.prompts, self.completions], dim=1)
        self.mask = torch.ones_like(self.completions)


def _shared(model: Any, batch: Batch) -> Tensor:
    """The tree is part of the pass: a step has tokens that no step before it had."""
    tree = r1.prefix_tree(batch.prompts.tolist(), batch.completions.tolist())
    return torch.as_tensor(r1.shared_prefix_logprobs(model, tree))


def _repeated(model: Any, batch: Batch) -> Tensor:
    labels = torch.cat([torch.full_like(batch.prompts, -100), batch.completions], dim=1)
    logp = torch.as_tensor(r1.fused_logprobs(model, batch.ids, labels=labels))
    return logp[:, len(batch.prompt) - 1 :]


def _own_loss(logprobs: LogProbs, model: Any, batch: Batch, old: Tensor, reference: Tensor) -> Tensor:
    given = (logprobs(model, batch), old, batch.advantages, batch.mask)
    return r1kernels.grpo_loss(*given, ref_logp=reference, kl_coef=KL, reduction="token").loss


def _of_trl(model: Any, batch: Batch) -> Way:
    """The two methods of a real trainer that pass through the model.

    Raises:
        Unavailable: what TRL's trainer needs is not installed.
    """
    trl, datasets, tokenizers = (needs(name) for name in ("trl", "datasets", "tokenizers"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = needs("transformers").PreTrainedTokenizerFast
    rows, length = batch.completions.shape
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, loss_type="bnpo",
                per_device_train_batch_size=rows, num_generations=rows,
            ),
            processing_class=tokenizer(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["<eos>"]}),
        )  # fmt: skip
    trainer.beta = KL
    trainer.current_gradient_accumulation_steps = 1
    everywhere = torch.ones_like(batch.ids)

    def logprobs(model: Any, batch: Batch) -> Tensor:
        found, *_ = trainer._get_per_token_logps_and_entropies(model, batch.ids, everywhere, length)
        return torch.as_tensor(found)

    def loss(model: Any, batch: Batch, old: Tensor, reference: Tensor) -> Tensor:
        inputs = {
            "prompt_ids": batch.prompts, "prompt_mask": torch.ones_like(batch.prompts), "completion_ids": batch.completions,
            "completion_mask": batch.mask, "advantages": batch.advantages, "old_per_token_logps": old,
            "ref_per_token_logps": reference, "num_items_in_batch": batch.mask.sum(),
        }  # fmt: skip
        return torch.as_tensor(trainer._compute_loss(model, inputs))

    return logprobs, loss


def _way(name: str, model: Any, batch: Batch) -> Way:
    if name in (TRL, TRL_SHARED):
        return _of_trl(model, batch)
    logprobs = _shared if name == SHARED else _repeated
    return logprobs, partial(_own_loss, logprobs)


def _step(
    model: Any, batch: Batch, way: Way, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, float], float, float]:
    """(seconds of each part, loss, norm of the gradient)."""
    (logprobs, loss_of), clock = way, Clock(torch.device("cpu"))
    clock.mark()
    with torch.no_grad():
        old = logprobs(model, batch)
        clock.mark()
        reference = logprobs(model, batch) - 0.1
        clock.mark()
    loss = loss_of(model, batch, old, reference)
    loss.backward()
    clock.mark()
    optimizer.step()
    clock.mark()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    optimizer.zero_grad()
    seconds = dict(zip(PARTS, clock.seconds(), strict=True))
    return {**seconds, "step": sum(seconds.values())}, loss.item(), float(norm)


def case(shape: Shape, rounds: int) -> dict[str, Any]:
    """The record of one shape.

    Raises:
        RuntimeError: one way gives another loss or gradient than the others, so that its time means nothing.
    """
    batch, model = Batch(shape), shape.model().eval()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    rows: dict[str, dict[str, Any]] = {}
    ways: dict[str, Way] = {}
    before = load_average()

    def one(name: str) -> tuple[dict[str, float], float, float]:
        """A step, on weights that are what they were before the last one."""
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        gc.collect()
        with needs("r1kernels.integrations.trl").patch(prefix=True) if name == TRL_SHARED else nullcontext():
            return _step(model, batch, ways[name], optimizer)

    for name in (SHARED, REPEATED, TRL, TRL_SHARED):
        try:
            ways[name] = _way(name, model, batch)
        except Unavailable as reason:
            rows[name] = {"reason": str(reason)}
            continue
        with memory.Peak(torch.device("cpu")) as peak:
            _, loss, norm = one(name)  # a warm-up too
        rows[name] = {"loss": loss, "gradient": norm, "peak_bytes": peak.bytes}
        for value in ("loss", "gradient"):
            expected = rows[SHARED][value]
            if abs(rows[name][value] - expected) > 1e-3 * abs(expected):
                raise RuntimeError(f"{name}: {value} {rows[name][value]:.6g}, of the others {expected:.6g}")
    timed = {name: lambda name=name: one(name)[0] for name in ways}
    for name, samples in results.paired(timed, rounds).items():
        rows[name]["samples"] = samples
    flops = {"shared": shape.flops(True), "repeated": shape.flops(False)}
    load = [before, load_average()]
    return {"shape": asdict(shape), "text": shape.text, "flops": flops, "load": load, "rows": rows}


def gain(case: Mapping[str, Any], name: str) -> float | None:
    """How many times as long a step takes, the median over the rounds, each against the shared one beside it."""
    ours, theirs = (case["rows"].get(row, {}).get("samples", {}).get("step") for row in (SHARED, name))
    if not ours or not theirs:
        return None
    return statistics.median(other / own for own, other in zip(ours, theirs, strict=True))


def ideal(case: Mapping[str, Any]) -> float:
    """How many times as many FLOPs each sequence for itself takes."""
    return float(case["flops"]["repeated"] / case["flops"]["shared"])


def measure(rounds: int = 5, tiny: bool = False) -> dict[str, Any]:
    return {"cases": [case(shape, rounds) for shape in (TINY if tiny else SHAPES)]}


def tables(record: Mapping[str, Any]) -> list[Table]:
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
    for case, (name, row) in ((one, item) for one in record["cases"] for item in one["rows"].items()):
        if "samples" not in row:
            missing = [*["-"] * (len(PARTS) + 3), Cell(row["reason"], "muted")]
            found.rows.append([case["text"], name, *missing])
            continue
        seconds = [f"{statistics.median(row['samples'][part]):.2f}" for part in (*PARTS, "step")]
        against, shown, wanted = gain(case, name), Cell("-"), "-"
        if name not in (SHARED, TRL_SHARED) and against:
            share, wanted = against / ideal(case), times(ideal(case))
            missed = name == REPEATED and share < GOAL
            shown = Cell(f"{times(against)} ({share:.0%})", "failed" if missed else "")
        found.rows.append([case["text"], name, *seconds, shown, wanted, size(row["peak_bytes"])])
    return [found]
