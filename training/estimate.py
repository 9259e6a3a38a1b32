"""What a recipe will cost, before it runs: parameters, memory and arithmetic of every stage.

Upper bounds where the recipe leaves a number open: every sampled response is taken to be kept, and to be
`LENGTH_SHARE` of the longest one long. The arithmetic counts 2 operations a weight and token in a forward pass, 4 in
a backward pass, and attention over half the context. Log-prob passes of GRPO read prompts too, as often as the recipe's
`shared_prefix` and micro-batches make them, where the problems are on this machine; sampling counts responses alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from r1kernels.integrations.transformers import prefix_tree
from r1kernels.logprob.head import SAVED_BYTES
from training import adapters, traces
from training.activations import kept_bytes
from training.encoder import Encoder
from training.format import short
from training.loops.passes import max_new_tokens
from training.model import EXPERT_COUNTS, deepseek_config
from training.needs import kinds_of
from training.pipeline import parents_of, plan
from training.pretrained import pretrained_config, pretrained_tokenizer
from training.recipe import Grpo, Lora, NextToken, Recipe, RewardModels, Sampling
from training.responses import choose, problems, prompt_of
from training.student import config_of
from training.tasks.problem import KINDS
from training.tokenizer import build_tokenizer

LENGTH_SHARE = 0.25
DOCUMENT_TOKENS = 1024  # of the longest document, where a recipe sets no limit
BYTES = 4  # parameters and gradients are float32 (training/placement.py), whatever dtype a folder has, and so are AdamW's moments
BLOCK, SMALLEST = 256, 4096  # of adamw_8bit: moments that share a scale; a smaller tensor keeps float32 ones


@dataclass(frozen=True)
class Device:
    """Arithmetic a second that a device really does in this kind of work, and what an hour costs."""

    name: str
    training_flops: float
    sampling_flops: float
    dollars_per_hour: float


GPU = Device("H800 hours", 0.35 * 989e12, 0.02 * 989e12, 2.0)
CPU = Device("core hours", 20e9, 5e9, 0.0)


@dataclass(frozen=True)
class Parameters:
    """Weights of a model: all of them, those that one token uses, and the width of its attention."""

    total: int
    active: int
    attention_width: (
        int  # layers x heads x (query-key + value width): operations a token and context position / 2
    )
    sizes: tuple[
        int, ...
    ]  # of the tensors that have gradients and moments: all of them, or those of adapters
    layer: int  # weights of the largest layer
    ends: int  # weights outside of all layers: embeddings, head, last norm
    lora: Lora  # of the adapters; those of rank 0 are none
    config: PretrainedConfig

    @property
    def adapted(self) -> bool:
        """Adapters are trained in place of all weights."""
        return bool(self.lora.rank)

    @property
    def trained(self) -> int:
        """Weights that have gradients and moments."""
        return sum(self.sizes)

    def moments(self, optimizer: str) -> int:
        """Bytes of both moments of all of them."""
        return 2 * sum(
            size + BYTES * math.ceil(size / BLOCK)
            if optimizer == "adamw_8bit" and size >= SMALLEST
            else BYTES * size
            for size in self.sizes
        )

    def temporaries(self, optimizer: str) -> int:
        """Bytes that the optimizer takes at once for the largest of these tensors."""
        return (5 if optimizer == "adamw_8bit" else 1) * BYTES * max(self.sizes)

    def forward(self, context: float) -> float:
        """Operations of one token in a forward pass that sees `context` tokens on average."""
        return 2 * self.active + 2 * self.attention_width * context


@dataclass(frozen=True)
class Estimate:
    """One stage: what it does, tokens, operations, weights of its model, bytes for weights, gradients, moments and reference, and
    at the peak of a step beside them (None: not known), in one process and in each of several that divide the model."""

    stage: str
    parents: list[str]
    work: str
    sampled_tokens: float
    trained_tokens: float
    sampling_flops: float
    training_flops: float
    weights: int
    memory_bytes: float
    step_bytes: float | None = 0.0
    divided_step_bytes: float | None = 0.0

    def hours(self, device: Device) -> float:
        """Hours on one `device`."""
        return (
            self.sampling_flops / device.sampling_flops + self.training_flops / device.training_flops
        ) / 3600


def count(config: PretrainedConfig, lora: Lora | None = None) -> Parameters:
    """Parameters of a causal language model as transformers builds it from `config`, without memory for its weights.

    lora: of the adapters that are trained in place of all weights, which are not among `total`; None: there are none.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel()
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        for parameter in module.parameters()
    )
    unused = 0
    if experts:
        number = next(n for name in EXPERT_COUNTS if (n := getattr(text, name, None)))
        unused = experts // number * (number - text.num_experts_per_tok)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    query_key, value = head, head
    if hasattr(text, "qk_nope_head_dim"):
        query_key, value = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    width = text.num_hidden_layers * text.num_attention_heads * (query_key + value)
    lora = lora or Lora()
    if lora.rank:
        adapters.attach(model, lora, 0)
    sizes = tuple(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in found]
    ends = sum(parameter.numel() for parameter in model.parameters()) - sum(layers)
    return Parameters(total, total - unused, width, sizes, max(layers, default=0), ends, lora, config)


