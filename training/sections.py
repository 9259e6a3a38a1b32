"""Every setting of a run as dataclasses: one per stage, the model, and `Recipe` that holds them.

The values here are defaults; recipes/*.yaml and `key=value` words are laid over them by training.recipe. Learning rates
and lengths have a second default, for a pretrained model (`model.pretrained`): those of the small ones would wreck it.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from training.config import about, field_types, is_section, setting


@dataclass
class Lora:
    """Adapters in place of training all weights (LoRA, arXiv 2106.09685), by the package peft: `model.lora` in every stage that
    trains the recipe's model after base, `distill.students.NAME.lora` for a pretrained student. Learning rates want to be about
    ten times those of all weights."""

    rank: int = setting(0, "of the adapters; 0: none, all weights are trained", minimum=0)
    alpha: float = setting(0.0, "what they add is scaled by alpha / rank; 0: twice the rank", minimum=0)
    dropout: float = setting(0.0, "of what they read, in SFT", minimum=0, below=1)
    targets: list[str] = field(
        default_factory=list,
        metadata=about(
            "names of the layers that get them, as q_proj; empty: every linear layer but the head"
        ),
    )
    experts: bool = setting(False, "the experts of a mixture get them too")


@dataclass
class Model:
    """Sizes of the model that `base` pretrains (transformers' DeepSeek-V3 classes), or where to find one."""

    pretrained: str = setting(
        "",
        '"": trained from nothing; "smollm2", the folder of a Hugging Face checkpoint, or a name on its hub',
    )
    sizes: Literal["folder", "recipe"] = setting(
        "folder",
        "where a dry run takes the sizes of a pretrained model from: its folder, or the numbers below, where it is far away",
    )
    hidden_size: int = setting(96, "width of the model", minimum=1)
    layers: int = setting(3, "layers in all", minimum=1)
    dense_layers: int = setting(1, "the first layers, which have one plain MLP instead of experts", minimum=0)
    heads: int = setting(4, "attention heads", minimum=1)
    intermediate_size: int = setting(256, "width of the MLP in the dense layers", minimum=1)
    moe_intermediate_size: int = setting(48, "width of an expert", minimum=1)
    experts: int = setting(8, "routed experts of a layer", minimum=1)
    experts_per_token: int = setting(2, "routed experts that a token goes to", minimum=1)
    shared_experts: int = setting(1, "experts that every token goes to", minimum=0)
    expert_groups: int = setting(1, "groups of experts; a token chooses among the best groups", minimum=1)
    expert_groups_per_token: int = setting(1, "groups that a token may choose from", minimum=1)
    routed_scaling_factor: float = setting(1.0, "factor of the routed experts' output", above=0)
    q_lora_rank: int = setting(0, "width of compressed queries; 0: they are not compressed", minimum=0)
    kv_lora_rank: int = setting(32, "width of compressed keys and values", minimum=1)
    qk_rope_head_dim: int = setting(16, "part of a head's query and key with rotary positions", minimum=2)
    qk_nope_head_dim: int = setting(16, "part without", minimum=1)
    v_head_dim: int = setting(24, "width of a head's value", minimum=1)
    max_length: int = setting(256, "positions", minimum=1)
    vocab_size: int = setting(0, "entries of the vocabulary; 0: those of the tokenizer", minimum=0)
    lora: Lora = field(default_factory=Lora, metadata=about("adapters in place of training all weights"))


@dataclass
class NextToken:
    """Next-token training: `steps` optimizer steps, or `epochs` passes over the data where steps is 0."""

    steps: int = setting(0, "optimizer steps; 0: as many as the epochs take", minimum=0)
    epochs: int = setting(2, "passes over the data, where steps is 0", minimum=0)
    batch_size: int = setting(32, "documents a step", minimum=1)
    lr: float = setting(1e-3, "learning rate after the warm-up", minimum=0, pretrained=1e-5)
    lr_end: float = setting(
        1e-4, "the learning rate falls on a cosine from lr to lr_end", minimum=0, pretrained=1e-6
    )
    warmup: int = setting(0, "steps of linear warm-up", minimum=0)
    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw", "adamw_8bit: its moments in 8 bits (arXiv 2110.02861), by the package bitsandbytes"
    )
    weight_decay: float = setting(0.0, "of the matrices, by AdamW", minimum=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: any", minimum=0)
    max_length: int = setting(
        192, "tokens a document; 0: as many as the model reads", minimum=0, pretrained=0
    )
    micro_batch_tokens: int = setting(
        4096,
        "tokens in one forward and backward pass: padded ones, or those of a tree of shared prefixes",
        minimum=1,
        rounding=True,
    )
    bias_rate: float = setting(1e-3, "step of the router bias towards an even load of the experts", minimum=0)
    save_every: int = setting(
        100, "steps between resume points, at most ten minutes; 0: none", minimum=0, operational=True
    )


@dataclass
class Base(NextToken):
    """Pretraining; with `model.pretrained` nothing is trained."""

    steps: int = setting(1500, "optimizer steps", minimum=0)
    epochs: int = setting(0, "the corpus is made for the steps", minimum=0, idle=True)
    batch_size: int = setting(96, "documents a step", minimum=1)
    lr: float = setting(2e-3, "learning rate after the warm-up", minimum=0)
    lr_end: float = setting(2e-4, "the learning rate falls on a cosine from lr to lr_end", minimum=0)
    corpus: dict[str, float] = field(
        default_factory=lambda: {
            "tidy": 0.02,
            "mixed": 0.11,
            "hasty": 0.46,
            "sloppy": 0.02,
            "formless": 0.05,
            "code": 0.02,
            "overlong": 0.01,
            "repetition": 0.01,
            "few_shot": 0.04,
            "reflect": 0.04,
            "series": 0.11,
            "general": 0.11,
        },
        metadata=about(
            "share of each kind of document; what is good is a minority: tidy and mixed set how often the base model is right, "
            "their ratio how much R1-Zero mixes"
        ),
    )


@dataclass
class Sampling:
    """How responses are drawn from a checkpoint."""

    temperature: float = setting(1.0, "of sampling; 0: greedy", minimum=0)
    top_p: float = setting(
        1.0, "sample from the likeliest tokens that reach this probability together", above=0, maximum=1
    )
    top_k: int = setting(0, "sample from that many likeliest tokens, before top_p; 0: from all", minimum=0)
    max_new_tokens: int = setting(64, "longest response, in tokens", minimum=1, pretrained=1024)
    batch_size: int = setting(256, "sequences in flight", minimum=1, pretrained=64, rounding=True)

    def options(self) -> dict[str, Any]:
        """These settings by name, as `responses.draw` and `loops.sample` take them."""
        return {each.name: getattr(self, each.name) for each in fields(Sampling)}


@dataclass
class Grpo:
    """GRPO. One step is one rollout: `prompts` x `group_size` outputs, split into `minibatches` updates."""

    steps: int = setting(60, "rollouts; each is split into minibatches, one optimizer step each", minimum=0)
    prompts: int = setting(24, "questions of a rollout", minimum=1)
    group_size: int = setting(16, "responses to a question", minimum=2)
    minibatches: int = setting(2, "optimizer steps of a rollout", minimum=1)
    lr: float = setting(5e-4, "learning rate after the warm-up", minimum=0, pretrained=1e-6)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "linear", "how the learning rate goes from lr to lr_end"
    )
    lr_end: float = setting(
        0.0, "of linear and cosine: where they lead, the learning rate behind the last step", minimum=0
    )
    warmup: int = setting(
        0, "steps of linear warm-up: Adam's first steps are as long as the rate allows", minimum=0
    )
    optimizer: Literal["adamw", "adamw_8bit"] = setting(
        "adamw", "adamw_8bit: its moments in 8 bits (arXiv 2110.02861), by the package bitsandbytes"
    )
    weight_decay: float = setting(0.0, "of the matrices, by AdamW", minimum=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: any", minimum=0)
    kl_coef: float = setting(1e-3, "weight of the KL term; 0: no reference is held", minimum=0)
    clip: float = setting(0.2, "the ratio is clipped to 1 - clip and 1 + clip", minimum=0)
    temperature: float = setting(1.0, "of the rollout", above=0)
    top_p: float = setting(
        1.0,
        "the rollout draws from the likeliest tokens that reach this probability together, and all log-probs are those among them",
        above=0,
        maximum=1,
    )
    top_k: int = setting(0, "likewise from that many likeliest tokens, before top_p; 0: from all", minimum=0)
    max_new_tokens: int = setting(64, "longest response, in tokens", minimum=1, pretrained=1024)
    max_new_tokens_from: dict[int, int] = field(
        default_factory=dict, metadata=about("step -> max_new_tokens from that step on")
    )
    batch_size: int = setting(
        384, "sequences in flight while sampling", minimum=1, pretrained=64, rounding=True
    )
    micro_batch_tokens: int = setting(
        4096,
        "tokens in one forward and backward pass: padded ones, or those of a tree of shared prefixes",
        minimum=1,
        rounding=True,
    )
    reference_every: int = setting(0, "steps until the reference becomes the policy; 0: never", minimum=0)
    variant: str = setting("grpo", "of the loss, as in r1kernels.grpo_loss")
    ratio: Literal["token", "sequence", "output"] = setting(
        "token", "level of the importance ratio; output is the paper's formula"
    )
    reduction: str = setting("sequence", "how token losses become one, as in r1kernels.grpo_loss")
    fused_loss: bool = setting(
        False, "hidden states to loss in one op, for large vocabularies; the same to rounding"
    )
    replay: bool = setting(True, "routing of the rollout is replayed in the log-prob passes")
    old_logprobs: Literal["recomputed", "sampler"] = setting(
        "recomputed",
        "log-probs of the policy that drew: recomputed by a pass before the first update, or the sampler's own, which saves it",
    )
    rewards: dict[str, float] = field(
        default_factory=lambda: {"accuracy": 1.0, "format": 1.0},
        metadata=about('weight of each reward term; a reward of one\'s own is "python:FILE:FUNCTION"'),
    )
    keep_groups: Literal["all", "spread"] = setting(
        "all",
        "spread: groups whose responses all earn the same are left out, for they would only dilute the others",
    )
    sampling_rounds: int = setting(
        1,
        "with keep_groups: spread, up to so many rounds of further questions until `prompts` groups have a spread: DAPO's dynamic sampling (arXiv 2503.14476, eq. 11)",
        minimum=1,
    )
    mask_truncated: bool = setting(
        False, "responses cut at the limit carry no loss: DAPO's overlong filtering (section 3.4)"
    )
    bias_rate: float = setting(1e-3, "step of the router bias towards an even load of the experts", minimum=0)
    save_every: int = setting(
        10, "steps between resume points, at most ten minutes; 0: none", minimum=0, operational=True
    )


@dataclass
class Rollout:
    """Who draws responses, in every stage that asks a model."""

    engine: Literal["transformers", "vllm"] = setting(
        "transformers",
        "transformers: the model itself, in the process of the run; vllm: a server, which `url` names or `start` starts",
    )
    url: str = setting("", "of a vLLM server that runs, such as http://127.0.0.1:8000", operational=True)
    start: bool = setting(
        False, "start a vLLM server for the stages that ask one, and stop it behind each", operational=True
    )
    python: str = setting(
        ".venv-vllm/bin/python",
        "the Python that has vLLM, for `start`; `make vllm` makes it",
        operational=True,
    )
    options: list[str] = field(
        default_factory=list,
        metadata=about("further words of the command of a server that is started", operational=True),
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the weights that a server is given, and that a server which is started computes in"
    )
    tolerance: float = setting(
        1e-3,
        "between the log-probs of a server and the trainer's own after an update, on average over the tokens of a probe; more "
        "stops the run",
        above=0,
        operational=True,
    )
    max_gap: float = setting(
        0.0,
        "largest |log-prob of a token as the sampler gives it - as the trainer does| in a step of GRPO; more stops the run. 0: "
        "in the process 1e-3, of a server 1e-2; with bfloat16 1 and 5; of a pretrained model in the process five times as much",
        minimum=0,
        operational=True,
    )
    timeout: float = setting(
        600.0, "seconds that one answer of a server, or its start, may take", above=0, operational=True
    )
    stale: Literal["refuse", "correct"] = setting(
        "refuse",
        "what becomes of responses that other weights have drawn than those of the step: correct weighs every token of the "
        "step by how much likelier the policy finds it than the sampler did",
    )
    importance_weights: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        setting("token_truncate", "with stale: correct, how, as in r1kernels.importance_weights")
    )
    importance_cap: float = setting(2.0, "with stale: correct, the largest weight", above=0)


