"""r1kernels under transformers' own mixture-of-experts models, on tiny configurations."""

from __future__ import annotations

import copy
import io
import runpy
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import r1kernels
from r1kernels import BackendError, extension
from r1kernels.integrations import transformers as r1
from r1kernels.integrations import transformers_experts as experts_code
from r1kernels.integrations import transformers_match as match_code
from tests.support.mixtures import MODELS, SMALL, assert_same_step, build, step, tokens

models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def strict():
    r1kernels.set_strict(True)
    yield
    r1kernels.set_strict(False)


@models
def test_logits_and_gradients_are_those_of_the_model(name):
    model, ids = build(name), tokens()
    model.set_experts_implementation("eager")
    own = step(model, ids)
    with r1.patch(model), r1.record_routing(model) as record:
        ours = step(model, ids)
    assert_same_step(ours, own)
    assert record.forward().shape[1:] == (ids.numel(), 2)  # it went through our router
    again = step(model, ids)
    assert torch.equal(again[0].logits, own[0].logits)  # undone
    assert model.get_experts_implementation()[""] == "eager"
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_runs_on_the_kernels(dtype):
    if extension.missing() is not None:
        pytest.skip(str(extension.missing()))
    model = build("DeepseekV3").to(dtype)
    r1kernels.set_strict(True)  # an automatic choice of the reference is an error
    try:
        with r1.patch(model), torch.profiler.profile() as profile:
            step(model, tokens())
    finally:
        r1kernels.set_strict(False)
    ran = {event.key for event in profile.key_averages()}
    for op in ("route_cpu", "route_cpu_backward", "moe_experts_cpu", "moe_experts_cpu_backward"):
        assert f"r1kernels::{op}" in ran


@pytest.mark.parametrize("name", ["DeepseekV3", "Qwen3Moe"])
def test_in_bfloat16(name):
    model, ids = build(name).bfloat16(), tokens()
    exact = step(copy.deepcopy(model).float(), ids)[0].logits
    own = step(model, ids)[0].logits
    with r1.patch(model):
        ours, gradients = step(model, ids)
    assert ours.logits.dtype == torch.bfloat16
    assert all(grad is None or torch.isfinite(grad).all() for grad in gradients.values())
    # a token whose experts change with a rounding may differ: compare the typical error
    error, peer = ((logits.float() - exact).abs().median() for logits in (ours.logits, own))
    assert error <= 2 * peer + 1e-3


