"""The stages of the pipeline, in the order of the recipe's sections, and which of them runs next.

A stage runs when it is not done. It is done when its outputs are what it wrote and it was made with these settings
from these inputs, all by hash. Finished or half-finished work that does not fit is never thrown away unasked: the
run stops with one line that says what differs and how to force it (`--redo STAGE`). What comes after a stage that ran
again runs again by itself where its input changed.
"""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from training import files, notices, sinks
from training.config import rounding_differences, unknown
from training.context import StageContext
from training.engines.workspace import workspace_in
from training.errors import UserError
from training.parallel import ranks
from training.placement import device_of, placed
from training.progress import Progress
from training.recipe import STAGE_NAMES, Recipe, remarks, stage_config, start_of
from training.run_dir import RunDir, StageDir

Made = Literal["policy", "data", "critic", "marks"]


@dataclass(frozen=True)
class Stage:
    """A stage: what it does in a few words, what it is made from, where its `run(context)` is, and what it makes."""

    title: str
    parents: Callable[[Recipe], Sequence[str]]
    module: str
    makes: Made = "policy"

    def run(self, context: StageContext) -> dict[str, Any]:
        """Does the work of the stage (its module is imported only now) and returns its final metrics."""
        metrics: dict[str, Any] = importlib.import_module(self.module).run(context)
        return metrics


def _evaluated(recipe: Recipe) -> Sequence[str]:
    return [name for name in (*POLICIES, "reward_models") if name in recipe.stages]


def _starting(stage: str, *others: str) -> Callable[[Recipe], Sequence[str]]:
    """Parents of a stage: the one that it starts from, unless that is a folder, and `others`."""

    def parents(recipe: Recipe) -> Sequence[str]:
        start = start_of(recipe, stage)
        return (start, *others) if start in STAGE_NAMES else others

    return parents


def _reward_models(recipe: Recipe) -> Sequence[str]:
    return (*_starting("reward_models")(recipe), *recipe.reward_models.samples_from)


def _rl_all(recipe: Recipe) -> Sequence[str]:
    general = any(recipe.rl_all.mix.get(kind) for kind in ("helpful", "unsafe"))
    return (*_starting("rl_all")(recipe), *(["reward_models"] if general else []))


def _distill(recipe: Recipe) -> Sequence[str]:
    mixed = "rejection" in recipe.stages and not recipe.distill.data
    return (*_starting("distill")(recipe), *(["rejection"] if mixed else []))


def _learning(stage: str, data: str) -> Callable[[Recipe], Sequence[str]]:
    """Parents of an SFT stage: what it starts from, and the stage that makes its data, unless they are a file."""
    return lambda recipe: _starting(stage, *([] if getattr(recipe, stage).data else [data]))(recipe)


def _stage(
    module: str, title: str, parents: Callable[[Recipe], Sequence[str]], makes: Made = "policy"
) -> Stage:
    return Stage(title, parents, f"training.stages.{module}", makes)


_BY_NAME = {
    "base": _stage("base", "pretraining, or a pretrained model as it is", lambda recipe: ()),
    "zero": _stage("zero", "R1-Zero: GRPO with rule rewards only", _starting("zero")),
    "sft1": _stage("sft", "SFT on the cold-start data, or on a file", _learning("sft1", "cold_start")),
    "rl_reasoning": _stage("rl_reasoning", "GRPO with the language reward", _starting("rl_reasoning")),
    "sft2": _stage("sft", "SFT on the mix, or on a file", _learning("sft2", "rejection")),
    "rl_all": _stage("rl_all", "GRPO over all scenarios", _rl_all),
    "distill": _stage("distill", "distillation to dense students", _distill),
    "cold_start": _stage(
        "cold_start",
        "cold-start data",
        lambda recipe: tuple(dict.fromkeys(recipe.cold_start.routes.values())),
        "data",
    ),
    "rejection": _stage(
        "rejection",
        "rejection sampling",
        lambda recipe: ("rl_reasoning", "judge", recipe.rejection.general_from),
        "data",
    ),
    "judge": _stage(
        "judge",
        "the generative judge",
        lambda recipe: (*_starting("judge")(recipe), *recipe.judge.samples_from),
        "critic",
    ),
    "reward_models": _stage("reward_models", "helpful and safety reward models", _reward_models, "critic"),
    "evaluate": _stage("evaluate", "marks of every checkpoint", _evaluated, "marks"),
}
STAGES: Mapping[str, Stage] = {name: _BY_NAME[name] for name in STAGE_NAMES}
POLICIES = tuple(name for name, stage in STAGES.items() if stage.makes == "policy")


