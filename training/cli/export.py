"""`export`: a checkpoint of a run as a folder to give away, with its model card."""

import argparse
import re
import shutil
from pathlib import Path

from training import adapters, checkpoint, files
from training.cli.arguments import add_run, existing_run
from training.cli.arguments import checkpoint as named_checkpoint
from training.errors import UserError
from training.files import readable_bytes

DTYPES = ("float32", "bfloat16", "float16")


def add(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `export`."""
    parser = subparsers.add_parser("export", help="write a checkpoint with its model card to a folder")
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[CHECKPOINT] OUT",
        help="such as zero or distill-llama (default: the last policy), and the folder, which must not exist",
    )
    add_run(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: that of the checkpoint, which is that of its start)",
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, as in 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="the adapters of a stage with model.lora in PEFT's layout, not the model with them merged",
    )
    parser.set_defaults(run_command=run_command)


def _size(word: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", word):
        raise argparse.ArgumentTypeError(
            f"expected a whole number of KB, MB, GB or TB, as in 500MB, got {word!r}"
        )
    return word


def run_command(arguments: argparse.Namespace) -> None:
    """Writes the folder and prints what is in it."""
    *named, out = arguments.words
    if len(named) > 1:
        raise UserError(f"expected one checkpoint and the folder, got {' '.join(arguments.words)}")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: name a folder that does not")
    run_dir = existing_run(arguments.run)
    name, path = named_checkpoint(run_dir, named[0] if named else None)
    from training.card import card  # loads transformers

    if arguments.adapters:
        source = adapters.beside(path)
        if not source.is_dir():
            raise UserError(
                f"{name} has no adapters: `lora` of the model or the student was not set, or the stage trains without them"
            )
        if arguments.dtype:
            raise UserError("--dtype: adapters are float32, as they were trained")
        base = files.read_json(source / "adapter_config.json")["base_model_name_or_path"]
        with files.replacing(out) as temporary:
            shutil.copytree(source, temporary)
            checkpoint.load_tokenizer(path).save_pretrained(temporary)
            _finish(temporary, path, card(run_dir, name, base))
    else:
        model, tokenizer = checkpoint.load_model(path, arguments.dtype or "auto")
        with files.replacing(out) as temporary:
            temporary.mkdir()
            model.save_pretrained(temporary, max_shard_size=arguments.shard_size)
            tokenizer.save_pretrained(temporary)
            _finish(temporary, path, card(run_dir, name))
    size = sum(each.stat().st_size for each in out.iterdir())
    print(
        f"{name} of {run_dir.path} is {out} ({readable_bytes(size)}): {', '.join(sorted(f.name for f in out.iterdir()))}"
    )


def _finish(folder: Path, path: Path, text: str) -> None:
    """Adds to an exported folder the card, the prompt that the checkpoint was trained with, and the manifest."""
    (folder / "README.md").write_text(text, encoding="utf-8")
    if (path / checkpoint.STYLE).is_file():
        shutil.copyfile(path / checkpoint.STYLE, folder / checkpoint.STYLE)
    files.write_json(folder / checkpoint.MANIFEST, files.folder_hashes(folder))
