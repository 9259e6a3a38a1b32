"""The model that `base` pretrains, and what every loop does with a model: its routers, its bias update, its copies.

The architecture is transformers' DeepSeek-V3 (multi-head latent attention, shared and routed experts, sigmoid router
with the auxiliary-loss-free bias). Routers and experts of every mixture that the integration serves run on r1kernels; a
mixture that it does not serve keeps its own. Dense models have no routers, and all functions here then do nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from r1kernels.integrations import transformers as integration
from r1kernels.integrations.transformers import ExpertLoad
from r1kernels.integrations.transformers_prefix import check_model
from training import adapters, checkpoint, notices, seeding
from training.errors import UserError
from training.placement import current_device, current_experts, recomputes
from training.recipe import Model

# What configs of mixtures call the number of experts a router chooses from.
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")


def build_model(sizes: Model, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A DeepSeek-V3 model with random weights, a function of the sizes and the seed alone.

    Raises:
        UserError: sizes that do not fit each other.
    """
    config = deepseek_config(
        sizes,
        len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # transformers draws initial weights from torch's global generator: set it from the key, and put it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key(seed, "base", "weights"))
        model = DeepseekV3ForCausalLM(config)
    return prepare(model)


def deepseek_config(sizes: Model, vocab_size: int, **token_ids: int) -> DeepseekV3Config:
    """transformers' config of a DeepSeek-V3 model without the prediction module.

    vocab_size: entries of the tokenizer, taken where the sizes name no number.

    Raises:
        UserError: sizes that do not fit each other.
    """
    if sizes.dense_layers > sizes.layers:
        raise UserError(
            f"model.dense_layers: expected at most model.layers = {sizes.layers}, got {sizes.dense_layers}"
        )
    if sizes.experts_per_token > sizes.experts:
        raise UserError(
            f"model.experts_per_token: expected at most model.experts = {sizes.experts}, got {sizes.experts_per_token}"
        )
    if sizes.experts % sizes.expert_groups:
        raise UserError(
            f"model.expert_groups: {sizes.expert_groups} does not divide model.experts = {sizes.experts}"
        )
    if sizes.expert_groups_per_token > sizes.expert_groups:
        raise UserError(
            f"model.expert_groups_per_token: expected at most model.expert_groups = {sizes.expert_groups}, got "
            f"{sizes.expert_groups_per_token}"
        )
    group = sizes.experts // sizes.expert_groups
    if (
        group < 2 and sizes.dense_layers < sizes.layers
    ):  # a group is chosen by the sum of its two best experts
        raise UserError(
            f"model.experts: expected at least 2 in each of the {sizes.expert_groups} groups, got {group}"
        )
    if sizes.experts_per_token > sizes.expert_groups_per_token * group:
        raise UserError(
            f"model.experts_per_token: expected at most {sizes.expert_groups_per_token * group}, the experts of "
            f"{sizes.expert_groups_per_token} groups, got {sizes.experts_per_token}"
        )
    if sizes.vocab_size and sizes.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size: expected 0, or at least the {vocab_size} entries of the tokenizer, got {sizes.vocab_size}"
        )
    if sizes.qk_rope_head_dim % 2:
        raise UserError(f"model.qk_rope_head_dim: expected an even number, got {sizes.qk_rope_head_dim}")
    return DeepseekV3Config(
        vocab_size=sizes.vocab_size or vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        first_k_dense_replace=sizes.dense_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        intermediate_size=sizes.intermediate_size,
        moe_intermediate_size=sizes.moe_intermediate_size,
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.experts_per_token,
        n_shared_experts=sizes.shared_experts,
        n_group=sizes.expert_groups,
        topk_group=sizes.expert_groups_per_token,
        topk_method="noaux_tc",  # transformers knows no other router; vLLM takes the selection bias where it reads this
        routed_scaling_factor=sizes.routed_scaling_factor,
        q_lora_rank=sizes.q_lora_rank or None,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_rope_head_dim=sizes.qk_rope_head_dim,
        qk_nope_head_dim=sizes.qk_nope_head_dim,
        v_head_dim=sizes.v_head_dim,
        max_position_embeddings=sizes.max_length,
        num_nextn_predict_layers=0,
        **token_ids,
    )


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with float32 weights on the device of the run, its routers on r1kernels, its experts as the recipe says.

    A mixture whose routers the integration does not serve is warned of and computes as transformers has it.
    """
    checkpoint.widen(model)
    model = model.to(current_device())
    if has_experts(model):
        said = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                integration.patch(model, experts=current_experts())
            except (ValueError, RuntimeError) as error:
                said = f"transformers' own routers and experts are used, without routing replay: {error}"
        for text in (said, *(str(one.message) for one in caught)):
            if text:
                notices.warn("experts", f"{type(model).__name__}: {text.removeprefix('model: ')}")
    if recomputes():
        # the new name where transformers has it, for the old one warns there
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint's model, ready for the loops, and its tokenizer; UserError: see checkpoint.load_model, or it has none."""
    model, tokenizer = checkpoint.load_model(path)
    if tokenizer is None:
        raise UserError(f"{path} holds no tokenizer.json")
    check_head(model)
    return prepare(model), tokenizer


