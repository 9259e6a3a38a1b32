"""linear_logprobs in compiled graphs, on every backend. N tokens, H hidden, V vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import r1kernels
from r1kernels import linear_logprobs

OP = "linear_logprobs"
OPTIONS = {"temperature": 1.3, "softcap": 5.0, "logit_scale": 0.7, "return_entropy": True}


def problem(tokens=11, device="cpu"):
    """(hidden, weight, bias, targets); every fourth target is ignored."""
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, 6), (37, 6), (37,)
    leaves = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes]
    targets = torch.randint(0, 37, (tokens,), generator=generator)
    targets[1::4] = -100
    return *leaves, targets.to(device)


def results_and_gradients(function, *leaves):
    logp, entropy = function(*leaves)
    return logp.detach(), entropy.detach(), *torch.autograd.grad((logp - 2 * entropy).sum(), leaves)


def test_it_compiles_in_one_graph(place):
    backend, device = place
    *leaves, targets = problem(device=device)
    # in a graph the reference takes None for True, the kernels for False
    for save_logits in (None,) if backend == "reference" else (None, True):

        def function(x, w, b, how=save_logits):
            return linear_logprobs(x, w, targets, bias=b, **OPTIONS, save_logits=how, backend=backend)

        plain = results_and_gradients(function, *leaves)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(results_and_gradients(compiled, *leaves), plain)


def test_lengths_do_not_recompile(place):
    backend, device = place
    _, weight, bias, _ = problem(device=device)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(x, y):
        return linear_logprobs(x, weight, y, bias=bias, return_entropy=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=count)
    for tokens in (4, 11, 40):
        x, _, _, targets = problem(tokens, device=device)
        for of_tokens in (x, targets):
            torch._dynamo.mark_dynamic(of_tokens, 0)
        torch.testing.assert_close(compiled(x, targets), function(x, targets))
    assert len(graphs) == 1


def test_a_bad_target_in_a_compiled_graph_is_an_error(place):
    backend, device = place
    if (backend, device) != ("cpu", "cpu"):
        pytest.skip("the reference and GPUs give NaN there")
    x, weight, _, targets = problem()
    targets[4] = 37
    compiled = torch.compile(
        lambda x: linear_logprobs(x, weight, targets, backend=backend), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(RuntimeError, match=r"targets: expected values in \[0, 37\)"):
        compiled(x)


@pytest.mark.parametrize("op", ["token_logprobs", "linear_logprobs", "linear_grpo_loss"])
def test_another_temperature_does_not_compile_again(op):
    x, weight, _, targets = problem()

    def function(temperature):
        if op == "token_logprobs":
            return r1kernels.token_logprobs(x @ weight.T, targets, temperature=temperature)
        if op == "linear_logprobs":
            return linear_logprobs(x, weight, targets, temperature=temperature)
        mask = (targets != -100)[None]
        return r1kernels.linear_grpo_loss(
            x[None], weight, targets[None], None, torch.ones(1), mask, temperature=temperature, entropy=True
        ).metrics["entropy"]

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for temperature in (0.7, 0.8):  # the first is taken for a constant
        compiled(temperature)
    graphs = counter.frame_count
    for temperature in (0.5, 0.9, 1.1, 1.7):
        torch.testing.assert_close(compiled(temperature), function(temperature), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == graphs
