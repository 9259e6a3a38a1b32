"""Every setting of a run as dataclasses: one a stage, the model, and `Recipe` that holds them.

The values here are defaults; recipes/*.yaml and `key=value` words are laid over them by training.recipe. Learning rates
and lengths have a second default, for a pretrained model (`model.pretrained`): those of the small ones would wreck it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from training.config import FILLED, at_least, operational, ranged, rounding

STAGE_NAMES = (
    "base",
    "zero",
    "cold_start",
    "sft1",
    "rl_reasoning",
    "judge",
    "rejection",
    "sft2",
    "reward_models",
    "rl_all",
    "distill",
    "evaluate",
)


@dataclass
class Model:
    """Sizes of the model that `base` pretrains (transformers' DeepSeek-V3 classes), or where to find one."""

    # "" trains from nothing; "smollm2", the folder of a Hugging Face checkpoint, or a name on its hub
    pretrained: str = ""
    # where a dry run takes the sizes of a pretrained model from: its folder, or the numbers below, where it is far away
    sizes: Literal["folder", "recipe"] = "folder"
    hidden_size: int = at_least(1, 96)
    layers: int = at_least(1, 3)
    dense_layers: int = at_least(0, 1)  # the first layers, which have one plain MLP instead of experts
    heads: int = at_least(1, 4)
    intermediate_size: int = at_least(1, 256)  # of the MLP in the dense layers
    moe_intermediate_size: int = at_least(1, 48)
    experts: int = at_least(1, 8)
    experts_per_token: int = at_least(1, 2)
    shared_experts: int = at_least(0, 1)
    expert_groups: int = at_least(1, 1)
    expert_groups_per_token: int = at_least(1, 1)
    routed_scaling_factor: float = 1.0
    q_lora_rank: int = at_least(0, 0)  # 0: queries are not compressed
    kv_lora_rank: int = at_least(1, 32)
    qk_rope_head_dim: int = at_least(2, 16)
    qk_nope_head_dim: int = at_least(1, 16)
    v_head_dim: int = at_least(1, 24)
    max_length: int = at_least(1, 256)  # positions
    vocab_size: int = at_least(0, 0)  # 0: the size of the tokenizer


@dataclass
class NextToken:
    """Next-token training: `steps` optimizer steps, or `epochs` passes over the data where steps is 0."""

    steps: int = at_least(0, 0)
    epochs: int = at_least(0, 2)
    batch_size: int = at_least(1, 32)  # documents a step
    lr: float = at_least(0, 1e-3, pretrained=1e-5)
    lr_end: float = at_least(
        0, 1e-4, pretrained=1e-6
    )  # the learning rate falls on a cosine from lr to lr_end
    warmup: int = at_least(0, 0)  # steps of linear warm-up
    weight_decay: float = at_least(0, 0.0)
    grad_clip: float = at_least(0, 1.0)  # largest norm of the gradient
    max_length: int = at_least(0, 128, pretrained=0)  # tokens a document; 0: as many as the model reads
    micro_batch_tokens: int = rounding(4096, 1)  # padded tokens in one forward and backward pass
    bias_rate: float = at_least(0, 1e-3)  # step of the router bias towards an even load of the experts
    save_every: int = operational(100)  # steps between resume points; 0: none


@dataclass
class Base(NextToken):
    """Pretraining; with `model.pretrained` nothing is trained."""

    steps: int = at_least(0, 1500)
    epochs: int = at_least(0, 0)
    batch_size: int = at_least(1, 96)
    lr: float = at_least(0, 2e-3)
    lr_end: float = at_least(0, 2e-4)
    # Share of each kind of document (arithmetic.corpus_document; "general" is general.corpus_document). What is good
    # is a minority: "tidy" and "mixed" set how often the base model is right, their ratio how much R1-Zero mixes.
    corpus: dict[str, float] = field(
        default_factory=lambda: {
            "tidy": 0.02,
            "mixed": 0.13,
            "sloppy": 0.15,
            "formless": 0.24,
            "bare": 0.15,
            "code": 0.03,
            "overlong": 0.02,
            "repetition": 0.02,
            "few_shot": 0.05,
            "reflect": 0.05,
            "general": 0.14,
        }
    )


@dataclass
class Sampling:
    """How responses are drawn from a checkpoint."""

    temperature: float = at_least(0, 1.0)  # 0: greedy
    top_p: float = ranged(1.0, above=0, maximum=1)
    max_new_tokens: int = at_least(1, 64, pretrained=1024)
    batch_size: int = rounding(256, 1, pretrained=64)  # sequences in flight


@dataclass
class Grpo:
    """GRPO. One step is one rollout: `prompts` x `group_size` outputs, split into `minibatches` updates."""

    steps: int = at_least(0, 60)
    prompts: int = at_least(1, 24)
    group_size: int = at_least(2, 16)
    minibatches: int = at_least(1, 2)
    lr: float = at_least(0, 5e-4, pretrained=1e-6)
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    lr_end: float = at_least(0, 0.0)
    warmup: int = at_least(0, 0)  # steps of linear warm-up: Adam's first steps are as long as the rate allows
    weight_decay: float = at_least(0, 0.0)
    grad_clip: float = at_least(0, 1.0)
    kl_coef: float = at_least(0, 1e-3)
    clip: float = at_least(0, 0.2)
    temperature: float = ranged(1.0, above=0)
    max_new_tokens: int = at_least(1, 64, pretrained=1024)
    max_new_tokens_from: dict[int, int] = field(
        default_factory=dict
    )  # step -> max_new_tokens from that step on
    batch_size: int = rounding(384, 1, pretrained=64)  # sequences in flight while sampling
    micro_batch_tokens: int = rounding(4096, 1)  # padded tokens in one forward and backward pass
    reference_every: int = at_least(0, 0)  # steps until the reference becomes the policy; 0: never
    variant: str = "grpo"  # as in r1kernels.grpo_loss
    ratio: Literal["token", "sequence", "output"] = "token"
    reduction: str = "sequence"
    fused_loss: bool = False  # hidden states to loss in one op, for large vocabularies; the same to rounding
    replay: bool = True  # routing of the rollout is replayed in the log-prob passes
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})
    # spread: groups whose responses all earn the same are left out, for they would only dilute the others. With more sampling
    # rounds further questions are asked until `prompts` groups have a spread: DAPO's dynamic sampling (arXiv 2503.14476, eq. 11)
    keep_groups: Literal["all", "spread"] = "all"
    sampling_rounds: int = at_least(1, 1)
    mask_truncated: bool = (
        False  # responses cut at the limit carry no loss: DAPO's overlong filtering (section 3.4)
    )
    bias_rate: float = at_least(0, 1e-3)
    save_every: int = operational(10)  # steps between resume points; 0: none