def test_under_autocast_the_router_stays_in_float32():
    model, ids = build("DeepseekV3"), tokens()
    with r1.patch(model), r1.record_routing(model) as record:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, gradients = step(model, ids)
        hidden = []
        gate = model.model.layers[1].mlp.gate
        handle = gate.register_forward_hook(lambda module, inputs, output: hidden.append((inputs[0], output)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids)
        handle.remove()
        inputs, (logits, weights, _) = hidden[0]
        assert logits.dtype == weights.dtype == torch.float32
        torch.testing.assert_close(logits, inputs.reshape(-1, 32).float() @ gate.weight.T)
    assert len(record.calls[0]) == 2
    assert (
        torch.isfinite(out.logits).all() and torch.isfinite(gradients["model.layers.1.mlp.gate.weight"]).all()
    )


def test_router_logits_and_the_auxiliary_loss_survive():
    model, ids = build("Mixtral", output_router_logits=True, router_aux_loss_coef=0.5), tokens()
    own = step(model, ids)
    with r1.patch(model):
        ours = step(model, ids)
    assert_same_step(ours, own)
    torch.testing.assert_close(ours[0].aux_loss, own[0].aux_loss)
    for logits, expected in zip(ours[0].router_logits, own[0].router_logits, strict=True):
        torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_router_with_nan_or_infinite_weights_is_as_undefined_as_in_the_model(name, value):
    model, ids = build(name), tokens()
    gate = model.model.layers[-1].mlp.gate
    with torch.no_grad():
        gate.weight[6] = value  # its logit is +inf or -inf, by token
    own = model(input_ids=ids).logits
    with r1.patch(model):
        ours = model(input_ids=ids).logits
    assert own.isnan().any()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_router_alone_with_the_experts_of_transformers():
    model, ids = build("DeepseekV3"), tokens()
    own = step(model, ids)
    before = model.get_experts_implementation()
    with r1.patch(model, experts="eager"), r1.record_routing(model) as record:
        assert model.get_experts_implementation()[""] == "eager"
        assert_same_step(step(model, ids), own)
    assert record.forward().shape == (1, ids.numel(), 2)
    assert model.get_experts_implementation() == before
    with pytest.raises(ValueError, match="no such experts"):
        r1.patch(model, experts="no such experts")
    assert not any("forward" in vars(module) for module in model.modules())


def test_register_alone_is_enough_for_the_experts(tmp_path):
    build("Qwen3Moe").save_pretrained(tmp_path)
    r1.register()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, ids = load(tmp_path, experts_implementation="r1kernels").train(), tokens()
    assert model.get_experts_implementation()[""] == "r1kernels"
    assert_same_step(step(model, ids), step(load(tmp_path).train(), ids))


def set_activation(experts, function):
    del experts.act_fn  # a module, whose place a function cannot take
    experts.act_fn = function


def experts_of(model):
    return next(module for module in model.modules() if hasattr(module, "_apply_gate"))


def test_weights_of_another_dtype_fall_back_with_one_warning(monkeypatch):
    experts = experts_of(build("Qwen3Moe")).to(torch.float8_e4m3fn)
    calls = []
    monkeypatch.setattr(
        experts_code.transformers_moe,
        "grouped_mm_experts_forward",
        lambda *a: calls.append(a) or torch.zeros(4, 32),
    )
    monkeypatch.setattr(experts_code, "_warned", set())
    arguments = (experts, torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
    reason = "does not serve Qwen3MoeExperts.*its weights are torch.float8_e4m3fn"
    with pytest.warns(RuntimeWarning, match=reason):
        r1.experts_forward(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r1.experts_forward(*arguments)
    assert len(calls) == 2
    r1kernels.set_strict(True)
    try:
        with pytest.raises(BackendError, match=reason):
            r1.experts_forward(*arguments)
    finally:
        r1kernels.set_strict(False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda experts: setattr(experts, "act_fn", nn.ReLU()), "its activation is ReLU"),
        (lambda experts: set_activation(experts, F.gelu), "its activation is gelu"),
        (
            lambda experts: setattr(experts, "post_expert_norm", nn.RMSNorm(32)),
            "has_post_expert_norm is True",
        ),
    ],
    ids=["activation", "activation function", "post norm"],
)
def test_what_the_fused_kernels_lack_goes_around_grouped_products(change, reason, strict):
    model = build("Qwen3Moe")
    for layer in model.model.layers:
        change(layer.mlp.experts)
        layer.mlp.experts.has_post_expert_norm = hasattr(layer.mlp.experts, "post_expert_norm")
    assert f"Qwen3MoeExperts: grouped_gemm around its own gate, since {reason}" in r1.explain(model)
    model.set_experts_implementation("batched_mm")
    own = step(model, tokens())
    with r1.patch(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_step(step(model, tokens()), own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_and_a_gate_of_its_own(dtype, strict):
    # gpt-oss: interleaved, transposed, with biases, and its own gate
    config = transformers.GptOssConfig(**{**SMALL, "num_local_experts": 4, "head_dim": 8})
    torch.manual_seed(0)
    model, ids = transformers.GptOssForCausalLM(config).train().to(dtype), tokens()
    for experts in (layer.mlp.experts for layer in model.model.layers):
        nn.init.normal_(experts.gate_up_proj_bias)
        nn.init.normal_(experts.down_proj_bias)
    own = step(model, ids)
    with r1.patch(model), torch.profiler.profile() as profile:
        ours = step(model, ids)
    if dtype == torch.float32:
        assert_same_step(ours, own)
        experts._is_expert_parallel = True
        hidden, weights = torch.randn(3, 32), torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.25, 1.0]])
        indices = torch.tensor([[0, 4], [4, 5], [1, 2]])  # 4 and more: experts of other ranks
        out = r1.experts_forward(experts, hidden, indices, weights)
        local = r1.experts_forward(experts, hidden, indices.clamp(max=3), weights)
        torch.testing.assert_close(out, local)
        assert (out[1] == 0).all()
    else:
        exact = step(copy.deepcopy(model).float(), ids)[0].logits
        error, peer = ((one[0].logits.float() - exact).abs().median() for one in (ours, own))
        assert error <= 2 * peer + 1e-3
    if extension.missing() is None:
        ran = {event.key for event in profile.key_averages()}
        assert {"r1kernels::grouped_gemm_cpu", "r1kernels::grouped_gemm_cpu_backward"} <= ran