def check_head(model: PreTrainedModel) -> None:
    """Raises a UserError where log-probs cannot be computed from the model's head; a reward model has none."""
    try:
        if model.get_output_embeddings() is not None:
            integration.output_head(model)
    except ValueError as error:
        raise UserError(str(error).replace("\n", " ")) from None


def check_causal(model: PreTrainedModel) -> None:
    """Raises a UserError where a later token changes the logits of an earlier one: such a model draws no text from left to
    right. transformers lists some of these among its causal language models (BERT, unless its config says is_decoder)."""
    ids = torch.arange(4).expand(2, 4).clone() % model.config.get_text_config().vocab_size
    ids[1, -1] = 0
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device)).logits[:, 0]
    rounding = torch.finfo(logits.dtype).eps ** 0.5 * float(logits.abs().max())
    if not torch.allclose(logits[0], logits[1], rtol=0, atol=rounding, equal_nan=True):
        raise UserError(
            f"{type(model).__name__} is not causal: a later token changes the logits of an earlier one; expected a model "
            "that reads from left to right"
        )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in eval mode with buffers (the router bias included) and without gradients: the reference policy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, layers recompute their activations in the backward pass, where the recipe asks for that.

    transformers does so in training mode alone, and a policy is in eval mode, so that dropout does not make another function
    of it: only the layers themselves are switched, not the dropout inside them.
    """
    layers = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, was_training in zip(layers, before, strict=True):
            layer.training = was_training


def has_experts(model: PreTrainedModel) -> bool:
    """Whether the model is a mixture, by modules that dispatch to experts or by what its config says."""
    config = model.config.get_text_config()
    return any(hasattr(module, "_apply_gate") for module in model.modules()) or any(
        (getattr(config, name, None) or 0) > 1 for name in EXPERT_COUNTS
    )


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether what sequences have in common goes through the model once; where it cannot, a warning says why."""
    try:
        check_model(model)
    except ValueError as error:
        reason = str(error).removeprefix("model: ")
        notices.warn(
            "shared_prefix",
            f"shared_prefix: each prompt is computed once for each of its responses: {reason}",
        )
        return False
    return True


def is_patched(model: nn.Module) -> bool:
    """Whether the routers of the model run on r1kernels: then their choices can be counted, recorded and replayed."""
    return integration.routes(model)


class StepLoad:
    """Tokens of every expert in one optimizer step, over all its micro-batches, and once `be` is called over all ranks; nothing
    where no router is patched."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.load: ExpertLoad | None = None

    @contextmanager
    def counting(self, counts: Tensor | None) -> Iterator[None]:
        """Counts each token of a forward pass as often as `counts` says (any shape, one number per token, 0 at padding); None: as
        often as sequences share it."""
        if not is_patched(self.model):
            yield
            return
        with integration.collect_load(self.model, self.load, counts) as self.load:
            yield

    @property
    def counts(self) -> Tensor:
        """The counts, flat."""
        if not is_patched(self.model):
            return torch.zeros(0)
        with integration.collect_load(self.model, self.load) as self.load:
            pass  # a rank without a batch has counted nothing yet
        return self.load.counts.flatten()

    def be(self, counts: Tensor) -> None:
        """Takes the counts of all ranks, as `counts` has them, for its own."""
        if self.load is not None:
            self.load.counts = counts.to(self.load.counts).view_as(self.load.counts)

    def update_bias(self, rate: float) -> None:
        """Moves the bias of every router that has one a step of `rate` towards an even load; once an optimizer step.

        Beside adapters it stands still, as all weights of the model do: PEFT's layout has no place for it.
        """
        if (
            self.load is not None
            and not adapters.has(self.model)
            and integration.has_selection_bias(self.model)
        ):
            integration.update_bias(self.model, self.load, rate, summed=True)

    def max_over_mean(self) -> float:
        """Load of the busiest expert over an even load, averaged over the layers: 1 is even, 0 without patched routers."""
        return 0.0 if self.load is None else float(self.load.max_over_mean().mean())