@dataclass
class Parallel:
    """The processes of a run, each of which computes a share of every step: `replicate` models, each held by `shard` processes."""

    processes: int = setting(
        1,
        "processes on this machine, which `run` starts by torchrun; 0: one for each GPU, or for as many cores as `threads`, at most 8; where torchrun starts them, it says how many",
        minimum=0,
        rounding=True,
    )
    replicate: int = setting(
        0, "models that are trained side by side; 0: one for each `shard` processes", minimum=0, rounding=True
    )
    shard: int = setting(
        1,
        "processes that divide weights, gradients and moments of a model among them (FSDP2); 1: each has them all",
        minimum=1,
        rounding=True,
    )
    timeout: float = setting(
        1800.0, "seconds that a process waits for another one before the run ends", above=0, operational=True
    )


@dataclass
class Example:
    """A worked example: a question and a response in the form that is asked for."""

    question: str = setting("", "what is asked")
    response: str = setting("", "the response that is shown")


@dataclass
class Zero(Grpo):
    """R1-Zero. A pretrained model that never answers in the template's form earns no reward to learn from: examples that
    stand before every question, for base and zero alike, give it some."""

    start: str = setting("base", "base, or the folder of a checkpoint")
    examples: list[Example] = field(
        default_factory=list, metadata=about("stand before every question, for base and zero alike")
    )


