"""`evaluate`: the marks of one checkpoint, of a run or any other folder."""

import argparse
from dataclasses import replace
from pathlib import Path

from training import files
from training.check import check
from training.cli.arguments import add_out, add_run, between, checkpoint, existing_run, task_of, with_stage
from training.engines.workspace import current_workspace
from training.errors import UserError
from training.format import align, percent
from training.placement import placed
from training.prompts import STYLES
from training.recipe import Recipe, make


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `evaluate`."""
    parser = subparsers.add_parser("evaluate", help="marks of one checkpoint on held-out problems")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CHECKPOINT | key=value",
        help="such as zero, or a folder (default: the last policy), then settings such as k=8",
    )
    add_run(parser)
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint of no run; needs --data")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="JSONL or Parquet of questions and answers, all of which are asked, or a task such as hf:openai/gsm8k, of which "
        "the test split is; needs --model",
    )
    parser.add_argument(
        "--prompt",
        choices=STYLES,
        help="how it is asked: chat is the bare question, zero the template of R1-Zero (default: what the checkpoint's "
        "folder notes, else chat)",
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        metavar="lm-eval:TASK",
        help="a task of EleutherAI's lm-eval, or a YAML file of one, in place of the recipe's problems; may be given several times",
    )
    parser.add_argument(
        "--limit", type=between(int, 1), metavar="N", help="examples of a benchmark's task (default: all)"
    )
    parser.add_argument(
        "--shots",
        type=between(int, 0),
        metavar="N",
        help="worked examples in a benchmark's prompts (default: the task's)",
    )
    add_out(parser, "also write the rows to this JSONL file")
    parser.set_defaults(run_command=run_command)


def run_command(arguments: argparse.Namespace) -> None:
    """Prints one line a split and language, or one a task and metric of benchmarks."""
    if arguments.benchmark:
        _benchmarks(arguments)
        return
    from training import responses  # loads transformers
    from training.stages.evaluate import marks

    recipe, stage, name, path = _asked(arguments)
    with placed(recipe), current_workspace():  # one server for all that is asked
        source = responses.load_source(stage, path, recipe, arguments.prompt)
        rows, _ = marks(source, name, recipe, recipe.evaluate)
    hidden = (
        "checkpoint",
        "split",
        "language",
        "problems",
        "greedy_problems",
        "length",
        "k",
        "reward_errors",
    )
    shown = [key for key in rows[0] if key not in hidden]
    header = ["split", "language", "problems", *shown, "length"]
    body = [
        [
            row["split"],
            row["language"],
            str(row["problems"]),
            *(percent(row[key]) for key in shown),
            "-" if row["length"] is None else f"{row['length']:.1f}",
        ]
        for row in rows
    ]
    print(f"{name} (in %, length in tokens; prompt: {source.style})")
    print("\n".join(align([header, *body])))
    errors = sum(row["reward_errors"] for row in rows if row["language"] == "all")
    if errors:
        print(f"the check raised on {errors} responses, which count as wrong")
    if arguments.out:
        files.write_jsonl(arguments.out, rows)


def _benchmarks(arguments: argparse.Namespace) -> None:
    from training import benchmarks  # loads transformers
    from training.model import load
    from training.pretrained import pretrained_folder

    for spec in arguments.benchmark:
        benchmarks.check(spec)
    if arguments.data or any("=" in word for word in arguments.words):
        raise UserError(
            "--benchmark: expected a checkpoint or --model FOLDER alone: a benchmark has data and settings of its own"
        )
    if arguments.model:
        recipe, name, path = make({}), arguments.model, pretrained_folder(arguments.model, "--model")
    else:
        recipe, _, name, path = _of_run(arguments, [])
    options = benchmarks.Options(arguments.limit, arguments.shots, arguments.prompt == "chat")
    with placed(recipe):
        model, tokenizer = load(path)
        rows = [
            row for spec in arguments.benchmark for row in benchmarks.run(spec, model, tokenizer, options)
        ]
    body = [
        [row["task"], metric, f"{value:.4f}", str(row["samples"] or "-")]
        for row in rows
        for metric, value in row["metrics"].items()
    ]
    print(name)
    print("\n".join(align([["task", "metric", "value", "examples"], *body])))
    if arguments.out:
        files.write_jsonl(arguments.out, [{"checkpoint": name, **row} for row in rows])


def _asked(arguments: argparse.Namespace) -> tuple[Recipe, str, str, Path]:
    """Recipe, stage ("" for a folder of no stage), name and folder of what a command evaluates."""
    named = [word for word in arguments.words if "=" not in word]
    settings = [with_stage(word, "evaluate") for word in arguments.words if "=" in word]
    if (arguments.model is None) != (arguments.data is None) or (arguments.model and named):
        raise UserError("expected --model FOLDER with --data FILE, or the name of a checkpoint of the run")
    if arguments.model:
        from training.pretrained import pretrained_folder

        folder, task = pretrained_folder(arguments.model, "--model"), task_of(arguments.data)
        values = {
            "model": {"pretrained": str(folder)},
            "stages": ["evaluate"],
            "task": [task],
        }
        recipe = make(values, settings)
        if task != arguments.data:  # a file
            recipe.task_options[task] = {"test_share": 1.0, **recipe.task_options.get(task, {})}
        check(recipe)
        return recipe, "", arguments.model, folder
    return _of_run(arguments, settings)


def _of_run(arguments: argparse.Namespace, settings: list[str]) -> tuple[Recipe, str, str, Path]:
    """The same of a checkpoint of a run, or of a folder that is asked by the recipe of a run."""
    named = [word for word in arguments.words if "=" not in word]
    if len(named) > 1:
        raise UserError(f"expected one checkpoint and then key=value words, got {' '.join(named)}")
    run_dir = existing_run(arguments.run)
    recipe = run_dir.read_recipe(settings)
    check(replace(recipe, stages=["evaluate"]))  # what the other stages began with may be gone by now
    if named and Path(named[0]).is_dir():
        return recipe, "", named[0], Path(named[0])
    name, path = checkpoint(run_dir, named[0] if named else None)
    return recipe, name.split("-")[0], name, path
