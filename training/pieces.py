"""Sampling in pieces that stay in the stage's folder while it runs, so that a killed stage repeats no finished piece.

What is drawn depends on keys alone (training.loops.sample), and which prompts share a piece is a function of their order:
a run that goes on draws the same tokens in the same batches as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from training import files
from training.context import StageContext
from training.engines import Engine
from training.loops.sample import Completion, Prompt, sample
from training.parallel import ranks
from training.progress import Progress

BATCHES = 4  # full batches of each rank in a piece: seldom does one drain, and a kill costs little
KEPT = [field.name for field in fields(Completion) if field.name not in ("problem", "routing", "kept")]


def sample_in_pieces(
    context: StageContext | None,
    identity: Any,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    samples: int = 1,
    batch_size: int,
    seed_parts: tuple[int | str, ...],
    **settings: Any,
) -> list[Completion]:
    """What `loops.sample.sample` returns, a piece at a time.

    Args:
        context: of the stage whose folder keeps the pieces until it is done, and which shows a bar where there are several;
            None keeps and shows nothing.
        identity: JSON value that tells this call from others of the stage with the same seed_parts, problems and
            settings, such as the hash of the checkpoint.
        engine, prompts, samples, batch_size, seed_parts, settings: as in `sample`, without routing and kept sets.
    """
    size = max(1, ranks.world() * BATCHES * batch_size // samples)
    call = files.value_hash([identity, samples, list(seed_parts), settings])
    found: list[Completion] = []
    shown = context.progress if context is not None and len(prompts) > size else Progress(quiet=True)
    with shown.bar(len(prompts) * samples, 0, f"{context.name} samples" if context else "") as bar:
        for first in range(0, len(prompts), size):
            asked = prompts[first : first + size]
            problems = [prompt.problem.id for prompt in asked]
            name = files.value_hash([call, first, problems])
            path = context.stage.piece(name) if context else None
            if path is not None and ranks.once(path.is_file):
                drawn = _read(path, asked, samples)
            else:
                drawn = sample(
                    engine,
                    asked,
                    samples=samples,
                    batch_size=batch_size,
                    seed_parts=seed_parts,
                    **settings,
                )
                if path is not None and ranks.main():
                    files.write_jsonl(path, [{key: getattr(each, key) for key in KEPT} for each in drawn])
            found += drawn
            bar.advance(len(drawn))
    return found


def _read(path: Path, asked: Sequence[Prompt], samples: int) -> list[Completion]:
    """The completions of a kept piece: the samples of a prompt stand side by side, as `sample` returns them."""
    found = []
    for index, row in enumerate(files.read_jsonl(path)):
        kept: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
        found.append(Completion(problem=asked[index // samples].problem, **kept))
    return found