@dataclass
class ColdStart(Sampling):
    """Long chain-of-thought data by up to three routes."""

    routes: dict[Literal["few_shot", "reflect", "refine"], Literal["base", "zero"]] = field(
        default_factory=lambda: {"few_shot": "base", "reflect": "base", "refine": "zero"},
        metadata=about("route -> the stage whose checkpoint answers", filled=True),
    )
    prompts: int = setting(512, "problems of a route", minimum=1)
    samples: int = setting(4, "responses to a problem", minimum=1)
    examples: int = setting(2, "worked examples in a few-shot prompt", minimum=1)
    filters: list[str] = field(
        default_factory=lambda: ["wrong_by_rule", "mixed_language", "repetition", "bad_format"],
        metadata=about("what a response must pass (training.filters)"),
    )


@dataclass
class RlReasoning(Grpo):
    """GRPO with the language reward beside accuracy and format."""

    start: str = setting("sft1", "sft1, another stage before, or the folder of a checkpoint")
    steps: int = setting(40, "rollouts; each is split into minibatches, one optimizer step each", minimum=0)
    rewards: dict[str, float] = field(
        default_factory=lambda: {"accuracy": 1.0, "format": 1.0, "language_consistency": 1.0},
        metadata=about('weight of each reward term; a reward of one\'s own is "python:FILE:FUNCTION"'),
    )