@dataclass
class Example:
    """A worked example: a question and a response in the form that is asked for."""

    question: str = ""
    response: str = ""


@dataclass
class Zero(Grpo):
    """R1-Zero. A pretrained model that never answers in the template's form earns no reward to learn from: examples that
    stand before every question, for base and zero alike, give it some."""

    start: str = "base"  # or the folder of a checkpoint
    examples: list[Example] = field(default_factory=list)


@dataclass
class ColdStart(Sampling):
    """Long chain-of-thought data by three routes."""

    prompts: int = at_least(1, 512)  # problems a route
    samples: int = at_least(1, 4)  # responses a problem
    examples: int = at_least(1, 2)  # worked examples in a few-shot prompt
    filters: list[str] = field(
        default_factory=lambda: ["wrong_by_rule", "mixed_language", "repetition", "bad_format"]
    )


@dataclass
class RlReasoning(Grpo):
    """GRPO with the language reward beside accuracy and format."""

    start: str = "sft1"  # or another stage before, or the folder of a checkpoint
    steps: int = at_least(0, 40)
    rewards: dict[str, float] = field(
        default_factory=lambda: {"accuracy": 1.0, "format": 1.0, "language_consistency": 1.0}
    )


@dataclass
class Judge(NextToken):
    """The generative judge: a small language model that writes its verdict as JSON."""

    start: str = "base"  # or the folder of a checkpoint
    samples_from: list[str] = field(
        default_factory=lambda: ["base", "zero", "sft1", "rl_reasoning"], metadata=FILLED
    )
    prompts: int = at_least(1, 512)
    samples: int = at_least(1, 4)
    temperature: float = at_least(0, 1.0)
    max_new_tokens: int = at_least(1, 64, pretrained=1024)
    # share of the problems kept for the agreement with the rule
    held_out: float = ranged(0.1, above=0, maximum=1)
    minimum_agreement: float = ranged(0.95, minimum=0, maximum=1)


@dataclass
class Rejection(Sampling):
    """Rejection sampling and the non-reasoning data beside it."""

    prompts: int = at_least(1, 1024)
    samples: int = at_least(1, 4)
    judged_share: float = ranged(0.25, minimum=0, maximum=1)  # reasoning problems for the judge, not the rule
    general_share: float = ranged(0.25, minimum=0, below=1)  # of the mix; 200k of 800k in the paper
    general_checked: float = ranged(
        1.0, minimum=0, maximum=1
    )  # share of the other questions whose answers the oracle checks
    general_from: str = "base"  # the stage whose checkpoint answers the questions that need no reasoning
    paragraph_words: int = at_least(1, 200)  # a longer paragraph is rejected
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
        ]
    )


@dataclass
class Sft1(NextToken):
    """The first SFT."""

    start: str = "base"  # or the folder of a checkpoint
    data: str = ""  # a file of traces (training.traces) instead of the cold-start data