def parents_of(name: str, recipe: Recipe, stages: Mapping[str, Stage] = STAGES) -> list[str]:
    """The stages that `name` is made from, each once, in the order of the pipeline."""
    named = set(stages[name].parents(recipe))
    for parent in sorted(named - set(stages)):
        raise UserError(f"{name}: {unknown('stage', parent, stages)}")
    return [stage for stage in stages if stage in named]


def plan(recipe: Recipe, stages: Mapping[str, Stage] = STAGES) -> list[str]:
    """The stages that the recipe runs, in order.

    Raises:
        UserError: a stage needs one that the recipe leaves out, or one that comes after it.
    """
    for stage in recipe.stages:
        if stage not in stages:
            raise unknown("stage", stage, stages)
    order = [stage for stage in stages if stage in recipe.stages]
    for position, name in enumerate(order):
        for parent in parents_of(name, recipe, stages):
            if parent not in recipe.stages:
                raise UserError(f"stage {name} needs {parent}, which the recipe's list of stages leaves out")
            if parent not in order[:position]:
                raise UserError(f"stage {name} cannot be made from {parent}, which comes after it")
    return order


def run(
    recipe: Recipe,
    run_dir: RunDir,
    only: str | None = None,
    *,
    redo: Collection[str] = (),
    progress: Progress | None = None,
    stages: Mapping[str, Stage] = STAGES,
) -> list[str]:
    """Runs what is not done, in order; a stage that was cut off goes on where it was.

    Args:
        recipe: settings; written to recipe.yaml once nothing speaks against the run.
        run_dir: folder of the run; one command at a time.
        only: run this stage alone; its parents must be done.
        redo: stages whose work is thrown away and done again.
        progress: where a person sees it; the terminal by default.
        stages: the table of stages.

    Returns:
        The stages that ran.

    Raises:
        UserError: what training.check finds, unknown stage, a missing or changed input, work made with other settings, a run
            in use, no such device.
    """
    from training.check import check  # it reads this module's table

    progress = progress or Progress()
    order = plan(recipe, stages)
    for remark in check(recipe, stages):
        progress.say(f"note: {remark}")
    for name in (*redo, *([only] if only else ())):
        if name not in order:
            raise unknown("stage", name, order)
    wanted = [only] if only else order
    device_of(recipe)
    with run_dir.lock():
        again = _open_run(run_dir, recipe, wanted, redo, stages, bool(only), progress)
        _prepare(recipe)
        ran = []
        for number, name in enumerate(wanted, start=1):
            heading = f"[{number}/{len(wanted)}] {name}: {stages[name].title}"
            if _run_stage(run_dir, name, recipe, stages, heading, name in redo, name in again, progress):
                ran.append(name)
    return ran


@ranks.by_main
def _open_run(
    run_dir: RunDir,
    recipe: Recipe,
    wanted: Sequence[str],
    redo: Collection[str],
    stages: Mapping[str, Stage],
    alone: bool,
    progress: Progress,
) -> set[str]:
    """Writes the recipe, once nothing speaks against the run. Returns the stages whose work on the disk is to be replaced.

    alone: a single stage runs, whose parents must be done.
    """
    again: set[str] = set()
    for name in wanted:  # before anything is written
        parents = parents_of(name, recipe, stages)
        if alone:
            _require(run_dir, name, parents)
        if name in redo or again & set(parents):
            again.add(name)
        else:
            _refuse_changed(run_dir, name, recipe, parents, certain=_all_done(run_dir, parents))
    for text in (*_rounding(run_dir, recipe), *remarks(recipe)):
        progress.say(f"warning: {text}")
    run_dir.write_recipe(recipe)
    return again


def _all_done(run_dir: RunDir, parents: Sequence[str]) -> bool:
    return all(run_dir.stage(parent).record() is not None for parent in parents)


def _require(run_dir: RunDir, name: str, parents: Sequence[str]) -> None:
    for parent in parents:
        stage = run_dir.stage(parent)
        if stage.record() is None:
            command = f"python -m training stage {parent} --run {run_dir.path}"
            raise UserError(f"stage {name} needs {parent}, which is not done: first run `{command}`")
        changed = stage.changed_output()
        if changed:
            raise UserError(
                f"stage {name} reads {changed}, which is missing or not what stage {parent} wrote: put it back, or "
                f"run {parent} again with --redo {parent}"
            )