@dataclass
class Judge(NextToken):
    """The generative judge: a small language model that writes its verdict as JSON."""

    start: str = setting("base", "base, or the folder of a checkpoint")
    samples_from: list[str] = field(
        default_factory=lambda: ["base", "zero", "sft1", "rl_reasoning"],
        metadata=about("stages whose checkpoints give the responses that are judged", filled=True),
    )
    prompts: int = setting(512, "problems", minimum=1)
    samples: int = setting(4, "responses of a checkpoint to a problem", minimum=1)
    temperature: float = setting(1.0, "of those responses; 0: greedy", minimum=0)
    max_new_tokens: int = setting(64, "longest of those responses, in tokens", minimum=1, pretrained=1024)
    held_out: float = setting(
        0.1, "share of the problems kept for the agreement with the rule", above=0, maximum=1
    )
    minimum_agreement: float = setting(
        0.95, "with the rule on held-out responses; less is warned of", minimum=0, maximum=1
    )


@dataclass
class Rejection(Sampling):
    """Rejection sampling and the non-reasoning data beside it."""

    prompts: int = setting(1024, "reasoning problems", minimum=1)
    samples: int = setting(4, "responses to a problem", minimum=1)
    judged_share: float = setting(
        0.25, "share of the reasoning problems for the judge, not the rule", minimum=0, maximum=1
    )
    general_share: float = setting(
        0.25, "share of other data in the mix; 200k of 800k in the paper", minimum=0, below=1
    )
    general_checked: float = setting(
        1.0, "share of the other questions whose answers the oracle checks", minimum=0, maximum=1
    )
    general_from: str = setting(
        "base", "the stage whose checkpoint answers the questions that need no reasoning"
    )
    paragraph_words: int = setting(200, "a longer paragraph is rejected", minimum=1)
    filters: list[str] = field(
        default_factory=lambda: [
            "wrong_by_rule",
            "wrong_by_judge",
            "mixed_language",
            "overlong_paragraph",
            "code_block",
            "repetition",
            "bad_format",
            "unfinished",
            "duplicate",
        ],
        metadata=about("what a response must pass (training.filters)"),
    )


