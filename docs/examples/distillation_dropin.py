"""Distil a student from a teacher's whole distribution, and from what K log-probs a token keep of it.

python docs/examples/distillation_dropin.py
"""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import r1kernels
from r1kernels.integrations.transformers import head_inputs, output_head

VOCABULARY, K = 503, 16


def model(hidden_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def eager(student, teacher, ids):
    """What people write: both models' (B, L, V) log-probs."""
    p, q = (torch.log_softmax(each(input_ids=ids).logits, -1) for each in (teacher, student))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)


def whole(student, teacher, ids):
    """The drop-in: from the states of both, never all logits at once."""
    with torch.no_grad():
        teacher_states = head_inputs(teacher, input_ids=ids)
    head, teacher_head = output_head(student), output_head(teacher)
    return r1kernels.linear_divergence(
        head_inputs(student, input_ids=ids),
        teacher_hidden=teacher_states,
        kind="forward_kl",
        **head._asdict(),
        **{f"teacher_{name}": value for name, value in teacher_head._asdict().items()},
    )


def stored(student, teacher, ids):
    """From the teacher's K likeliest ids and their log-probs, as an inference server gives them."""
    with torch.no_grad():
        teacher_logp, teacher_ids = torch.log_softmax(teacher(input_ids=ids).logits, -1).topk(K)
    return r1kernels.linear_topk_divergence(
        head_inputs(student, input_ids=ids),
        teacher_ids=teacher_ids,
        teacher_logp=teacher_logp,
        kind="forward_kl",
        **output_head(student)._asdict(),
    )


def main() -> None:
    teacher, student = model(48, 0), model(32, 1)
    with torch.no_grad():
        teacher.lm_head.weight *= 25  # surer than random weights are
    ids = torch.randint(VOCABULARY, (4, 12))
    theirs, ours, of_stored = (each(student, teacher, ids) for each in (eager, whole, stored))
    weights = list(student.parameters())
    gradients = [torch.autograd.grad(values.mean(), weights) for values in (theirs, ours)]
    pairs = [(ours, theirs), *zip(*gradients, strict=True)]
    print(f"largest difference {max((one - other).abs().max().item() for one, other in pairs):.1e}")
    print(
        f"divergence {ours.mean().item():.3f}, of it seen by {K} of {VOCABULARY} ids {of_stored.mean().item():.3f}"
    )

    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    for _ in range(60):
        loss = stored(student, teacher, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after 60 steps on the {K} ids: {whole(student, teacher, ids).mean().item():.3f}")


if __name__ == "__main__":
    main()
