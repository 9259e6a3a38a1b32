"""On-policy distillation: the student answers, and learns the teacher's distribution of what it wrote itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training import engines
from training.context import StageContext
from training.encoder import Encoder
from training.loops import next_token
from training.loops.batch import row_of
from training.loops.optim import save_due
from training.loops.sample import Prompt, sample
from training.loops.token_loss import TokenLoss
from training.parallel.shard import bring_up_to_date
from training.sections import NextToken, Sampling


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    loss: TokenLoss,
    config: NextToken,
    sampling: Sampling,
    amount: next_token.Amount,
    context: StageContext,
) -> dict[str, float]:
    """Trains `model` in place: a step samples one response to each of `config.batch_size` prompts and learns from these.

        loss of a step = sum of loss(token) over the step's responses / number of their tokens

    Args:
        prompts: at least one; a pass over them is in an order keyed by (seed, stage, epoch).
        loss: that of a teacher, which reads the responses.
        config: batch_size, lr and so on; its steps and epochs are in `amount`.
        sampling: temperature, top_p, top_k, max_new_tokens and batch_size of the sampler.
        amount: how much is learnt. Tokens count where it has any, so that a student whose responses are short takes more steps.
        context: where metrics and resume points go; `context.stage` resumes a run that was cut off.

    Returns:
        The last metrics.
    """
    encoder = Encoder(model, tokenizer)
    learner, optimizer, start, learnt = next_token.begun(model, config, context)
    if start:
        bring_up_to_date(model, learner)
    key = (context.recipe.seed, context.name)
    metrics: dict[str, Any] = {}
    for each in (model, learner):
        each.eval()  # no dropout: the student that samples and the one that learns are the same function
    with (
        closing(engines.connect(context.recipe.rollout, model, tokenizer, start)) as engine,
        context.progress.bar(amount.steps, start, context.name) as bar,
    ):
        step = start
        while (done := amount.done(step, learnt)) < amount.steps:
            began = time.perf_counter()
            engine.update(model, step)
            chosen = next_token.batch_of_step(len(prompts), config.batch_size, step, key)
            drawn = sample(
                engine,
                [prompts[i] for i in chosen],
                seed_parts=(*key, "rollout", step),
                **sampling.options(),
            )
            rows = [row_of(each) for each in drawn]
            metrics = next_token.update(
                learner, optimizer, rows, encoder.pad_id, loss, config, context, (done, amount.steps)
            )
            bring_up_to_date(model, learner)
            learnt += sum(len(row.targets) for row in rows)
            metrics |= {
                "learnt": learnt,
                "length": sum(len(each.token_ids) for each in drawn) / len(drawn),
                "finished": sum(each.finished for each in drawn) / len(drawn),
                "tokens_per_second": metrics["tokens"] / (time.perf_counter() - began),
            }
            context.stage.log(step=step, **metrics)
            bar.advance(loss=metrics["loss"])
            step += 1
            if save_due(step, step + 1, config.save_every, optimizer.unsaved_seconds):
                context.stage.save_state(
                    step, optimizer.tensors(), {**optimizer.counters(), "learnt": learnt}
                )
    encoder.note_ends()
    return {**metrics, "steps": step}