@dataclass
class Sft2(NextToken):
    """The second SFT."""

    start: str = "rl_reasoning"  # or base, as the paper has it, or the folder of a checkpoint
    data: str = ""  # a file of traces (training.traces) instead of the mix of rejection


@dataclass
class RewardModels(NextToken):
    """The helpful model (pairwise) and the safety model (pointwise)."""

    start: str = "sft2"  # or base, or the folder of a checkpoint
    samples_from: list[str] = field(default_factory=lambda: ["base", "sft2"], metadata=FILLED)
    prompts: int = at_least(1, 512)
    samples: int = at_least(1, 4)  # responses a helpful problem
    unsafe_samples: int = at_least(1, 12)  # responses an unsafe problem, of which there are few
    pairs: int = at_least(1, 4)  # most pairs a problem
    temperature: float = at_least(0, 1.0)
    max_new_tokens: int = at_least(1, 64, pretrained=1024)


@dataclass
class RlAll(Grpo):
    """GRPO over reasoning, helpful and unsafe prompts."""

    start: str = "sft2"  # or another stage before, or the folder of a checkpoint
    steps: int = at_least(0, 20)
    temperature: float = ranged(0.7, above=0)
    preference_share: float = ranged(
        400 / 1700, minimum=0, maximum=1
    )  # the last share of the steps with the reward models
    mix: dict[str, float] = field(default_factory=lambda: {"reasoning": 0.5, "helpful": 0.3, "unsafe": 0.2})
    rewards: dict[str, float] = field(
        default_factory=lambda: {
            "accuracy": 1.0,
            "format": 1.0,
            "language_consistency": 1.0,
            "helpful": 1.0,
            "harmless": 1.0,
        }
    )


@dataclass
class Student(NextToken):
    """One student of the distillation: a small dense model."""

    architecture: Literal["qwen2", "llama"] = "qwen2"
    pretrained: str = ""  # "" starts from random weights
    hidden_size: int = at_least(1, 64)
    layers: int = at_least(1, 2)
    heads: int = at_least(1, 4)
    intermediate_size: int = at_least(1, 192)


def _students() -> dict[str, Student]:
    return {"qwen2": Student(architecture="qwen2"), "llama": Student(architecture="llama")}


@dataclass
class Distill(Sampling):
    """The teacher answers the SFT prompts anew; each student learns from what passes the filters."""

    teacher: str = "rl_all"  # or another stage before, or the folder of a checkpoint
    data: str = ""  # a file of traces (training.traces) instead of the teacher's responses
    samples: int = at_least(1, 4)
    filters: list[str] = field(
        default_factory=lambda: ["wrong_by_rule", "mixed_language", "repetition", "bad_format", "unfinished"]
    )
    students: dict[str, Student] = field(default_factory=_students, metadata=FILLED)


@dataclass
class Evaluate(Sampling):
    """Marks of every checkpoint: one sample each at `temperature`, then k samples at T 0.6, top-p 0.95."""

    problems: int = at_least(1, 1024)  # held-out problems of the marks at `temperature`
    k: int = at_least(1, 4)  # samples a problem for pass@1 (mean of k), pass@k and maj@k
    k_problems: int = at_least(1, 256)
    k_temperature: float = at_least(0, 0.6)
    k_top_p: float = ranged(0.95, above=0, maximum=1)
    splits: list[Literal["train", "test", "harder"]] = field(
        default_factory=lambda: ["test", "harder"], metadata=FILLED
    )


@dataclass
class Recipe:
    """Every setting of a run."""

    name: str = "custom"
    description: str = ""
    seed: int = at_least(0, 0)
    threads: int = rounding(1, 1)  # torch CPU threads
    device: Literal["auto", "cpu", "cuda"] = rounding("auto")  # auto: the GPU where torch sees one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of forward passes (autocast); parameters are float32
    # r1kernels, or transformers' own
    experts_implementation: Literal["r1kernels", "grouped_mm", "eager"] = rounding("r1kernels")
    deterministic: bool = rounding(
        False
    )  # on CUDA: deterministic algorithms, so that a resume is exact there too
    gradient_checkpointing: bool = rounding(
        False
    )  # layers recompute activations in the backward pass: less memory
    stages: list[str] = field(default_factory=lambda: list(STAGE_NAMES), metadata=FILLED)
    task: list[str] = field(default_factory=lambda: ["arithmetic", "general"], metadata=FILLED)
    task_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # task -> its keyword arguments
    reward_seconds: float = operational(10.0)  # longest time of one call of a reward of one's own
    system_prompt: str = ""  # stands before every conversation that has none of its own
    response_format: Literal["answer_tags", "boxed", "free"] = "answer_tags"  # where the answer stands
    model: Model = field(default_factory=Model)
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
