"""What docs/divergence.md and docs/distillation.md print as code runs as it stands there, and gives what the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

DOCS = Path(__file__).parents[2] / "docs"


def code(page: str) -> str:
    """The one example of a page."""
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return example


def test_the_example_of_divergences():
    torch.manual_seed(0)
    names: dict = {}
    exec(code("divergence.md"), names)
    assert names["divergence"].shape == (2, 5) and (names["divergence"] > 0).all()
    x, weight = (names[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    p = (names["teacher_hidden"].double() @ names["teacher_weight"].double().T / 2).log_softmax(-1)
    q = (x @ weight.T / 2).log_softmax(-1)
    mean = ((p.exp() + q.exp()) / 2).log()
    exact = (
        F.kl_div(mean, p, log_target=True, reduction="none")
        + F.kl_div(mean, q, log_target=True, reduction="none")
    ).sum(-1) / 2
    torch.testing.assert_close(names["divergence"].double(), exact, rtol=1e-5, atol=1e-7)
    exact.mean().backward()
    for name, leaf in (("hidden", x), ("weight", weight)):
        torch.testing.assert_close(names[name].grad.double(), leaf.grad, rtol=1e-4, atol=1e-7)


def test_the_example_of_distillation():
    transformers = pytest.importorskip("transformers", reason="the example reads models of transformers")

    def model(width):
        sizes = {
            "hidden_size": width,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes))

    torch.manual_seed(0)
    names = {"student": model(16), "teacher": model(24), "ids": torch.randint(61, (2, 7))}
    names["mask"] = torch.ones(2, 7)
    names["mask"][1, 4:] = 0
    exec(code("distillation.md"), names)
    student, teacher, mask = names["student"], names["teacher"], names["mask"]
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    p, q = (each(input_ids=names["ids"]).logits.log_softmax(-1) for each in (teacher, student))
    exact = F.kl_div(q, p.detach(), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(names["divergence"], exact, rtol=1e-4, atol=1e-6)
    student.zero_grad()
    ((exact * mask).sum() / mask.sum()).backward()
    for mine, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-3, atol=1e-6)