def test_an_activation_that_is_a_function():
    # Lfm2's experts have F.silu, not a module; its router is not known, its experts are
    config = transformers.Lfm2MoeConfig(
        **{**SMALL, "num_experts": 4, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2}
    )
    torch.manual_seed(0)
    model, ids = transformers.Lfm2MoeForCausalLM(config).train(), tokens()
    own = step(model, ids)
    r1.register()
    model.set_experts_implementation("r1kernels")
    r1kernels.set_strict(True)  # a fallback is an error
    try:
        assert_same_step(step(model, ids), own)
    finally:
        r1kernels.set_strict(False)


def test_expert_parallel_sentinels():
    experts = experts_of(build("Qwen3Moe"))
    experts._is_expert_parallel = True
    hidden, weights = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.ones(5, 2)
    indices = torch.tensor([[0, 8], [8, 8], [1, 2], [9, 3], [8, 7]])  # 8 and more: experts of other ranks
    weights[indices >= 8] = 0.0
    out = r1.experts_forward(experts, hidden, indices, weights)
    local = r1.experts_forward(experts, hidden, indices.clamp(max=7), weights)
    torch.testing.assert_close(out, local)
    assert (out[1] == 0).all()


def test_models_that_can_not_be_patched():
    config = transformers.LlamaConfig(**{key: SMALL[key] for key in SMALL if key != "moe_intermediate_size"})
    with pytest.raises(ValueError, match="expected a model with experts, got LlamaForCausalLM without"):
        r1.patch(transformers.LlamaForCausalLM(config))
    model = build("Qwen3Moe")
    with r1.patch(model), pytest.raises(ValueError, match="not patched yet"):
        r1.patch(model)
    with pytest.raises(ValueError, match="expected a model patched by"), r1.record_routing(model):
        pass


def phimoe():
    config = transformers.PhimoeConfig(**SMALL, num_local_experts=4)
    torch.manual_seed(0)
    return transformers.PhimoeForCausalLM(config).eval()


def test_a_mixture_that_is_served_in_part():
    # its router (sparsemixer) is its own, its experts are ours; evaluated, for it draws random numbers in training
    model, ids = phimoe(), tokens()
    own = step(model, ids)
    with pytest.warns(RuntimeWarning, match="serves PhimoeForCausalLM in part") as said:
        patch = r1.patch(model)
    assert len(said) == 1 and "PhimoeTopKRouter" in str(said[0].message)
    assert model.get_experts_implementation()[""] == "r1kernels" and not r1.routes(model)
    with torch.profiler.profile() as profile:
        assert_same_step(step(model, ids), own)
    if extension.missing() is None:
        assert "r1kernels::moe_experts_cpu" in {event.key for event in profile.key_averages()}
    for block in (r1.record_routing(model), r1.collect_load(model), r1.replay_routing(model, torch.zeros(1))):
        with (
            pytest.raises(ValueError, match="all of whose routers are served, got one where it gives"),
            block,
        ):
            pass
    copied = copy.deepcopy(model)
    patch.undo()
    r1.unpatch(copied)
    for one in (model, copied):
        assert not any(hasattr(module, "_r1kernels") for module in one.modules())
        assert torch.equal(step(one, ids)[0].logits, own[0].logits)


