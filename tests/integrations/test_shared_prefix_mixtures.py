"""Mixtures of experts over a prefix tree: loads, balance losses, records and replays equal those of the repeated form."""

from __future__ import annotations

import pytest
import torch

import r1kernels
from r1kernels.integrations import transformers as r1
from tests.support import prefix_models as models


@pytest.fixture(params=["Qwen3Moe", "DeepseekV3"])
def mixture(request):
    model = models.build(request.param)
    with r1.patch(model):
        yield model


def case():
    prompts, completions = models.sequences()
    return prompts, completions, r1.prefix_tree(prompts, completions)


def one_by_one(model, prompts, completions):
    """transformers' own forward of each sequence alone."""
    for prompt, completion in zip(prompts, completions, strict=True):
        model(input_ids=torch.tensor([prompt + completion]), use_cache=False)


@torch.no_grad()
def test_load_counts_a_token_as_often_as_sequences_have_it(mixture):
    prompts, completions, tree = case()
    with r1.collect_load(mixture) as load:
        r1.shared_prefix_states(mixture, tree)
    with r1.collect_load(mixture) as expected:
        one_by_one(mixture, prompts, completions)
    assert tree.tokens < tree.repeated_tokens
    assert torch.equal(load.counts, expected.counts)


def test_balance_losses_are_those_of_the_repeated_form():
    tree = case()[2]
    logits = torch.randn(tree.tokens, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    indices = logits.detach().topk(2).indices
    repeated, again = logits[tree.sequences], indices[tree.sequences]

    def grad(loss):
        return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]

    loss = r1kernels.load_balancing_loss(logits, 2, tree.multiplicity)
    expected = r1kernels.load_balancing_loss(repeated, 2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad(loss), grad(expected))
    losses = r1kernels.sequence_balance_loss(repeated.sigmoid(), again, tree.cu_seqlens, 1.0)
    for row, path in enumerate(tree.paths()):
        alone = r1kernels.sequence_balance_loss(
            logits[path].sigmoid(), indices[path], torch.tensor([0, len(path)]), 1.0
        )
        torch.testing.assert_close(losses[row : row + 1], alone)


@torch.no_grad()
def test_record_and_replay_over_the_tree(mixture):
    prompts, completions, tree = case()
    with r1.record_routing(mixture) as record:
        expected = r1.shared_prefix_states(mixture, tree)
    routing = record.sequences(tree)
    assert [one.shape[1] for one in routing] == [
        len(p) + len(c) for p, c in zip(prompts, completions, strict=True)
    ]
    for one, prompt, completion in zip(routing, prompts, completions, strict=True):
        with r1.record_routing(mixture) as alone:
            mixture(input_ids=torch.tensor([prompt + completion]), use_cache=False)
        assert torch.equal(one.sort().values, alone.forward().sort().values)
    last_not_fed = [one[:, :-1] for one in routing]  # as a generation records it
    packed = r1.pad_routing(last_not_fed, tree)
    known = (packed != -1).all(-1)
    assert torch.equal(packed[known], record.forward()[known])
    assert known.sum() < known.numel()
    with r1.replay_routing(mixture, packed) as replay:
        torch.testing.assert_close(r1.shared_prefix_states(mixture, tree), expected)
    assert replay.agreement == 1.0
    with torch.no_grad():  # another policy, whose router would choose otherwise
        for module in mixture.modules():
            if hasattr(module, "_r1kernels"):
                module.weight.copy_(module.weight.flip(0))
    with r1.replay_routing(mixture, packed) as replay, r1.record_routing(mixture) as replayed:
        r1.shared_prefix_states(mixture, tree)
    assert replay.agreement < 0.9
    assert torch.equal(replayed.forward()[known], packed[known])


def test_a_shared_token_gets_the_experts_of_the_first_sequence():
    tree = r1.prefix_tree([[*range(20)]] * 2, [[20], [21]])
    first, second = (torch.full((1, 20, 2), value) for value in (3, 5))
    assert (r1.pad_routing([first, second], tree)[:, :20] == 3).all()
    with pytest.raises(ValueError, match="sequences: expected 2, one per sequence of the tree, got 1"):
        r1.pad_routing([first], tree)
    with pytest.raises(ValueError, match="at most 21 tokens in sequence 1"):
        r1.pad_routing([first, second.expand(1, 20, 2).repeat(1, 2, 1)], tree)
