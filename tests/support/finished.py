"""Whether a stage of a run is finished, as its own files tell."""

from training.run_dir import StageDir


def is_done(stage: StageDir) -> bool:
    """The stage has a record, its outputs are what it wrote, and it was made from what its parents hold now."""
    record = stage.record()
    if record is None or stage.changed_output() is not None:
        return False
    made = {parent: StageDir(stage.path.parent / parent).record() for parent in record["inputs"]}
    return all(made[parent] and made[parent]["hash"] == digest for parent, digest in record["inputs"].items())
