"""`review`: a person accepts, edits or rejects the cold-start data before sft1 learns it.

Every decision is kept in review.jsonl beside the data, so a review can stop and go on. At the end data.jsonl holds
what was accepted or edited (an edited row keeps its text as `before`), and the stage's hashes are renewed; stages
that were made from the data before are then refused until they are run again.
"""

import argparse
from typing import Any

from training.cli.arguments import add_run, existing_run
from training.errors import UserError
from training.response import parse
from training.run_dir import REVIEW_FILES

UNREVIEWED, DECISIONS = REVIEW_FILES
HELP = "[a]ccept, [e]dit, [r]eject, accept [A]ll that is left, [q]uit and keep the decisions"


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `review`."""
    parser = subparsers.add_parser("review", help="accept, edit or reject the cold-start data by hand")
    add_run(parser)
    parser.set_defaults(run_command=run_command)


def run_command(arguments: argparse.Namespace) -> None:
    """Asks about every row that has no decision yet."""
    run_dir = existing_run(arguments.run)
    response_format = run_dir.read_recipe().response_format
    with run_dir.lock():
        stage = run_dir.stage("cold_start")
        if stage.record() is None:
            raise UserError(f"stage cold_start of {run_dir.path} is not done: run it first")
        if not stage.data(UNREVIEWED).is_file():
            stage.write_data(UNREVIEWED, stage.read_data("data.jsonl"))
        rows = stage.read_data(UNREVIEWED)
        decisions = stage.read_data(DECISIONS) if stage.data(DECISIONS).is_file() else []
        print(f"{len(rows)} responses, {len(decisions)} decided; {HELP}")
        try:
            for number in range(len(decisions), len(rows)):
                decision = _ask(number, len(rows), rows[number], response_format)
                if decision is None:
                    break
                if decision["decision"] == "accept all":
                    decisions += [{"row": each, "decision": "accept"} for each in range(number, len(rows))]
                    break
                decisions.append({"row": number, **decision})
        finally:
            stage.write_data(DECISIONS, decisions)
        if len(decisions) < len(rows):
            print(f"{len(decisions)} of {len(rows)} decided; data.jsonl is as it was until all are")
            return
        from training.checkpoint import load_model  # loads transformers

        _, tokenizer = load_model(run_dir.stage("base").path / "checkpoint")
        kept = [
            _reviewed(rows[decision["row"]], decision, tokenizer)
            for decision in decisions
            if decision["decision"] != "reject"
        ]
        if not kept:
            raise UserError(
                "everything was rejected: sft1 would have nothing to learn, so data.jsonl stays as it was"
            )
        stage.write_data("data.jsonl", kept)
        stage.seal()
        print(
            f"{len(kept)} of {len(rows)} responses stay in {stage.data('data.jsonl')}; run the pipeline to go on"
        )


def _ask(number: int, total: int, row: dict[str, Any], response_format: str) -> dict[str, Any] | None:
    """The decision about one row; None to quit."""
    print(
        f"\n[{number + 1}/{total}] {row.get('route', '')} ({row['language']})\n  {row['question']}\n  -> {row['response_text']}"
    )
    while True:
        try:
            word = input("a/e/r/A/q: ").strip()
        except EOFError:
            return None
        if word == "q":
            return None
        if word == "A":
            return {"decision": "accept all"}
        if word in ("a", "r"):
            return {"decision": "accept" if word == "a" else "reject"}
        if word == "e":
            text = input("new text: ").strip()
            response = parse(text, response_format)
            if response.well_formed:
                return {"decision": "edit", "text": text}
            print(f"not a well-formed response ({', '.join(response.flags)}); the row is still undecided")
        else:
            print(HELP)


def _reviewed(row: dict[str, Any], decision: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    if decision["decision"] == "accept":
        return row
    ids = tokenizer(decision["text"], add_special_tokens=False)["input_ids"]
    return {
        **row,
        "before": row.get("before", row["response_text"]),
        "response_text": decision["text"],
        "response_ids": [*ids, tokenizer.eos_token_id],
        "rules": [*row.get("rules", []), "edited by a person"],
    }
