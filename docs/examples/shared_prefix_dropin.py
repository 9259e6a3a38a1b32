"""Replace the forward of repeated prompts by r1kernels.integrations.transformers.shared_prefix_logprobs: each prompt once.

Run it: ``python docs/examples/shared_prefix_dropin.py``. It builds a tiny Qwen3 with random weights and two prompts with four
completions each, shuffled as TRL shuffles them, computes the log-probs of the completions both ways and prints the difference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

from r1kernels.integrations.transformers import explain_shared_prefix, prefix_tree, shared_prefix_logprobs


def repeated_logprobs(
    model: Qwen3ForCausalLM, prompts: list[list[int]], completions: list[list[int]]
) -> Tensor:
    """What a training script usually holds: every prompt as often as it has completions, and all logits."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1))
    return pad_sequence(rows, batch_first=True)


def main() -> float:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    problems = torch.randint(1, 512, (2, 40)).tolist()
    order = torch.randperm(8).tolist()
    prompts = [problems[row % 2] for row in order]
    completions = [torch.randint(1, 512, (3 + row,)).tolist() for row in order]

    before = repeated_logprobs(model, prompts, completions)
    tree = prefix_tree(prompts, completions)
    after = shared_prefix_logprobs(model, tree)  # the drop-in
    gradients = [torch.autograd.grad(logp.sum(), [*model.parameters()]) for logp in (before, after)]

    print(explain_shared_prefix(model, tree))
    difference = max(float((one - other).abs().max()) for one, other in zip(*gradients, strict=True))
    difference = max(difference, (after - before).abs().max().item())
    print(f"tokens                    {tree.repeated_tokens} repeated, {tree.tokens} shared")
    print(f"largest difference {difference:.2e} (log-probs and all gradients)")
    return difference


if __name__ == "__main__":
    main()
