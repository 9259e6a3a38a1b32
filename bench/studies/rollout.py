"""Tokens a second of the trainer's sampler, beside transformers' own ways, a decode step beside its floor, its attention by itself.

All draw at temperature 1 from one model with random weights, and end a response at one of several tokens, so that lengths
differ as they do in training. Rounds are paired: each peer once, over and over.
"""

import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import ContinuousBatchingConfig

from r1kernels import DecodeLayout, SharedPrefix, decode_attention
from training.engines import Request, SamplingParams, equal_lengths
from training.engines.transformers import TransformersEngine
from training.model import build_model
from training.recipe import load
from training.tokenizer import build_tokenizer

from .. import ceilings, results, timing
from ..measure import first_line, load_average
from ..ops.cases import Work
from ..table import Table, milliseconds

OURS = "r1kernels' trainer"
EQUAL_LENGTHS = "transformers' cache, prompts of one length at a time"
GENERATE, GENERATE_BATCH = "transformers, generate, padded", "transformers, generate_batch"
ENDS = 32  # a response has this many tokens on average, where nothing cuts it
PAGE = 64  # tokens
CALLS = 20  # of an op in a round


@dataclass(frozen=True)
class Sizes:
    """Of the model that is drawn from and of what is asked. longest: tokens of a response at most."""

    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    vocab_size: int = 8192
    prompts: int = 64
    shortest_prompt: int = 16
    longest_prompt: int = 256
    longest: int = 64
    rounds: int = 5


class Step(NamedTuple):
    """The attention of a decoding step: rows, the prompts that they share and their tokens, the rows' own, heads and their width."""

    rows: int
    prompts: int
    prompt: int
    own: int
    heads: int
    key_heads: int
    size: int


STEPS = {
    "recipe tiny": Step(384, 48, 24, 32, 3, 3, 32),
    "SmolLM2-135M": Step(64, 8, 128, 128, 9, 3, 64),
    "Llama-3.1-8B": Step(16, 2, 512, 256, 32, 8, 128),
}
TINY = Sizes(32, 2, 4, 256, 6, 4, 24, 8, 1)