@dataclass
class Sft1(NextToken):
    """The first SFT."""

    start: str = setting("base", "base, or the folder of a checkpoint")
    data: str = setting("", "a file of traces (training.traces) instead of the cold-start data")


@dataclass
class Sft2(NextToken):
    """The second SFT."""

    start: str = setting(
        "rl_reasoning", "rl_reasoning; base, as the paper has it; or the folder of a checkpoint"
    )
    data: str = setting("", "a file of traces (training.traces) instead of the mix of rejection")


@dataclass
class RewardModels(NextToken):
    """The helpful model (pairwise) and the safety model (pointwise)."""

    start: str = setting("sft2", "sft2, base, or the folder of a checkpoint")
    samples_from: list[str] = field(
        default_factory=lambda: ["base", "sft2"],
        metadata=about("stages whose checkpoints give the responses that are compared", filled=True),
    )
    prompts: int = setting(512, "problems of each kind", minimum=1)
    samples: int = setting(4, "responses to a helpful problem", minimum=1)
    unsafe_samples: int = setting(12, "responses to an unsafe problem, of which there are few", minimum=1)
    pairs: int = setting(4, "most pairs of a problem", minimum=1)
    temperature: float = setting(1.0, "of those responses; 0: greedy", minimum=0)
    max_new_tokens: int = setting(64, "longest of those responses, in tokens", minimum=1, pretrained=1024)
    max_length: int = setting(
        192, "a text is scored as far as the model reads", minimum=0, pretrained=0, idle=True
    )
    bias_rate: float = setting(1e-3, "the router bias stays as it is", minimum=0, idle=True)