def parameters(recipe: Recipe) -> Parameters:
    """Parameters of the recipe's model.

    Raises:
        UserError: the pretrained model, whose folder has the sizes, is not on this machine.
    """
    model = recipe.model
    if model.pretrained and model.sizes == "folder":
        return count(pretrained_config(model.pretrained), model.lora)
    return count(deepseek_config(model, _vocabulary(recipe)), model.lora)


def _vocabulary(recipe: Recipe) -> int:
    return recipe.model.vocab_size or len(build_tokenizer())


def estimate(recipe: Recipe) -> list[Estimate]:
    """One row a stage of the recipe, a row a student for the distillation."""
    adapted = parameters(recipe)
    whole = (
        parameters(replace(recipe, model=replace(recipe.model, lora=Lora())))
        if recipe.model.lora.rank
        else adapted
    )
    rows = []
    for stage in plan(recipe):
        model = whole if stage == "base" else adapted
        config, parents = getattr(recipe, stage), parents_of(stage, recipe)
        if stage == "distill":
            rows += list(_distillation(recipe, model, parents))
        elif isinstance(config, Grpo):
            rows.append(_grpo(stage, parents, config, _questions(recipe, stage, config), recipe, model))
        elif isinstance(config, NextToken):
            rows.append(_next_token(stage, parents, config, recipe, model))
        else:
            responses = _responses(recipe, stage)
            work = f"{_count(responses)} responses"
            rows.append(_sampling(stage, parents, work, responses, config, model))
    return rows


def _count(number: float) -> str:
    return f"{number:,.0f}"


def length_of(longest: int) -> float:
    """Tokens that a text is taken to have, of at most `longest`."""
    return max(1.0, LENGTH_SHARE * longest)


def _responses(recipe: Recipe, stage: str) -> int:
    """Responses that a stage samples."""
    if stage == "cold_start":
        routes = len(recipe.cold_start.routes)
        return routes * _asked(recipe, "train", recipe.cold_start.prompts) * recipe.cold_start.samples
    if stage == "rejection":
        return _asked(recipe, "train", recipe.rejection.prompts) * recipe.rejection.samples
    config = recipe.evaluate
    marks = reached = 0
    for split in config.splits:
        once = _asked(recipe, split, config.problems if split == "test" else config.k_problems)
        general = _asked(recipe, split, None, ("helpful", "unsafe"))
        marks += once + general + min(once, config.k_problems) * (config.k + 1)  # k times and once greedily
        reached += min(once, config.reach_problems) * config.reach
    students = len(recipe.distill.students)
    answering = [parent for parent in parents_of("evaluate", recipe) if parent != "reward_models"]
    checkpoints = sum(students if parent == "distill" else 1 for parent in answering)
    return marks * checkpoints + reached * len(set(config.reach_of) & set(answering))


