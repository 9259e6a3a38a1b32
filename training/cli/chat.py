"""`chat`: talk to any checkpoint of a run."""

import argparse
import sys
from typing import Any

from training.cli.arguments import add_run, between, checkpoint, existing_run
from training.placement import placed
from training.recipe import Rollout
from training.response import parse
from training.tasks.problem import Problem, problem_id


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `chat`."""
    parser = subparsers.add_parser("chat", help="talk to a checkpoint of a run")
    parser.add_argument(
        "checkpoint", nargs="?", help="such as zero or distill-llama (default: the last policy)"
    )
    add_run(parser)
    parser.add_argument(
        "--temperature", type=between(float, 0), default=0.6, metavar="T", help="0 is greedy (default: 0.6)"
    )
    parser.add_argument(
        "--top-p",
        type=between(float, 0, 1),
        default=0.95,
        metavar="P",
        help="sample from the likeliest tokens that reach this probability together (default: 0.95)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=between(int, 1),
        metavar="N",
        help="longest response (default: that of evaluate)",
    )
    parser.set_defaults(run_command=run_command)


def run_command(arguments: argparse.Namespace) -> None:
    """Reads a question a line and prints the response; an empty line or the end of the input stops."""
    from training import responses  # loads transformers

    run_dir = existing_run(arguments.run)
    recipe = run_dir.read_recipe()
    name, path = checkpoint(run_dir, arguments.checkpoint)
    with placed(recipe):
        source = responses.load_source(name.split("-")[0], path, recipe)
        source.rollout = Rollout()  # whoever drew for the run, one answer at a time is drawn here
        _talk(source, recipe, arguments)


def _talk(source: Any, recipe: Any, arguments: argparse.Namespace) -> None:
    from training import prompts, responses

    asked = 0
    before = prompts.with_system((), recipe.system_prompt)
    interactive = sys.stdin.isatty()
    if interactive:
        print(
            f"{source.stage} of {arguments.run}; it knows what its tasks taught it, such as {_examples(recipe)}"
        )
        print("an empty line ends the talk")
    while True:
        try:
            question = input("you: " if interactive else "").strip()
        except EOFError:
            return
        if not question:
            return
        strange = _unknown_words(source.tokenizer, question)
        if strange:
            print(f"(it has never seen: {', '.join(strange)})")
        problem = Problem(
            problem_id("chat", "", question, "en"), "chat", "helpful", "en", question, "", before=before
        )
        (completion,) = responses.draw(
            source,
            [problem],
            samples=1,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            max_new_tokens=arguments.max_new_tokens or recipe.evaluate.max_new_tokens,
            seed_parts=(recipe.seed, "chat", asked),
        )
        asked += 1
        print(_shown(completion.text, source.response_format, sys.stdout.isatty()))


def _examples(recipe: Any) -> str:
    from training import responses

    problems = responses.problems(recipe, "test", ("reasoning", "helpful"))
    chosen = responses.choose(problems, 3, recipe.seed, "chat")
    return "; ".join(repr(problem.question) for problem in chosen)


def _unknown_words(tokenizer: Any, question: str) -> list[str]:
    """Words that a closed vocabulary lacks; a tokenizer of pieces knows every word."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > 1000:
        return []
    return [word for word in question.split() if word not in vocabulary and not word.isdigit()]


def _shown(text: str, response_format: str, colour: bool) -> str:
    """The response with its thinking dimmed and its answer in bold, where the terminal can."""
    response = parse(text, response_format)
    if not colour or not response.think or not response.answer:
        return text
    dimmed = text.replace(response.think, f"\033[2m{response.think}\033[0m", 1)
    head, _, tail = dimmed.rpartition(response.answer)
    return f"{head}\033[1m{response.answer}\033[0m{tail}"