def test_in_strict_mode_a_part_is_an_error(strict):
    model = phimoe()
    before = model.get_experts_implementation()
    with pytest.raises(
        BackendError, match=r"serves PhimoeForCausalLM in part: PhimoeTopKRouter .* other weights"
    ):
        r1.patch(model)
    assert model.get_experts_implementation() == before
    assert not any(hasattr(module, "_r1kernels") for module in model.modules())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_more_experts_per_token_than_its_groups_hold(device, strict):
    with torch.device(device):
        model = build("DeepseekV3", n_group=2, topk_group=1, num_experts_per_tok=6)
    with pytest.raises(
        BackendError,
        match=r"DeepseekV3TopkRouter .* asks for what route does not compute: top_k.* 6 .*model.layers.1.mlp",
    ):
        r1.patch(model)
    assert not any(hasattr(module, "_r1kernels") for module in model.modules())


def test_all_experts_whatever_their_groups():
    model, ids = build("DeepseekV3", n_group=2, topk_group=1, num_experts_per_tok=8), tokens()
    own = step(model, ids)
    with r1.patch(model):
        assert_same_step(step(model, ids), own)


def test_a_model_is_patched_before_it_has_weights():
    with torch.device("meta"):
        model = build("DeepseekV3")
    r1.patch(model)
    plain, ids = build("DeepseekV3"), tokens()
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        module._buffers.update(other._buffers)  # some are not in the state
    with r1.record_routing(model) as record:
        assert_same_step(step(model, ids), step(plain, ids))
    assert record.forward().shape == (1, ids.numel(), 2)


