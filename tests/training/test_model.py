"""The DeepSeek-V3 model of the recipes: sizes, routers on r1kernels, the bias update, copies and checkpoints."""

import json

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from training.checkpoint import load_model, save_model
from training.errors import UserError
from training.model import StepLoad, build_model, frozen_copy, is_patched, load
from training.recipe import load as load_recipe
from training.sections import Model, Student
from training.student import build as build_student
from training.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
SIZES = Model(hidden_size=32, layers=2, heads=2, intermediate_size=32, moe_intermediate_size=16, experts=4)
IDS = torch.arange(5, 35).view(3, 10)


def model(seed=0):
    return build_model(SIZES, TOKENIZER, seed).eval()


def routers(built):
    return [module for module in built.modules() if hasattr(module, "e_score_correction_bias")]


def test_the_tiny_recipe_is_a_deepseek_v3_of_about_0_4_million_parameters():
    built = build_model(load_recipe("tiny").model, TOKENIZER, 0)
    assert type(built) is DeepseekV3ForCausalLM
    assert 0.35e6 < sum(parameter.numel() for parameter in built.parameters()) < 0.5e6
    assert len(routers(built)) == 2 and built.config.n_shared_experts == 1


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = model()
    before = torch.get_rng_state()
    second = model()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, model(seed=1).lm_head.weight)


def test_on_r1kernels_it_computes_what_transformers_computes():
    built = model()
    original = DeepseekV3ForCausalLM(built.config).eval()
    original.load_state_dict(built.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            built(input_ids=IDS).logits, original(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )


def test_the_load_counts_real_tokens_of_all_micro_batches():
    built = model()
    load_ = StepLoad(built)
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0  # 26 of 30 tokens are real
    for _ in range(2):
        with load_.counting(mask):
            built(input_ids=IDS)
    # every real token goes to experts_per_token = 2 experts, in each of the two passes
    assert load_.load.counts.sum(dim=1).tolist() == [2 * 26 * 2]


def test_the_bias_moves_against_the_load_once_a_step():
    built = model()
    load_ = StepLoad(built)
    with load_.counting(torch.ones_like(IDS)):
        built(input_ids=IDS)
    counts = load_.load.counts[0].double()
    load_.update_bias(0.01)
    direction = (counts.mean() - counts).sign()
    expected = 0.01 * (direction - direction.mean())
    torch.testing.assert_close(
        routers(built)[0].e_score_correction_bias.double(), expected, rtol=1e-5, atol=1e-7
    )
    assert load_.max_over_mean() == pytest.approx(float(counts.max() / counts.mean()))


def test_the_frozen_copy_has_the_bias_and_does_not_follow():
    built = model()
    routers(built)[0].e_score_correction_bias.copy_(torch.tensor([0.3, -0.1, -0.1, -0.1]))
    twin = frozen_copy(built)
    assert torch.equal(twin(input_ids=IDS).logits, built(input_ids=IDS).logits)
    with torch.no_grad():
        built.lm_head.weight.zero_()
        routers(built)[0].e_score_correction_bias.zero_()
    assert routers(twin)[0].e_score_correction_bias[0] == pytest.approx(0.3)
    assert twin.lm_head.weight.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_a_checkpoint_keeps_weights_bias_and_logits(tmp_path):
    built = model()
    routers(built)[0].e_score_correction_bias.copy_(torch.tensor([0.3, -0.1, -0.1, -0.1]))
    save_model(built, TOKENIZER, tmp_path / "checkpoint")
    loaded, _ = load(tmp_path / "checkpoint")
    assert torch.equal(loaded(input_ids=IDS).logits, built(input_ids=IDS).logits)
    plain, _ = load_model(tmp_path / "checkpoint")  # as transformers alone reads it
    torch.testing.assert_close(plain(input_ids=IDS).logits, built(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_names_the_router_as_vllm_reads_it(tmp_path):
    # without it vLLM has no place for the selection bias and refuses the weights
    save_model(model(), TOKENIZER, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["topk_method"] == "noaux_tc"


def test_a_dense_model_has_no_load_and_no_bias():
    student, _ = build_student(
        Student(hidden_size=16, layers=1, heads=2, intermediate_size=16), TOKENIZER, 0, 64
    )
    assert not is_patched(student)
    load_ = StepLoad(student)
    with load_.counting(torch.ones_like(IDS)):
        student(input_ids=IDS)
    load_.update_bias(0.1)
    assert load_.max_over_mean() == 0.0


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"dense_layers": 4, "layers": 3}, "model.dense_layers"),
        ({"experts_per_token": 9}, "model.experts_per_token"),
        ({"expert_groups": 3}, "model.expert_groups"),
        ({"qk_rope_head_dim": 7}, "model.qk_rope_head_dim"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, named):
    with pytest.raises(UserError, match=named):
        build_model(Model(**sizes), TOKENIZER, 0)
