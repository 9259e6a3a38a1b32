"""transformers' own tests of models, over its mixtures, without and with the patch.

    python -m bench suite TESTS [--only FAMILY] [--out OUT.json]

TESTS is the folder tests/ of the source distribution of the transformers that is installed (``pip download --no-deps --no-binary
transformers transformers==VERSION``); nothing of it is kept. Its ModelTesterMixin runs over the tiny model of each family
(bench/mixtures.py), once as it is and once with every model patched before its first forward. A test must end in both as in one.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from r1kernels.integrations import transformers as integration

from . import mixtures, results
from .environment import environment

PACKAGE = "tests_of_transformers"
# What the source distribution leaves out, and the name that a test file takes from it.
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
FAMILIES = (
    "afmoe",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "jamba",
    "lfm2_moe",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "solar_open",
)
# Those that run a model, forward or backward, on a CPU within seconds.
TESTS = (
    "test_save_load",
    "test_torch_save_load",
    "test_determinism",
    "test_batching_equivalence",
    "test_gradient_checkpointing_enable_disable",
    "test_peft_gradient_checkpointing_enable_disable",
    "test_enable_input_require_grads",
    "test_enable_input_require_grads_with_gradient_checkpointing",
    "test_causal_lm_loss_honors_shift_labels",
    "test_training",
    "test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_false",
    "test_training_gradient_checkpointing_use_reentrant_true",
    "test_attention_outputs",
    "test_hidden_states_output",
    "test_retain_grad_hidden_states_attentions",
    "test_feed_forward_chunking",
    "test_resize_tokens_embeddings",
    "test_resize_embeddings_untied",
    "test_model_outputs_equivalence",
    "test_inputs_embeds",
    "test_inputs_embeds_matches_input_ids",
    "test_load_save_without_tied_weights",
    "test_problem_types",
    "test_eager_matches_sdpa_inference",
    "test_eager_matches_batched_and_grouped_inference",
    "test_can_set_attention_dynamically",
    "test_capture_outputs_decorator",
    "test_moe_models_record_router_logits",
    "test_output_router_logits_from_config",
    "test_can_capture_specific_layers_hidden_states",
    "test_model_rope_scaling_from_config",
)


class Tester:
    """What transformers' tests ask of the tester of a model."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, family: str) -> None:
        config = mixtures.tiny_config(family)
        self._family = family
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> Any:
        """The config of the tiny model, with weights of the size that transformers' testers give: tolerances are absolute."""
        config = mixtures.tiny_config(self._family)
        config.initializer_range = 0.02
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The config, and a batch without padding."""
        ids = torch.randint(3, mixtures.SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Outcomes(unittest.TestResult):
    """test -> "passed", "skipped", or the last line of what it failed with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def addSuccess(self, test: Any) -> None:
        self.found.setdefault(test._testMethodName, "passed")

    def addSkip(self, test: Any, reason: str) -> None:
        self.found[test._testMethodName] = "skipped"

    def addFailure(self, test: Any, err: Any) -> None:
        self.found[test._testMethodName] = (str(err[1]).strip().splitlines() or [err[0].__name__])[-1][:200]

    addError = addFailure

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addFailure(test, err)


def common_tests(folder: Path) -> Any:
    """transformers' test_modeling_common.py, imported from the folder."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for name, mixin in LEFT_OUT.items():
        if not (folder / f"{name.replace('.', '/')}.py").is_file():
            parent, module = types.ModuleType(f"{PACKAGE}.{name.split('.')[0]}"), types.ModuleType(name)
            parent.__path__ = []
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules |= {parent.__name__: parent, f"{PACKAGE}.{name}": module}
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


@contextlib.contextmanager
def every_model_patched() -> Iterator[list[str]]:
    """Patches each model at its first forward; yields the names of their classes."""
    names: list[str] = []
    plain = torch.nn.Module.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling() and not any(
            hasattr(one, "_r1kernels") for one in self.modules()
        ):
            integration.patch(self)
            names.append(type(self).__name__)
        return plain(self, *arguments, **options)

    transformers.PreTrainedModel.__call__ = call
    try:
        yield names
    finally:
        del transformers.PreTrainedModel.__call__


def run(common: Any, family: str) -> dict[str, str]:
    """The outcomes of the tests of a family."""

    def set_up(self: Any) -> None:
        transformers.set_seed(0)
        self.model_tester = Tester(family)

    members = {"all_model_classes": (mixtures.model_class(family),), "setUp": set_up}
    case = type(family, (common.ModelTesterMixin, unittest.TestCase), members)
    # some are expanded into several, with a number behind the name
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if name.startswith(TESTS)]
    suite, found = unittest.TestSuite(map(case, names)), Outcomes()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        suite.run(found)
    return found.found


def compare(common: Any, family: str) -> dict[str, Any]:
    """Outcomes without and with the patch."""
    plain = run(common, family)
    with every_model_patched() as names:
        ours = run(common, family)
    counted = Counter(outcome if outcome in ("passed", "skipped") else "failed" for outcome in plain.values())
    return {
        "family": family,
        "model": mixtures.model_class(family).__name__,
        **{outcome: counted[outcome] for outcome in ("passed", "skipped", "failed")},
        "patched_models": len(names),
        "failed_without": {name: said for name, said in plain.items() if said not in ("passed", "skipped")},
        "differ": {
            name: [plain.get(name, ""), ours.get(name, "")]
            for name in sorted({*plain, *ours})
            if (plain.get(name) in ("passed", "skipped") or ours.get(name) in ("passed", "skipped"))
            and plain.get(name) != ours.get(name)
        },
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = record["families"]
    version = record["environment"]["packages"]["transformers"]
    lines = [
        f"transformers {version}: {sum(row['passed'] for row in rows)} of its tests pass over the tiny models of {len(rows)} families "
        f"as they are; with every model patched {sum(len(row['differ']) for row in rows)} end in another way.",
        "",
        "| family | passed | skipped | failed, patched or not | models patched |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['family']} | {row['passed']} | {row['skipped']} | {', '.join(row['failed_without']) or '-'} | {row['patched_models']} |"
        for row in rows
    ]
    lines += [
        f"\n{row['family']}, {name}: {before}; patched: {after}"
        for row in rows
        for name, (before, after) in row["differ"].items()
    ]
    return "\n".join(lines)


def main(tests: Path, only: list[str], out: Path) -> int:
    """The command: 1 if a test ends in another way with the patch."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    common = common_tests(tests)
    rows: list[dict[str, Any]] = []
    date = datetime.date.today().isoformat()
    record = {"schema": 1, "date": date, "environment": environment("cpu"), "families": rows}
    for family in only or FAMILIES:
        rows.append(compare(common, family))
        results.save(out, record)
        print(f"{family}: {'ok' if not rows[-1]['differ'] else 'DIFFERS'}", flush=True)
    print(table(record))
    return int(any(row["differ"] for row in rows))
