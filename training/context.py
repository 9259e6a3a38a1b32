"""What the pipeline hands to a stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.progress import Progress
from training.recipe import Recipe
from training.run_dir import StageDir


@dataclass
class StageContext:
    """Everything a stage may use: its settings, its folder, the folders of its parents, and the progress display.

    Every stage is `training/stages/<name>.py` with `run(context) -> dict`, which returns its final metrics.
    """

    name: str  # of the stage: "zero"
    recipe: Recipe
    config: Any  # the section of the recipe with the stage's name
    stage: StageDir
    inputs: dict[str, StageDir]  # by the parent's name
    progress: Progress

    def checkpoint(self, name: str) -> Path:
        """The checkpoint of an input; what is none is the folder of one."""
        return self.inputs[name].path / "checkpoint" if name in self.inputs else Path(name)
