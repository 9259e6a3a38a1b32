"""The Triton kernel of linear_logprobs, compiled with every entry of the tuning tables for GPUs that are not here."""

import itertools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from r1kernels.logprob import triton_linear as backend
from r1kernels.logprob import tuning
from r1kernels.logprob.token import Rows, row_results
from tests.support import offline_triton

TABLES = sorted(Path(tuning.__file__).parent.glob("*.json"))
KINDS = {
    "plain": {"entropy": True},
    "plain, one temperature a token": {"entropy": True, "temperatures": True},
    "plain, bias and scale": {"entropy": False, "bias": True, "logit_scale": 0.5},
    "rich": {"entropy": True, "extra": True, "bias": True, "softcap": 30.0},
    "float32": {"entropy": True},
}
FEW = (
    (90, None, ("plain, one temperature a token", "rich")),
    (80, None, ("plain",)),
    (100, None, ("plain",)),
)
MATRIX = [
    *FEW,
    *(
        pytest.param(*point, tuple(KINDS), marks=pytest.mark.slow)
        for point in itertools.product(offline_triton.CAPABILITIES, (64, None))
    ),
]


def launch(capability, name, tokens, depth=2048):
    """One call; returns the tile of its kernel."""
    options = KINDS[name]
    kind = name.partition(",")[0]
    tile = tuning.choose("linear_forward", "", offline_triton.CAPABILITIES[capability], kind, tokens)
    count, vocabulary = 300, 1000
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    hidden, weight = torch.empty(count, depth, dtype=dtype), torch.empty(vocabulary, depth, dtype=dtype)
    rows = Rows(
        torch.zeros(vocabulary) if options.get("bias") else None,
        options.get("logit_scale", 1.0),
        options.get("softcap", 0.0),
        torch.zeros(count, dtype=torch.int64),
        torch.ones(count) if options.get("temperatures") else None,
        1.0,
        -100,
        0,
        vocabulary,
    )
    outputs = row_results(hidden, count, vocabulary, rows, options["entropy"], options.get("extra", False))
    backend.forward_into(hidden, weight, rows, options["entropy"], tile, *outputs)
    return tile


@pytest.mark.parametrize(("capability", "tokens", "names"), MATRIX)
def test_every_entry_fits_and_uses_the_tensor_cores(tmp_path, capability, tokens, names):
    with offline_triton.compile_only(capability) as compiled:
        tiles = [launch(capability, name, tokens) for name in names]
    assert [kernel.name for kernel in compiled] == ["linear_kernel", "finish_kernel"] * len(names)
    found = offline_triton.resources(compiled, tmp_path)
    for needs in found:
        assert needs.shared_bytes <= offline_triton.SHARED_BYTES[capability]
        assert needs.stack_bytes == 0 and needs.spill_instructions == 0, needs.name
    for name, tile, needs in zip(names, tiles, found[::2], strict=True):
        product = needs.instructions
        if name == "float32":
            assert "HMMA" not in product and "HGMMA" not in product, "tf32 would lose digits"
        else:
            assert offline_triton.WIDE_PRODUCTS.get(capability, "HMMA") in product
            assert offline_triton.serialised(product) == 0
        assert ("UTMALDG" in product) == tile.descriptors
        assert ("LDGSTS" in product) == (not tile.descriptors)


def test_an_odd_hidden_size_keeps_the_vectors():
    """H = 2049: rows are no multiple of 16 bytes, and are padded to one. The kernel is that of a whole multiple."""
    with offline_triton.specialise_only(80) as launched:
        for depth in (2048, 2049):
            launch(80, "plain", None, depth)
    assert len(launched) == 4 and launched[:2] == launched[2:]


def test_no_number_of_tokens_compiles_a_kernel_anew():
    kernels = []
    for count in (65, 128, 300, 4096):
        hidden, weight = (torch.empty(n, 64, dtype=torch.bfloat16) for n in (count, 1000))
        targets = torch.zeros(count, dtype=torch.int64)
        rows = Rows(None, 1.0, 0.0, targets, None, 0.7, -100, 0, 1000)
        tile = tuning.choose("linear_forward", "", (9, 0), "plain", count)
        outputs = row_results(hidden, count, 1000, rows, False, False)
        with offline_triton.specialise_only(90) as launched:
            backend.forward_into(hidden, weight, rows, False, tile, *outputs)
        kernels += launched
    assert len(kernels) == 8 and len(set(kernels)) == 2


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_tables_are_well_formed(path):
    """Entries in rising order of tokens; the default serves every class and kind, any number of tokens."""
    table = json.loads(path.read_text())["linear_forward"]
    if path.stem == "default":
        assert set(table) == {"sm_80", "sm_86", "sm_90", "sm_100"}
        own = table.pop("sm_100")  # besides, it takes what sm_90 has
        assert set(own) == {"plain"} and own["plain"][-1]["tokens"] is None
        assert all(set(kinds) == {"plain", "rich", "float32"} for kinds in table.values())
    for kinds in table.values():
        for entries in kinds.values():
            limits = [entry["tokens"] for entry in entries]
            assert path.stem != "default" or limits[-1] is None
            numbers = [limit for limit in limits if limit is not None]
            assert numbers == sorted(set(numbers)) and None not in limits[:-1]
            for entry in entries:
                assert set(entry) == {"tokens", "tile", "group", "warps", "stages", "descriptors"}


def test_the_entry_of_a_call():
    choose = tuning.choose
    plain = ("linear_forward", "NVIDIA H200", (9, 0), "plain")
    assert choose(*plain, 64).tokens == 64 and choose(*plain, 65).tokens == 128
    # batch invariance: one tile for any number of tokens
    assert choose(*plain, None) == choose(*plain, 100_000)
    assert choose("linear_forward", "some GPU to come", (13, 7), "plain", 9).stages > 0
