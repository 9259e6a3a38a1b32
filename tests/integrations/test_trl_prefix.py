"""Shared prefixes under TRL: log-probs, entropies and gradients of GRPOTrainer's own method; ``test_trl_run.py`` trains."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed: nothing to adapt")

from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from r1kernels.integrations import transformers, trl_linear, trl_prefix  # noqa: E402
from r1kernels.integrations import trl as r1  # noqa: E402
from tests.support import prefix_models as models  # noqa: E402

OWN = trainer.GRPOTrainer._get_per_token_logps_and_entropies
T = 11
STAND_IN = SimpleNamespace(
    temperature=0.8, accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=True)
)


def tiny(name, dtype=torch.float32):
    model = models.build(name, dtype)
    add_fused_lm_head(model, temperature=STAND_IN.temperature, outputs=("log_probs", "entropy"))
    return model.train()


def batch(seed=0):
    """(input_ids, attention_mask) of two groups of four and a prompt alone, shuffled; one completion carries no loss."""
    draw = random.Random(seed)

    def tokens(count):
        return [draw.randrange(3, models.VOCABULARY) for _ in range(count)]

    prompts = [tokens(20), tokens(31), tokens(1)]
    rows = [(prompts[p], tokens(draw.randint(1, T))) for p in (0, 1, 0, 1, 2, 0, 1, 0, 1)]
    rows[3] = (rows[3][0], [])
    draw.shuffle(rows)
    width = max(len(prompt) for prompt, _ in rows)
    ids = torch.zeros(len(rows), width + T, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        place = slice(width - len(prompt), width + len(completion))
        ids[row, place] = torch.tensor(prompt + completion)
        mask[row, place] = 1
    return ids, mask


def passes(model, method, **options):
    """Log-probs, entropies and, where asked for, the auxiliary loss of a pass, and the gradients of an arbitrary loss in them."""
    found = method(STAND_IN, model, *batch(), T, compute_entropy=True, **options)
    assert (found[2] is not None) == ("compute_aux_loss" in options)
    found = [each for each in found if each is not None]
    return found, models.gradients(model, *found)


def assert_parity(model, **options):
    ours, gradients = passes(model, trl_prefix.logps_and_entropies, **options)
    theirs, expected = passes(model, OWN, **options)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert models.difference(gradients[name], gradient) < 1e-4, name


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3Moe", "DeepseekV3"])
def test_log_probs_entropies_and_gradients_are_those_of_trl(name):
    assert_parity(tiny(name))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_the_auxiliary_loss_of_a_mixture_counts_a_token_as_often_as_rows_have_it(name):
    model = tiny(name)
    assert_parity(model, compute_aux_loss=True)
    with transformers.patch(model):
        assert_parity(model, compute_aux_loss=True)


def test_chunks_of_rows_and_the_passes_without_gradient():
    model = tiny("Llama")
    assert_parity(model, batch_size=4)
    ids, mask = batch()
    with torch.no_grad():
        ours, entropy, _ = trl_prefix.logps_and_entropies(STAND_IN, model, ids, mask, T, batch_size=2)
        theirs, _, _ = OWN(STAND_IN, model, ids, mask, T, batch_size=2)
    assert entropy is None and ours.shape == theirs.shape == (9, T)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_gradient_checkpointing_and_adapters():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to adapt")
    model = tiny("Llama")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    adapters = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    adapted = peft.get_peft_model(model, adapters)
    for parameter in adapted.parameters():  # B is 0 at first, and so would be the gradient of A
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_parity(adapted)
    with adapted.disable_adapter(), torch.no_grad():  # the reference of TRL
        ours, _, _ = trl_prefix.logps_and_entropies(STAND_IN, adapted, *batch(), T)
        theirs, _, _ = OWN(STAND_IN, adapted, *batch(), T)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


def test_a_prompt_is_computed_once_wherever_its_rows_stand():
    model, read = tiny("Llama"), []
    ids, mask = batch()
    trl_prefix.logps_and_entropies(STAND_IN, model, ids, mask, T)  # the first call tries the model
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    trl_prefix.logps_and_entropies(STAND_IN, model, ids, mask, T)
    completions = int(mask[:, -T:].sum())
    assert read == [20 + 31 + 1 + completions]


def test_states_for_the_loss_from_hidden_states():
    model = tiny("Llama")
    ids, mask = batch()
    real = mask[:, -T:].bool()
    ours, theirs = trl_prefix.states(model, ids, mask, T), trl_linear.states(model, ids, mask, T)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)
    assert not ours[~real].any()


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids", "num_images"])
def test_what_is_not_tokens_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected None with shared prefixes, .*, got a value"):
        trl_prefix.logps_and_entropies(STAND_IN, None, *batch(), T, **{name: torch.ones(1)})


def test_what_the_tree_does_not_know_is_refused():
    ids, mask = batch()
    row = int(mask[:, -T:].sum(1).argmax())
    for place in (ids.shape[1] - T - 1, ids.shape[1] - T + 1):  # in a prompt and in a completion
        hole = mask.clone()
        hole[row, place] = 0
        with pytest.raises(ValueError, match="attention_mask: expected padding in front of the prompts"):
            trl_prefix.logps_and_entropies(STAND_IN, None, ids, hole, T)
    model = models.build("Llama4", num_local_experts=2, intermediate_size_mlp=32, attention_chunk_size=16)
    with pytest.raises(ValueError, match="cannot share prefixes: it has layers of chunked_attention"):
        trl_prefix.logps_and_entropies(STAND_IN, model, ids, mask, T)


def test_patch_and_undo():
    with r1.patch(prefix=True) as patch:
        method = trainer.GRPOTrainer._get_per_token_logps_and_entropies
        assert method is trl_prefix.logps_and_entropies
        with pytest.raises(ValueError, match="expected a library that is not patched yet"):
            r1.patch(prefix=True)
        patch.undo()
        assert trainer.GRPOTrainer._get_per_token_logps_and_entropies is OWN
    with r1.patch():
        assert trainer.GRPOTrainer._get_per_token_logps_and_entropies is OWN
    with r1.patch(linear=True, prefix=True):
        assert trainer.GRPOTrainer._compute_loss is trl_linear.compute_loss_shared
    assert trainer.GRPOTrainer._get_per_token_logps_and_entropies is OWN


def more_arguments(self, model, input_ids, attention_mask, logits_to_keep, audio):
    return None


def test_a_method_that_changed_is_refused(monkeypatch):
    monkeypatch.setattr(trainer.GRPOTrainer, "_get_per_token_logps_and_entropies", more_arguments)
    own = dict(vars(trainer.GRPOTrainer))
    with pytest.raises(RuntimeError, match=r"has \(self, model, input_ids, .*, audio\)"):
        r1.patch(prefix=True)
    assert dict(vars(trainer.GRPOTrainer)) == own