def test_a_model_is_patched_under_another_default_dtype(monkeypatch):
    monkeypatch.setattr(match_code, "_known", {})
    monkeypatch.setattr(experts_code, "_gates", {})
    model, ids = build("Qwen3Moe"), tokens()
    own = step(model, ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        r1.patch(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert r1.routes(model)
    assert_same_step(step(model, ids), own)


def test_explain_names_every_router_and_experts_module():
    model = build("DeepseekV3", num_hidden_layers=4)
    said = r1.explain(model)
    assert said.splitlines() == [
        "model.layers.1.mlp.gate and 2 more: DeepseekV3TopkRouter: route, sigmoid of the chosen, selection bias "
        "e_score_correction_bias, groups topk_group of num_group, scale routed_scaling_factor",
        "model.layers.1.mlp.experts and 2 more: DeepseekV3Experts: moe_experts, silu",
    ]
    with r1.patch(model):
        assert r1.explain(model) == said
    router, experts = r1.explain(phimoe()).splitlines()
    assert "PhimoeTopKRouter: transformers, since it gives other weights" in router
    assert "PhimoeExperts: moe_experts, silu" in experts
    experts_of(model).has_bias = True
    assert "DeepseekV3Experts: grouped_gemm around its own gate, since has_bias is True" in r1.explain(model)
    experts_of(model).to(torch.float8_e4m3fn)
    assert "transformers' grouped_mm, since its weights are torch.float8_e4m3fn" in r1.explain(model)


def test_adapters_of_peft_before_and_after():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to patch")
    ids = tokens()
    for name in ("DeepseekV3", "Qwen3Moe", "Mixtral"):
        config = peft.LoraConfig(
            r=2, init_lora_weights=False, target_modules=["v_proj", "kv_b_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        )  # fmt: skip
        model = peft.get_peft_model(build(name), config)
        own = step(model, ids)
        assert any("gate.lora_A" in one and grad is not None for one, grad in own[1].items())
        for target in (model, model.get_base_model()):
            with r1.patch(target), r1.record_routing(target) as record, warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # a fallback
                assert_same_step(step(model, ids), own)
            assert record.forward().shape[1:] == (ids.numel(), 2)
        assert torch.equal(step(model, ids)[0].logits, own[0].logits)
        # the other way round
        torch.manual_seed(0)
        patched = build(name)
        r1.patch(patched)
        later = peft.get_peft_model(patched, config)
        later.load_state_dict(model.state_dict())
        assert_same_step(step(later, ids), own)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("other weights", "it gives other weights"),
        ("other gradients", "its gradients are others"),
        ("other arguments", "its forward takes hidden_states, input_ids"),
        ("no attribute", "it does not run alone .*no attribute 'routed_scaling_factor'"),
    ],
)
def test_a_router_that_changed_is_refused(change, reason, monkeypatch, strict):
    model = build("DeepseekV3")
    router = type(model.model.layers[1].mlp.gate)
    forward = router.forward
    if change in ("other weights", "other gradients"):

        def changed(self, hidden_states):
            logits, weights, indices = forward(self, hidden_states)
            return logits, weights.detach() if change == "other gradients" else weights.sqrt(), indices

        monkeypatch.setattr(router, "forward", changed)
    elif change == "other arguments":
        monkeypatch.setattr(router, "forward", lambda self, hidden_states, input_ids: None)
    else:
        del model.model.layers[1].mlp.gate.routed_scaling_factor
    with pytest.raises(BackendError, match=f"DeepseekV3TopkRouter .*{reason}"):
        r1.patch(model)
    assert model.get_experts_implementation()[""] != "r1kernels"


def test_a_copy_is_patched_for_itself():
    model, ids = build("DeepseekV3"), tokens()
    with r1.patch(model):
        reference = copy.deepcopy(model)
        with torch.no_grad():
            model.model.layers[1].mlp.gate.weight.zero_()
        with r1.record_routing(reference) as theirs, r1.record_routing(model) as ours:
            reference(ids)
        assert len(theirs.calls[0]) == 1 and not ours.calls[0]
        assert theirs.forward().unique().numel() > 2  # with its own weights
        both = nn.ModuleList([model, reference])
        with pytest.raises(ValueError, match="expected one patched model"), r1.record_routing(both):
            pass


@pytest.mark.parametrize("name", ["DeepseekV3", "Qwen3Moe", "Mixtral"])
def test_copies_and_files_are_patched_and_can_be_undone(name, monkeypatch):
    model, ids = build(name), tokens()
    model.set_experts_implementation("eager")
    own = step(model, ids)
    file = io.BytesIO()
    with r1.patch(model):
        copied = copy.deepcopy(model)
        torch.save(model, file)
    # as in a process that has patched nothing
    monkeypatch.delitem(experts_code.transformers_moe.ExpertsInterface._global_mapping, "r1kernels")
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copied):
        with r1.record_routing(other) as record:
            assert_same_step(step(other, ids), own)
        assert record.forward().shape[1:] == (ids.numel(), 2)
        assert other.get_experts_implementation()[""] == "r1kernels"
        with pytest.raises(
            ValueError, match=r"a copy of a patched model is patched too\); unpatch\(model\) undoes it"
        ):
            r1.patch(other)
        r1.unpatch(other)
        assert torch.equal(step(other, ids)[0].logits, own[0].logits)
        assert other.get_experts_implementation()[""] == "eager"
        with pytest.raises(ValueError, match="expected a model patched by"):
            r1.unpatch(other)
        with r1.patch(other):
            assert_same_step(step(other, ids), own)


def test_compiled():
    model, ids = build("DeepseekV3", num_hidden_layers=1, first_k_dense_replace=0), tokens()
    with r1.patch(model):
        with r1.collect_load(model) as load, r1.record_routing(model) as record:
            expected = model(ids).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with r1.collect_load(model) as counted, r1.record_routing(model) as recorded:
            logits = compiled(ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(counted.counts, load.counts)
        assert torch.equal(recorded.forward(), record.forward())


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "docs/examples/moe_dropin.py"), run_name="__main__")
    assert "agreement" in capsys.readouterr().out