@dataclass
class RlAll(Grpo):
    """GRPO over reasoning, helpful and unsafe prompts."""

    start: str = setting("sft2", "sft2, another stage before, or the folder of a checkpoint")
    steps: int = setting(20, "rollouts; each is split into minibatches, one optimizer step each", minimum=0)
    temperature: float = setting(0.7, "of the rollout", above=0)
    preference_share: float = setting(
        400 / 1700, "the last share of the steps, in which the reward models count", minimum=0, maximum=1
    )
    mix: dict[str, float] = field(
        default_factory=lambda: {"reasoning": 0.5, "helpful": 0.3, "unsafe": 0.2},
        metadata=about("share of each kind of problems"),
    )
    rewards: dict[str, float] = field(
        default_factory=lambda: {
            "accuracy": 1.0,
            "format": 1.0,
            "language_consistency": 1.0,
            "helpful": 1.0,
            "harmless": 1.0,
        },
        metadata=about('weight of each reward term; a reward of one\'s own is "python:FILE:FUNCTION"'),
    )


@dataclass
class Student(NextToken):
    """One student of the distillation: a small dense model."""

    method: Literal["", "sft", "logits", "on_policy"] = setting("", '"": as distill.method says')
    start: str = setting("", 'a student listed before, from which it goes on; "": none')
    architecture: Literal["qwen2", "llama"] = setting("qwen2", "of a student from random weights")
    pretrained: str = setting("", '"": random weights; else the folder of a checkpoint or a name on the hub')
    hidden_size: int = setting(64, "width of the model", minimum=1)
    layers: int = setting(2, "layers", minimum=1)
    heads: int = setting(4, "attention heads", minimum=1)
    intermediate_size: int = setting(192, "width of the MLP", minimum=1)
    # the teacher's responses are as long as distill.max_new_tokens lets them be
    max_length: int = setting(0, "tokens a document; 0: as many as the model reads", minimum=0)
    lora: Lora = field(
        default_factory=Lora, metadata=about("adapters of a student that does not begin from random weights")
    )


def _students() -> dict[str, Student]:
    return {"qwen2": Student(architecture="qwen2"), "llama": Student(architecture="llama")}


@dataclass
class Distill(Sampling):
    """The teacher answers the SFT prompts; each student learns from what passes the filters."""

    method: Literal["sft", "logits", "on_policy"] = setting(
        "sft",
        "what students learn: the teacher's responses (sft), its distribution of them (logits), or its distribution of what they "
        "answer themselves (on_policy)",
    )
    divergence: Literal["", "forward_kl", "reverse_kl", "jsd"] = setting(
        "", 'from the teacher\'s distribution; "": forward_kl for logits, reverse_kl for on_policy'
    )
    beta: float = setting(0.5, "of jsd, the teacher's share of the mixture", above=0, below=1)
    teacher: str = setting("rl_all", "rl_all, another stage before, or the folder of a checkpoint")
    data: str = setting(
        "",
        "a file of traces (training.traces), with stored log-probs or without, instead of the teacher's responses",
    )
    prompts: int = setting(0, "problems that the teacher is asked; 0: all", minimum=0)
    samples: int = setting(4, "responses to a prompt", minimum=1)
    filters: list[str] = field(
        default_factory=lambda: ["wrong_by_rule", "mixed_language", "repetition", "bad_format", "unfinished"],
        metadata=about("what a response must pass (training.filters)"),
    )
    students: dict[str, Student] = field(
        default_factory=_students, metadata=about("name of a student -> its settings", filled=True)
    )

    def method_of(self, student: str) -> str:
        """How a student learns."""
        return self.students[student].method or self.method

    def beginning_of(self, student: str) -> Student:
        """The settings of the student that is first in the row of those from which this one goes on."""
        names = list(self.students)
        while (start := self.students[student].start) in names[: names.index(student)]:
            student = start
        return self.students[student]