def _asked(recipe: Recipe, split: str, count: int | None, kinds: tuple[str, ...] = ("reasoning",)) -> int:
    """Problems that a draw of `count` (None: of all) asks: no more than the tasks have, where these can be read."""
    if recipe.model.sizes == "recipe":  # the files are as far away as the model
        return count or 0
    there = len(problems(recipe, split, kinds))
    return there if count is None else min(count, there)


def _sampling(
    stage: str, parents: list[str], work: str, responses: int, config: Sampling, model: Parameters
) -> Estimate:
    length = length_of(config.max_new_tokens)
    flops = responses * length * model.forward(length / 2)
    return Estimate(stage, parents, work, responses * length, 0, flops, 0, model.total, model.total * BYTES)


@dataclass(frozen=True)
class Questions:
    """The questions of a rollout: how many, the tokens of their prompts, and how many of these a tree of them holds; 0 where
    they cannot be read here."""

    count: int
    tokens: int
    tree: int

    def read(self, readings: float) -> float:
        """Tokens of prompts in a pass in which each is computed so often: those of the tree, or where a group is parted, which
        no micro-batch of another prompt then joins, all of them each time."""
        return self.tree if readings == 1 else readings * self.tokens


def _questions(recipe: Recipe, stage: str, config: Grpo) -> Questions:
    """Those of the first rollout."""
    asked = config.prompts if stage == "rl_all" else _asked(recipe, "train", config.prompts)
    if recipe.model.sizes == "recipe" or not asked:
        return Questions(asked, 0, 0)
    spec = recipe.model.pretrained
    encoder = Encoder(None, pretrained_tokenizer(spec) if spec else build_tokenizer())
    prompt, pool = prompt_of(stage, recipe), problems(recipe, "train", kinds_of(config))
    chosen = choose(pool, asked, recipe.seed, stage, "problems", 0)
    ids = [each.ids for each in encoder.prompts(map(prompt, chosen))]
    tree = prefix_tree(ids, [[]] * len(ids))
    share = asked / len(ids)  # rl_all asks a question more than once where there are few
    tokens = round(tree.repeated_tokens * share)
    return Questions(asked, tokens, tree.tokens if recipe.shared_prefix else tokens)