def _refuse_changed(
    run_dir: RunDir, name: str, recipe: Recipe, parents: Sequence[str], certain: bool
) -> None:
    """Raises where work on the disk was made otherwise; inputs are compared where they are `certain` by now."""
    stage = run_dir.stage(name)
    record = stage.record() or stage.started()
    if record is None:
        return
    force = f"put it back, or run {name} and what depends on it again with --redo {name}"
    changed = stage.changed_output()
    if changed:
        raise UserError(f"{changed} is missing or not what stage {name} wrote: {force}")
    differs = _changed(record["config"], stage_config(recipe, name))
    if differs:
        raise UserError(f"stage {name} {differs}: {force}; or use another --run folder")
    if certain and record["inputs"] != inputs_of(run_dir, parents):
        which = difference(record["inputs"], inputs_of(run_dir, parents), shorten=8)
        raise UserError(f"stage {name} was made from other inputs ({which}): {force}")


def inputs_of(run_dir: RunDir, parents: Sequence[str]) -> dict[str, str]:
    """Parent -> hash of what it made; the parents must be done."""
    return {parent: (run_dir.stage(parent).record() or {})["hash"] for parent in parents}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What a stage was made with that is otherwise by now; "" where all is the same."""
    files = before.get("files", {})
    found = difference({**before, "files": {}}, {**after, "files": {}})
    if found:
        return f"was made with {found}"
    edited = [each for each, digest in after.get("files", {}).items() if files.get(each) != digest]
    return f"read {edited[0]}, whose content has changed since" if edited else ""


def difference(before: Any, after: Any, place: str = "", shorten: int | None = None) -> str:
    """The first place where two nested values differ: "zero.lr = 0.0005 and now it is 0.001"; "" where none does."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in (*before, *(key for key in after if key not in before)):
            found = difference(
                before.get(key), after.get(key), f"{place}.{key}" if place else str(key), shorten
            )
            if found:
                return found
        return ""
    if before == after:
        return ""
    was, now = ("left out" if value is None else str(value)[:shorten] for value in (before, after))
    return f"{place} = {was} and now it is {now}"


def _run_stage(
    run_dir: RunDir,
    name: str,
    recipe: Recipe,
    stages: Mapping[str, Stage],
    heading: str,
    redo: bool,
    may_replace: bool,
    progress: Progress,
) -> bool:
    stage = run_dir.stage(name)
    parents = parents_of(name, recipe, stages)
    if not _open_stage(stage, run_dir, recipe, parents, heading, redo, may_replace, progress):
        return False
    context = StageContext(
        name, recipe, getattr(recipe, name), stage, {p: run_dir.stage(p) for p in parents}, progress
    )

    def hear(kind: str, text: str) -> None:
        if stage.add_warning(kind, text):
            progress.say(f"warning: {name}: {text}")

    with (
        placed(recipe),
        workspace_in(run_dir.path),
        notices.listening(hear),
        sinks.listening(recipe, stage.path),
    ):
        metrics = stages[name].run(context)
    stage.finish(metrics)
    return True


@ranks.by_main
def _open_stage(
    stage: StageDir,
    run_dir: RunDir,
    recipe: Recipe,
    parents: Sequence[str],
    heading: str,
    redo: bool,
    may_replace: bool,
    progress: Progress,
) -> bool:
    """Makes the folder of a stage ready for its work; False where the work is done."""
    name = stage.name
    inputs, config = inputs_of(run_dir, parents), stage_config(recipe, name)
    record = stage.record()
    made = record or stage.started()
    fits = (
        made is not None
        and made["inputs"] == inputs
        and made["config"] == config
        and not stage.changed_output()
    )
    if record and fits and not redo:
        stage.tidy()
        progress.say(f"{heading} (done before)")
        return False
    if made is not None and (redo or not fits):
        if not may_replace:
            raise UserError(f"stage {name} was made from other inputs: run it again with --redo {name}")
        files.remove(stage.path)
    goes_on = stage.started() is not None
    progress.say(heading + (" (goes on)" if goes_on else ""))
    stage.begin(config, inputs)
    return True


def _rounding(run_dir: RunDir, recipe: Recipe) -> list[str]:
    """A warning for every setting that may change the last bits of what this run has already begun."""
    begun = any(run_dir.stage(name).record() or run_dir.stage(name).started() for name in recipe.stages)
    try:
        before = run_dir.read_recipe()
    except UserError:
        return []  # none yet, or one that this version cannot read
    return [
        f"{changed}: what follows may differ from the run so far in its last bits"
        for changed in rounding_differences(before, recipe)
        if begun
    ]


def _prepare(recipe: Recipe) -> None:
    torch.set_num_threads(recipe.threads)
    if recipe.deterministic:
        torch.use_deterministic_algorithms(True)