def build(sizes: Sizes) -> PreTrainedModel:
    """A Qwen2 model with random weights."""
    config = Qwen2Config(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, intermediate_size=8 * sizes.hidden_size // 3,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=max(1, sizes.heads // 4),
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def prompts(sizes: Sizes, samples: int, head: int) -> list[tuple[int, ...]]:
    """`sizes.prompts` in all, each `samples` times, which begin with `head` tokens in common."""
    rng = random.Random(0)
    first = [rng.randrange(sizes.vocab_size) for _ in range(head)]
    made = []
    for _ in range(sizes.prompts // samples):
        length = rng.randint(max(sizes.shortest_prompt, head + 1), sizes.longest_prompt)
        own = [rng.randrange(sizes.vocab_size) for _ in range(length - head)]
        made += [(*first, *own)] * samples
    return made


Draw = Callable[[], int]  # draws once and returns the number of tokens


def peers(model: PreTrainedModel, asked: Sequence[tuple[int, ...]], sizes: Sizes) -> dict[str, Draw]:
    """Name -> one draw of a response to every prompt."""
    stops = tuple(range(0, sizes.vocab_size, ENDS))
    requests = [Request(prompt, key, sizes.longest) for key, prompt in enumerate(asked)]
    params = SamplingParams(stop_ids=stops, batch_size=len(asked))
    engine = TransformersEngine(model, None)

    def ours() -> int:
        return sum(len(output.token_ids) for output in engine.sample(requests, params))

    @torch.no_grad()
    def by_length() -> int:
        return sum(len(output.token_ids) for output in equal_lengths.draw(model, requests, params, 0))

    pad, width = 1, max(len(prompt) for prompt in asked)
    config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=sizes.longest, eos_token_id=list(stops), pad_token_id=pad
    )
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])

    def generate() -> int:
        drawn = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
        ended = torch.isin(drawn, torch.tensor(stops)).int()
        return int((ended.cumsum(1) - ended == 0).sum())

    pages = sum(-(-(len(prompt) + sizes.longest) // PAGE) for prompt in asked) + 1
    batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=1024)
    options: dict[str, Any] = {"generation_config": config, "continuous_batching_config": batching}

    def generate_batch() -> int:
        drawn = model.generate_batch([list(prompt) for prompt in asked], warmup=False, **options)
        return sum(len(output.generated_tokens) for output in drawn.values())

    return {OURS: ours, EQUAL_LENGTHS: by_length, GENERATE: generate, GENERATE_BATCH: generate_batch}


def compare(sizes: Sizes) -> list[dict[str, Any]]:
    """Tokens a second of every peer, for prompts of different lengths and for groups of responses with a common head."""
    model, group = build(sizes), min(8, sizes.prompts // 2)
    plain = f"{sizes.prompts} prompts of {sizes.shortest_prompt} to {sizes.longest_prompt} tokens"
    grouped = f"{sizes.prompts // group} prompts, {group} responses to each, a head in common"
    asked = {plain: prompts(sizes, 1, 0), grouped: prompts(sizes, group, sizes.longest_prompt // 2)}
    return [case(title, peers(model, each, sizes), sizes.rounds) for title, each in asked.items()]


def case(title: str, ways: Mapping[str, Draw], rounds: int) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {name: {"peer": name, "tokens_per_second": []} for name in ways}
    timed = {}

    def rate(way: Draw) -> dict[str, float]:
        began = time.perf_counter()
        return {"rate": way() / (time.perf_counter() - began)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, way in ways.items():
            try:
                way()  # warms up
                timed[name] = partial(rate, way)
            except Exception as error:
                rows[name]["reason"] = first_line(error)
        for name, found in results.paired(timed, rounds).items():
            rows[name]["tokens_per_second"] = found["rate"]
    return {"title": title, "load_average": load_average(), "peers": list(rows.values())}


def decode(rows: int, longest: int, rounds: int) -> dict[str, Any]:
    """One token of `rows` responses of the recipe `tiny`, beside the least that its bytes and its products take.

    Bytes: weights once, but for the embedding, of which the rows' alone; keys and values of each row, at half the length.
    """
    recipe = load("tiny")
    tokenizer = build_tokenizer()
    model = build_model(recipe.model, tokenizer, 0).eval()
    engine = TransformersEngine(model, tokenizer)
    prompt = 16
    rng = random.Random(0)
    asked = [tuple(rng.choices(range(5, len(tokenizer)), k=prompt)) for _ in range(max(1, rows // 16))]

    def drawn(most: int) -> float:
        requests = [Request(asked[row % len(asked)], row, most) for row in range(rows)]
        began = time.perf_counter()
        engine.sample(requests, SamplingParams(batch_size=rows, record_routing=True))
        return time.perf_counter() - began

    drawn(2)
    steps = [(drawn(longest) - drawn(1)) / (longest - 1) for _ in range(rounds)]
    sizes = recipe.model
    embedding = model.get_input_embeddings().weight
    weights = sum(parameter.numel() for parameter in model.parameters()) - embedding.numel()
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    used = weights - routed + routed * sizes.experts_per_token // sizes.experts
    held = sizes.layers * sizes.heads * (sizes.qk_rope_head_dim + sizes.qk_nope_head_dim + sizes.v_head_dim)
    read = rows * (longest // 2) + len(asked) * prompt  # tokens; a prompt's are read once for all its rows
    seen = rows * (longest // 2 + prompt)
    work = Work(
        bytes=4 * (weights + rows * sizes.hidden_size + held * read),
        flops=2 * (rows * used + held * seen),
        exps=rows * len(tokenizer),
    )
    floor, bound = ceilings.measure(torch.device("cpu")).floor(work, "float32")
    return {
        "rows": rows,
        "longest": longest,
        "seconds": [results.short(step) for step in sorted(steps)],
        "bound": bound,
        "floor_seconds": results.short(floor),
        "bytes": work.bytes,
        "flops": work.flops,
        "load_average": load_average(),
    }


def attention(title: str, step: Step, rounds: int) -> dict[str, Any]:
    """Seconds of the attention of one layer; where a cache holds the text of each row alone, prompts are repeated beforehand."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    query, key, value = (
        normal(step.rows, heads, step.size) for heads in (step.heads, step.key_heads, step.key_heads)
    )
    nodes = [row * step.prompts // step.rows for row in range(step.rows)]
    cache, shared = (
        tuple(normal(count, step.key_heads, tokens, step.size) for _ in range(2))
        for count, tokens in ((step.rows, step.own), (step.prompts, step.prompt))
    )
    prefix = SharedPrefix.of(nodes, [step.prompt] * step.rows)
    layout = DecodeLayout(torch.full((step.rows,), step.own - 1), step.own - 1, [prefix])
    keys, values = (torch.cat((a[nodes], b), dim=2) for a, b in zip(shared, cache, strict=True))

    def ours(backend: str | None) -> None:
        decode_attention(
            query, key, value, (cache[0], cache[1]), layout, [(shared[0], shared[1])], backend=backend
        )

    def fused() -> None:
        keys[:, :, -1], values[:, :, -1] = key, value
        F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True)

    def seconds(way: Callable[[], None]) -> dict[str, float]:
        (whole,) = timing.repeated(way, torch.device("cpu"), 1, calls=CALLS)
        return {"seconds": whole / CALLS}

    ways: dict[str, Callable[[], None]] = {
        "decode_attention": partial(ours, None),
        "its reference": partial(ours, "reference"),
        "F.scaled_dot_product_attention, prompts repeated": fused,
    }
    found = results.paired({name: partial(seconds, way) for name, way in ways.items()}, rounds)
    return {
        "title": title,
        **step._asdict(),
        "seconds": {name: each["seconds"] for name, each in found.items()},
    }


def measure(tiny: bool = False) -> dict[str, Any]:
    """Everything; tiny: does it work at all."""
    sizes = TINY if tiny else Sizes()
    step = decode(*((16, 4, 1) if tiny else (384, 64, 7)))
    steps = {"tiny": Step(4, 2, 5, 3, 2, 1, 8)} if tiny else STEPS
    alone = [attention(title, each, sizes.rounds) for title, each in steps.items()]
    return {"sizes": vars(sizes), "cases": compare(sizes), "decode": step, "attention": alone}


def tables(record: Mapping[str, Any]) -> list[Table]:
    """Tokens a second of every peer in every case, and the attention of a step."""
    sizes, step = record["sizes"], record["decode"]
    took, floor = statistics.median(step["seconds"]), step["floor_seconds"]
    note = (
        f"Tokens a second, medians of {sizes['rounds']} paired rounds, {record['environment']['threads']} threads of torch, from a Qwen2 "
        f"model of {sizes['layers']} layers of width {sizes['hidden_size']} and {sizes['vocab_size']:,} entries; responses of at most "
        f"{sizes['longest']} tokens. A decode step of `tiny` with {step['rows']} rows takes {milliseconds(took)} ms, {took / floor:.1f} times "
        f"its floor of {milliseconds(floor)} ms ({step['bound']})."
    )
    found = Table("Rollouts", ("what", *(peer["peer"] for peer in record["cases"][0]["peers"])), note=note)
    for one in record["cases"]:
        rates = [peer["tokens_per_second"] or peer.get("reason", "") for peer in one["peers"]]
        shown = (each if isinstance(each, str) else f"{statistics.median(each):,.0f}" for each in rates)
        found.rows.append([one["title"], *shown])
    return [found, *([_attention(record["attention"])] if "attention" in record else [])]


def _attention(cases: Sequence[Mapping[str, Any]]) -> Table:
    """Milliseconds of one layer."""
    note = "Attention of a token per row, one layer, milliseconds: medians of paired rounds."
    found = Table("Attention of a decoding step", ("shape", *cases[0]["seconds"]), note=note)
    for one in cases:
        shape = (
            f"{one['title']}: {one['rows']} rows, {one['prompts']} prompts of {one['prompt']} tokens, {one['own']} of each row, "
            f"{one['heads']} heads of {one['size']}, {one['key_heads']} of keys"
        )
        found.rows.append(
            [shape, *(milliseconds(statistics.median(each)) for each in one["seconds"].values())]
        )
    return found
