"""Kept sets out of transformers' generate and TRL's trainer: the sets as sampled, and log-probs among them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from r1kernels.integrations import transformers as r1

V = 61
SAMPLING = [{"top_k": 7}, {"top_p": 0.6, "top_k": 0}, {"min_p": 0.2, "top_k": 0}, {"top_k": 9, "top_p": 0.7}]


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(model, **options):
    """(output of generate, prompts' mask, mask of the completions)"""
    torch.manual_seed(1)
    prompts = torch.tensor([[0, 0, 5, 9, 7], [3, 8, 2, 4, 6], [0, 5, 5, 9, 8]])
    given = {"attention_mask": (prompts != 0).long(), "do_sample": True, "max_new_tokens": 12}
    output = model.generate(prompts, output_scores=True, return_dict_in_generate=True, **given, **options)
    completions = output.sequences[:, prompts.shape[1] :]
    return output, given["attention_mask"], (completions != 0).long()


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_the_sets_are_what_the_scores_left(sampling):
    model = tiny()
    with r1.record_kept(model) as record:
        output, _, mask = generate(model, temperature=1.4, **sampling)
    assert "_get_logits_processor" not in vars(model)
    ids, offsets = record.sets(mask)
    again = r1.kept_sets(output.scores, mask)
    assert torch.equal(ids, again[0]) and torch.equal(offsets, again[1])
    scores = torch.stack(output.scores, dim=1)
    sets = [own.tolist() for own in ids.split(offsets.diff().tolist())]
    for row in range(3):
        for token in range(mask.shape[1]):
            left = scores[row, token].isfinite().nonzero().squeeze(1).tolist()
            assert sets[row * mask.shape[1] + token] == (left if mask[row, token] else [])


def test_a_mask_may_be_shorter_or_longer_and_the_whole_vocabulary_is_no_set():
    record = r1.KeptRecord()
    for _ in range(3):
        record.add(torch.tensor([[1.0, -torch.inf, 2.0], [1.0, 1.0, 1.0]]))
    for tokens in (2, 3, 5):
        ids, offsets = record.sets(torch.ones(2, tokens))
        drawn = min(3, tokens)
        assert ids.tolist() == [0, 2] * drawn
        assert offsets.diff().tolist() == [2] * drawn + [0] * (2 * tokens - drawn)
    with pytest.raises(ValueError, match="expected a generation, got none"):
        r1.KeptRecord().sets(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, any\)"):
        record.sets(torch.ones(3, 3))


def test_log_probs_and_gradients_are_those_of_what_was_drawn_from():
    model = tiny()
    output, prompts, mask = generate(model, top_p=0.7, top_k=20)
    attention = torch.cat((prompts, mask), dim=1)
    labels = output.sequences.masked_fill(attention == 0, -100)
    labels[:, : prompts.shape[1]] = -100
    ids, offsets = r1.kept_sets(output.scores, mask)
    sizes = torch.nn.functional.pad(offsets.diff().view(mask.shape), (prompts.shape[1] - 1, 0))
    offsets = torch.nn.functional.pad(sizes.flatten().cumsum(0), (1, 0))
    logp, entropy = r1.fused_logprobs(
        model, output.sequences, attention, labels, return_entropy=True, kept=(ids, offsets)
    )
    logits = model(output.sequences, attention_mask=attention).logits[:, prompts.shape[1] - 1 : -1]
    left = torch.stack(output.scores, dim=1).isfinite()
    expected = logits.masked_fill(~left, -1e30).log_softmax(-1)
    of_entropy = -(expected.exp() * expected).sum(-1) * mask
    expected = expected.gather(-1, output.sequences[:, prompts.shape[1] :, None]).squeeze(-1) * mask
    torch.testing.assert_close(logp[:, prompts.shape[1] - 1 :], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy[:, prompts.shape[1] - 1 :], of_entropy, rtol=1e-5, atol=1e-5)
    assert not logp[:, : prompts.shape[1] - 1].any()
    parameters = list(model.parameters())
    mine = torch.autograd.grad(logp.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_adapters_are_seen_through():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: nothing to adapt")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules="all-linear"))
    with r1.record_kept(model) as record:
        _, _, mask = generate(model, top_k=5)
    assert record.sets(mask)[1].diff().max() == 5