@dataclass
class Evaluate(Sampling):
    """Marks of every checkpoint: one sample each at `temperature`, then k samples at T 0.6, top-p 0.95."""

    problems: int = setting(1024, "held-out problems of the marks at `temperature`", minimum=1)
    k: int = setting(4, "samples of a problem for pass@1 (mean of k), pass@k and maj@k", minimum=1)
    k_problems: int = setting(256, "problems that are asked k times, and of every other split", minimum=1)
    k_temperature: float = setting(0.6, "of the k samples", minimum=0)
    k_top_p: float = setting(0.95, "of the k samples", above=0, maximum=1)
    reach: int = setting(
        0,
        "samples of a problem at `temperature`, for pass@k of k from 1 to so many: what sampling reaches; 0: none",
        minimum=0,
    )
    reach_problems: int = setting(64, "problems of every split that are asked so often", minimum=1)
    reach_of: list[str] = field(
        default_factory=lambda: ["base", "zero"], metadata=about("checkpoints whose reach is measured")
    )
    splits: list[Literal["train", "test", "harder", "hardest"]] = field(
        default_factory=lambda: ["test", "harder"],
        metadata=about("which problems are asked; test is needed", filled=True),
    )


@dataclass
class Recipe:
    """Every setting of a run."""

    name: str = setting("custom", "of the run's folder")
    description: str = setting("", "one line for people")
    seed: int = setting(0, "of every random draw", minimum=0)
    threads: int = setting(1, "torch CPU threads", minimum=1, rounding=True)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: the GPU where torch sees one", rounding=True
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of forward passes (autocast); parameters are float32"
    )
    experts_implementation: Literal["r1kernels", "grouped_mm", "eager"] = setting(
        "r1kernels", "who computes the experts: r1kernels, or transformers' own", rounding=True
    )
    deterministic: bool = setting(
        False, "on CUDA: deterministic algorithms, so that a resume is exact there too", rounding=True
    )
    gradient_checkpointing: bool = setting(
        False, "layers recompute activations in the backward pass: less memory", rounding=True
    )
    shared_prefix: bool = setting(
        True,
        "what sequences have in common, as the prompt of a group, is computed once in log-prob passes and next-token training, and no padding is",
        rounding=True,
    )
    sinks: list[Literal["tensorboard", "trackio", "wandb"]] = field(
        default_factory=list,
        metadata=about("who gets the metrics beside metrics.jsonl (training.sinks)", operational=True),
    )
    stages: list[str] = field(
        default_factory=lambda: list(STAGE_NAMES), metadata=about("what is run", filled=True)
    )
    task: list[str] = field(
        default_factory=lambda: ["arithmetic", "general"],
        metadata=about(
            'sources of problems: arithmetic, general, countdown, "reasoning_gym:NAME", "gsm_symbolic:LANGUAGES", "jsonl:FILE", "parquet:FILE", "hf:DATASET", "python:FILE:CLASS"',
            filled=True,
        ),
    )
    task_options: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata=about("task -> its keyword arguments")
    )
    reward_seconds: float = setting(
        10.0,
        "seconds that one call of a reward of one's own, or of the check of a task of one's own, may take",
        above=0,
        operational=True,
    )
    system_prompt: str = setting("", "stands before every conversation that has none of its own")
    response_format: Literal["answer_tags", "boxed", "free"] = setting(
        "answer_tags", "where the answer stands"
    )
    model: Model = field(default_factory=Model)
    rollout: Rollout = field(default_factory=Rollout)
    parallel: Parallel = field(default_factory=Parallel)
    base: Base = field(default_factory=Base)
    zero: Zero = field(default_factory=Zero)
    cold_start: ColdStart = field(default_factory=ColdStart)
    sft1: Sft1 = field(default_factory=Sft1)
    rl_reasoning: RlReasoning = field(default_factory=RlReasoning)
    judge: Judge = field(default_factory=Judge)
    rejection: Rejection = field(default_factory=Rejection)
    sft2: Sft2 = field(default_factory=Sft2)
    reward_models: RewardModels = field(default_factory=RewardModels)
    rl_all: RlAll = field(default_factory=RlAll)
    distill: Distill = field(default_factory=Distill)
    evaluate: Evaluate = field(default_factory=Evaluate)


STAGE_NAMES: tuple[str, ...] = tuple(
    name
    for name, kind in field_types(Recipe).items()
    if is_section(kind) and kind not in (Model, Rollout, Parallel)
)
"""The stages in the order of the pipeline: the sections of a recipe but for model, rollout and parallel."""
