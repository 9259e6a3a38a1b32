"""transformers' own tests of models, over its mixtures, without and with the patch.

tests is the folder tests/ of the source distribution of the transformers that is installed (``pip download --no-deps --no-binary
transformers transformers==VERSION``); nothing of it is kept. Its ModelTesterMixin runs over the tiny model of each family
(mixtures.py), once as it is and once with every model patched before its first forward. A test must end in both as in one.
"""

import contextlib
import importlib
import io
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from r1kernels.integrations import transformers as integration

from ..table import Cell, Table
from . import mixtures

PACKAGE = "tests_of_transformers"
# What the source distribution leaves out, and the name that a test file takes from it.
LEFT_OUT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
FAMILIES = """
afmoe deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo glm4_moe gpt_oss granitemoe hunyuan_v1_moe jamba lfm2_moe
minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe qwen3_next solar_open
"""
# Those that run a model, forward or backward, on a CPU within seconds, without their test_.
TESTS = """
save_load torch_save_load determinism batching_equivalence gradient_checkpointing_enable_disable
peft_gradient_checkpointing_enable_disable enable_input_require_grads
enable_input_require_grads_with_gradient_checkpointing causal_lm_loss_honors_shift_labels training
training_gradient_checkpointing training_gradient_checkpointing_use_reentrant_false
training_gradient_checkpointing_use_reentrant_true attention_outputs hidden_states_output
retain_grad_hidden_states_attentions feed_forward_chunking resize_tokens_embeddings resize_embeddings_untied
model_outputs_equivalence inputs_embeds inputs_embeds_matches_input_ids load_save_without_tied_weights problem_types
eager_matches_sdpa_inference eager_matches_batched_and_grouped_inference can_set_attention_dynamically
capture_outputs_decorator moe_models_record_router_logits output_router_logits_from_config
can_capture_specific_layers_hidden_states model_rope_scaling_from_config
"""


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
        patched = torch.compiler.is_compiling() or any(hasattr(one, "_r1kernels") for one in self.modules())
        if not patched:
            integration.patch(self)
            names.append(type(self).__name__)
        return plain(self, *arguments, **options)

    transformers.PreTrainedModel.__call__ = call
    try:
        yield names
    finally:
        del transformers.PreTrainedModel.__call__


def run(common: Any, family: str) -> dict[str, str]:
    """Test of a family -> "passed", "skipped", or the last line of what it failed with."""

    def set_up(self: Any) -> None:
        transformers.set_seed(0)
        self.model_tester = Tester(family)

    members = {"all_model_classes": (mixtures.model_class(family),), "setUp": set_up}
    case = type(family, (common.ModelTesterMixin, unittest.TestCase), members)
    # some are expanded into several, with a number behind the name
    chosen = tuple(f"test_{name}" for name in TESTS.split())
    names = [name for name in unittest.TestLoader().getTestCaseNames(case) if name.startswith(chosen)]
    suite, result = unittest.TestSuite(map(case, names)), unittest.TestResult()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        suite.run(result)
    said = dict.fromkeys(names, "passed")
    for tests in (result.skipped, result.failures, result.errors):
        for test, text in tests:
            whole: Any = getattr(test, "test_case", test)  # of a part of a test
            last = text.strip().splitlines()[-1][:200]
            said[whole._testMethodName] = "skipped" if tests is result.skipped else last
    return said


def compare(common: Any, family: str) -> dict[str, Any]:
    """Outcomes without and with the patch."""
    plain = run(common, family)
    with every_model_patched() as names:
        ours = run(common, family)
    ended = ("passed", "skipped")
    counted = Counter(outcome if outcome in ended else "failed" for outcome in plain.values())
    both = {name: [plain.get(name, ""), ours.get(name, "")] for name in sorted({*plain, *ours})}
    return {
        "family": family,
        "model": mixtures.model_class(family).__name__,
        **{outcome: counted[outcome] for outcome in (*ended, "failed")},
        "patched_models": len(names),
        "failed_without": {name: said for name, said in plain.items() if said not in ended},
        # whatever fails in both ways may say so in two ways
        "differ": {name: pair for name, pair in both.items() if len({*pair}) > 1 and {*pair} & {*ended}},
    }


def measure(tests: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    common = common_tests(tests)
    return {"families": [compare(common, family) for family in only or FAMILIES.split()]}


def tables(record: dict[str, Any]) -> list[Table]:
    """A row for each family, and one for each test that ends in another way with the patch."""
    rows = record["families"]
    version = record["environment"]["packages"]["transformers"]
    note = (
        f"transformers {version}: {sum(row['passed'] for row in rows)} of its tests pass over the tiny models of {len(rows)} families "
        f"as they are; with every model patched {sum(len(row['differ']) for row in rows)} end in another way."
    )
    head = ("family", "passed", "skipped", "failed, patched or not", "models patched")
    found = Table("Suite", head, note=note)
    for row in rows:
        counts = (str(row[key]) for key in ("passed", "skipped"))
        failed = ", ".join(row["failed_without"]) or "-"
        found.rows.append([row["family"], *counts, failed, str(row["patched_models"])])
        for name, (before, after) in row["differ"].items():
            found.rows.append([row["family"], name, before, Cell(f"patched: {after}", "failed"), ""])
    return [found]