def _readings(responses: float, prompt: float, length: float, most: int, shared: bool) -> float:
    """How often a pass over so many responses to a prompt computes it: once in a micro-batch, or for each of them."""
    together = max(1.0, (most - prompt) // length)
    return math.ceil(responses / together) if shared else responses


def _grpo(
    stage: str, parents: list[str], config: Grpo, asked: Questions, recipe: Recipe, model: Parameters
) -> Estimate:
    outputs, group = asked.count * config.group_size, config.group_size
    prompt = asked.tokens / max(1, asked.count)
    # of the questions, those that have a response in a minibatch, and how many they have there
    present = 1 - (1 - 1 / config.minibatches) ** group
    most, shared = config.micro_batch_tokens, recipe.shared_prefix
    # passes for old and reference log-probs; the update takes three, forward and backward
    fixed = (config.old_logprobs == "recomputed") + bool(config.kl_coef)
    tokens = sampling = training = read = 0.0
    for step in range(config.steps):
        length = length_of(max_new_tokens(config, step))
        whole = asked.read(_readings(group, prompt, length, most, shared))
        at_once = group / (config.minibatches * present)
        readings = _readings(at_once, prompt, length, most, shared)
        update = config.minibatches * present * asked.read(readings)
        tokens += outputs * length
        read = whole + outputs * length
        sampling += outputs * length * model.forward(length / 2)
        of_responses = outputs * length * model.forward(prompt + length / 2)
        training += fixed * (whole * model.forward(prompt / 2) + of_responses)
        training += 3 * (update * model.forward(prompt / 2) + of_responses)
    work = f"{_count(config.steps)} rollouts of {_count(outputs)} in {config.minibatches} minibatches"
    if asked.tokens and config.steps:
        repeated = group * asked.tokens + outputs * length
        work += f", {short(read)} tokens a pass"
        work += f" for {short(repeated)}" if read < repeated else ""
    memory = grpo_memory(model, config, recipe, prompt)
    return Estimate(stage, parents, work, tokens, tokens, sampling, training, model.total, *memory)


def grpo_memory(
    model: Parameters, config: Grpo, recipe: Recipe, prompt: float
) -> tuple[float, float | None, float | None]:
    """Bytes that GRPO holds from step to step, and those that a step takes beside them at its peak, as in Estimate; prompt:
    tokens of one."""
    longest = round(prompt) + max([config.max_new_tokens, *config.max_new_tokens_from.values()])
    held = _held(model, config.optimizer, reference=bool(config.kl_coef) and not model.adapted)
    peak = _Peak(
        model,
        recipe,
        config.optimizer,
        config.micro_batch_tokens,
        longest,
        round(prompt),
        recipe.shared_prefix,
    )
    return held, peak.bytes(), peak.bytes(divided=True)


def _held(model: Parameters, optimizer: str, reference: bool = False) -> float:
    """Bytes from step to step: weights, gradients and two moments of what is trained, and a reference."""
    frozen = model.total if model.adapted else 0
    return BYTES * (frozen + 2 * model.trained + reference * model.total) + model.moments(optimizer)


@dataclass(frozen=True)
class _Peak:
    """A step at its peak: the fullest micro-batch is of `tokens`, or one text of the longest where that is more."""

    model: Parameters
    recipe: Recipe
    optimizer: str
    tokens: int
    longest: int
    prompt: int = 0  # tokens of the text that are not learnt
    tree: bool = False

    def bytes(self, divided: bool = False) -> float | None:
        """What autograd keeps of a micro-batch and logits of the head, or temporaries of the optimizer, and one gradient before it
        is added to the others; None: not known.

        divided: of one of the processes that divide the model, which has at once the weights of two layers, this and the next, the
        gradient of one, and both of what stands outside of layers.
        """
        model, half = self.model, self.recipe.dtype == "bfloat16"
        # a tree keeps so much per token, whatever its branches
        rows = 1 if self.tree else max(1, self.tokens // self.longest)
        length = max(self.tokens, self.longest) if self.tree else self.longest
        kept = kept_bytes(
            model.config,
            rows,
            length,
            lora=model.lora,
            recomputes=self.recipe.gradient_checkpointing,
            tree=self.tree or self.recipe.device == "cuda",
            dtype=torch.bfloat16 if half else torch.float32,
            divided=divided,
        )
        if kept is None:
            return None
        learnt = rows * length - self.prompt
        head = min(BYTES * learnt * model.config.get_text_config().vocab_size, SAVED_BYTES)
        if divided:
            return (2 if half else BYTES) * (3 * model.layer + 2 * model.ends) + kept + head
        return BYTES * max(model.sizes) + max(kept + head, model.temporaries(self.optimizer))


def _next_token(
    stage: str, parents: list[str], config: NextToken, recipe: Recipe, model: Parameters
) -> Estimate:
    if stage == "base" and recipe.model.pretrained:
        return Estimate(stage, parents, "taken as it is", 0, 0, 0, 0, model.total, model.total * BYTES)
    if config.steps:
        documents, work = config.steps * config.batch_size, f"{_count(config.steps)} steps"
    else:
        documents, work = config.epochs * _documents(recipe, stage), f"{config.epochs} epochs"
    longest = longest_of(config)
    length = length_of(longest)
    tokens = documents * length
    flops = 3 * tokens * model.forward(length / 2)
    work += f" of {config.batch_size} documents"
    memory = _held(model, config.optimizer)
    peak = _Peak(model, recipe, config.optimizer, config.micro_batch_tokens, longest)
    steps = peak.bytes(), peak.bytes(divided=True)
    return Estimate(stage, parents, work, 0, tokens, 0, flops, model.total, memory, *steps)


def longest_of(config: NextToken) -> int:
    """Tokens of the longest text that a stage learns from; reward models read responses as they were drawn."""
    return config.max_new_tokens if isinstance(config, RewardModels) else config.max_length or DOCUMENT_TOKENS


def _documents(recipe: Recipe, stage: str) -> int:
    """Documents that a supervised stage learns from, at most; those of a file are counted."""
    config: Any = getattr(recipe, stage)
    if getattr(config, "data", ""):
        return len(traces.read(config.data))
    if stage == "sft1":
        return _responses(recipe, "cold_start")
    if stage == "sft2":
        return _mix(recipe)
    if stage == "distill":
        mixed = "rejection" in recipe.stages
        asked = _mix(recipe) if mixed else len(problems(recipe, "train", KINDS))
        return int(config.samples * min(asked, config.prompts or asked))
    return int(config.prompts * config.samples * len(config.samples_from))


def _mix(recipe: Recipe) -> int:
    """Documents of the mix that rejection makes."""
    return round(_responses(recipe, "rejection") / max(1e-9, 1 - recipe.rejection.general_share))


def _distillation(recipe: Recipe, model: Parameters, parents: list[str]) -> Iterator[Estimate]:
    documents = _documents(recipe, "distill")
    drawn = 0 if recipe.distill.data else documents
    yield _sampling("distill", parents, f"{_count(drawn)} responses", drawn, recipe.distill, model)
    for name, student in recipe.distill.students.items():
        sizes, tokens, sampled, training, sampling = of_student(recipe, name, documents, model)
        work = f"{_count(student.steps)} steps" if student.steps else f"{student.epochs} epochs"
        work = f"student of {short(sizes.total)} parameters, {work}, {recipe.distill.method_of(name)}"
        memory = _held(sizes, student.optimizer)
        if _reads_teacher(recipe, name):
            memory += model.total * BYTES
        longest = student.max_length or _longest_trace(recipe)
        peak = _Peak(sizes, recipe, student.optimizer, student.micro_batch_tokens, longest)
        steps = peak.bytes(), peak.bytes(divided=True)
        yield Estimate(
            f"  {name}", [], work, sampled, tokens, sampling, training, sizes.total, memory, *steps
        )


class OfStudent(NamedTuple):
    """What a student is and takes: its parameters, tokens that it learns and samples, and operations of both."""

    sizes: Parameters
    trained_tokens: float
    sampled_tokens: float
    training_flops: float
    sampling_flops: float


def of_student(recipe: Recipe, name: str, documents: int, teacher: Parameters) -> OfStudent:
    """What a student of the distillation takes. documents: that pass the filters, or are in a file."""
    student, first = recipe.distill.students[name], recipe.distill.beginning_of(name)
    # one from random weights has the teacher's tokenizer
    spec = recipe.model.pretrained if recipe.model.sizes == "folder" else ""
    vocabulary = pretrained_config(spec).get_text_config().vocab_size if spec else _vocabulary(recipe)
    in_folder = first.pretrained and recipe.model.sizes == "folder"
    config = pretrained_config(first.pretrained) if in_folder else config_of(first, vocabulary)
    sizes = count(config, student.lora)
    length = length_of(student.max_length or _longest_trace(recipe))
    tokens = (student.steps * student.batch_size or student.epochs * documents) * length
    training = 3 * tokens * sizes.forward(length / 2)
    if _reads_teacher(recipe, name):
        training += tokens * teacher.forward(length / 2)
    sampled = tokens if recipe.distill.method_of(name) == "on_policy" else 0
    return OfStudent(sizes, tokens, sampled, training, sampled * sizes.forward(length / 2))


def _reads_teacher(recipe: Recipe, name: str) -> bool:
    """Whether the teacher reads what the student learns."""
    return bool(recipe.distill.method_of(name) != "sft" and recipe.distill.teacher)


def _longest_trace(recipe: Recipe) -> int:
    return DOCUMENT_TOKENS if recipe.distill.data else recipe.distill.max_new_tokens
