"""The Triton kernels of moe_experts and grouped_gemm in Triton's interpreter. Run by test_interpreter.py.
T tokens, H hidden size, I intermediate size, E experts, K experts per token, S = T * K routed rows."""

import pytest
import torch

from r1kernels.moe import moe_experts, tuning
from r1kernels.moe import triton_products as backend_module
from r1kernels.moe.experts import GROUPED_GEMM, NO_LORA, GemmCall
from tests.support import interpreter_bfloat16
from tests.support.forced import run_on
from tests.support.moe_case import NAMES, Case, LoraCase, in_eager
from tests.support.moe_experts_kernel import DTYPES, SHAPES, MoeExpertsKernel
from tests.support.numerics import assert_as_exact_as, same_bits
from tests.support.redzones import Redzones
from tests.support.unchecked_offsets import assert_every_row_is_written

interpreter_bfloat16.repair()

SMALL = tuning.Tile(16, 32, 32, group=2, warps=4, stages=2, descriptors=False)
ops = torch.ops.r1kernels
SILU = (0, 1.0, float("inf"), 0.0, False)  # activation, alpha, limit, shift, batch_invariant
SMALL_SHAPES = {  # as SHAPES
    "odd, prime E": (7, 33, 9, 5, 3),
    "2I == H": (9, 80, 40, 2, 2),
    "K = E": (3, 24, 17, 3, 3),
    "K = 1": (20, 16, 24, 2, 1),
    "one token": (1, 18, 9, 3, 2),
    "one expert": (18, 24, 16, 1, 1),
    "idle experts": (2, 16, 8, 9, 2),
    "one of everything": (1, 1, 1, 1, 1),
    "several row blocks": (20, 32, 16, 2, 2),
    "several column blocks": (4, 40, 36, 2, 1),
}
assert set(SMALL_SHAPES) == set(SHAPES)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small tiles, so that a small call has many; by descriptors where a GPU that has them would take them."""

    def tile(kernel, device, dtype, rows, experts):
        return SMALL._replace(descriptors=dtype == torch.bfloat16 and kernel != "weight_gradient")

    monkeypatch.setattr(tuning, "tile", tile)
    monkeypatch.setattr(backend_module, "COMBINED_COLUMNS", 32)
    monkeypatch.setattr(backend_module, "SUMMED_ROWS", 8)
    monkeypatch.setattr(backend_module, "CLEARED", (4, 16))
    monkeypatch.setattr(backend_module, "SCHEDULED_TILES", 4)


@pytest.fixture
def backend():
    return "triton"


class TestMoeExpertsTriton(MoeExpertsKernel):
    """The interpreter is slow: small sizes, and half of the larger products.

    What the layer above the kernels of all backends does (r1kernels/op.py: gradients, dtypes, strides, what is saved, shapes under
    torch.compile) is asked of the backends of the CPU; and the interpreter, one program after the other, has the same bits each time.
    """

    shapes = SMALL_SHAPES
    tokens = 4
    draws = 3
    long = (40, 72)

    test_repeated_runs_agree_bit_for_bit = None
    test_what_is_saved_for_the_backward = None
    test_no_copy_of_the_weights_is_saved = None
    test_weights_computed_from_other_parameters = None
    test_strides_do_not_matter = None
    test_saving_nothing_and_checkpoints_give_the_same_bits = None
    test_autocast_is_that_of_linear = None
    test_routing_weights_of_another_dtype = None
    test_compiled = None
    test_lora_that_adds_nothing_moves_no_bit = None
    test_what_lora_saves_for_the_backward = None
    test_lora_under_a_checkpoint_and_with_nothing_saved_gives_the_same_bits = None
    test_lora_compiled = None
    test_a_second_derivative_is_refused = None
    test_grouped_gemm_compiled_and_derived_once = None

    @pytest.mark.parametrize(
        ("shape", "dtype"), [(shape, DTYPES[place % 3]) for place, shape in enumerate(SHAPES)], ids=str
    )
    def test_values_and_gradients_are_as_exact_as_eager(self, backend, shape, dtype):
        super().test_values_and_gradients_are_as_exact_as_eager(backend, shape, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32], ids=str)
    def test_clamped_and_shifted_gates(self, backend, dtype):
        super().test_clamped_and_shifted_gates(backend, dtype)

    @pytest.mark.parametrize(("dtype", "all_rows", "save"), [
        (torch.float32, False, "nothing"), (torch.bfloat16, True, "hidden"), (torch.float16, False, "hidden"),
    ], ids=str)  # fmt: skip
    def test_sentinels_of_expert_parallelism(self, backend, all_rows, dtype, save):
        super().test_sentinels_of_expert_parallelism(backend, all_rows, dtype, save)

    @pytest.mark.parametrize(
        ("live", "save"), [(1, "nothing"), (2, "nothing"), (4, "nothing"), (8, "nothing")]
    )
    def test_frozen_arguments(self, backend, live, save):
        super().test_frozen_arguments(backend, live, save)

    @pytest.mark.parametrize(("shape", "dtype"), [
        ("2I == H", torch.bfloat16), ("several column blocks", torch.float16), ("several row blocks", torch.float32),
    ], ids=str)  # fmt: skip
    def test_lora_is_as_exact_as_eager(self, backend, shape, dtype):
        super().test_lora_is_as_exact_as_eager(backend, shape, dtype)

    @pytest.mark.parametrize(("live", "save"), [((1, 7), "nothing")], ids=str)
    def test_lora_of_frozen_arguments(self, backend, live, save):
        super().test_lora_of_frozen_arguments(backend, live, save)

    @pytest.mark.parametrize("save", ["nothing"])
    def test_lora_of_sentinels_and_idle_experts(self, backend, save):
        super().test_lora_of_sentinels_and_idle_experts(backend, save)

    @pytest.mark.parametrize("pair", ["down"])
    def test_lora_of_one_of_the_two(self, backend, pair):
        super().test_lora_of_one_of_the_two(backend, pair)

    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_grouped_gemm_of_transposed_weights(self, backend, dtype):
        super().test_grouped_gemm_of_transposed_weights(backend, dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_long_sums(self, backend, dtype):
        super().test_long_sums(backend, dtype)

    @pytest.mark.parametrize("indices", ["duplicates"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_uneven_choices(self, backend, indices, dtype):
        super().test_uneven_choices(backend, indices, dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
    def test_nothing_leaks_between_rows_and_experts(self, backend, dtype):
        super().test_nothing_leaks_between_rows_and_experts(backend, dtype)

    @pytest.mark.parametrize(
        ("counts", "dtype"),
        [
            ([2, 0, 20, 1], torch.bfloat16),
            ([0, 0, 0, 8], torch.float32),
            ([0, 0, 0, 0], torch.float16),
        ],
        ids=str,
    )
    def test_grouped_gemm(self, backend, counts, dtype):
        super().test_grouped_gemm(backend, counts, dtype)


def test_the_tiles_of_a_gpu_give_the_same_numbers(monkeypatch):
    """The entries of sm_90 for few and for many rows, with descriptors."""
    for rows in (1, 1000):
        monkeypatch.setattr(
            tuning,
            "tile",
            lambda kernel, device, dtype, *unused, rows=rows: tuning.choose(kernel, "", (9, 0), dtype, rows),
        )
        case = Case(6, 72, 40, 2, 2, dtype=torch.bfloat16)
        results = case.run(lambda *arguments: moe_experts(*arguments, backend="triton"))
        for _, ours, eager, exact in zip(NAMES, results, case.run(in_eager), case.exact(), strict=True):
            assert_as_exact_as(ours, eager, exact, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "size", "offset"),
    [(torch.bfloat16, 40, 0), (torch.bfloat16, 40, 1), (torch.float16, 37, 1)],
    ids=str,
)
def test_nothing_outside_the_arguments_is_read_or_written(monkeypatch, dtype, size, offset):
    """Arguments between NaN, at aligned addresses and at odd ones, give the bits of plain arguments."""
    case = LoraCase(3, size, 24, 2, 2, ranks=(16, 3), dtype=dtype)
    hidden, indices, weights, gate_up, down = (argument.detach() for argument in case.arguments())
    plain = (hidden, indices, weights.float(), gate_up, down, *(matrix.detach() for matrix in case.matrices))
    zones = Redzones()
    placed = tuple(zones.input(argument, offset=offset) for argument in plain)
    grad = zones.input(case.grad, offset=offset)
    make = torch.Tensor.new_empty

    def between_canaries(self, *shape, dtype=None, **options):
        """Results and scratch too; the interpreter itself makes tensors of no element."""
        sizes = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        if options or not torch.Size(sizes).numel():
            return make(self, *shape, dtype=dtype, **options)
        return zones.output(*sizes, dtype=dtype or self.dtype)

    results = []
    for given, upstream in ((plain, case.grad), (placed, grad)):
        arguments, lora = given[:5], (*given[5:], case.scale)
        out, *order = ops.moe_experts_triton(*arguments, *SILU, True, *lora)
        hidden, _, *others = arguments
        *grads, of_lora = ops.moe_experts_triton_backward(
            upstream, hidden, *others, *order, *SILU, *(True,) * 8, *lora
        )
        results.append((out, *order, *grads, *of_lora))
        monkeypatch.setattr(torch.Tensor, "new_empty", between_canaries)
    zones.check()
    for first, second in zip(*results, strict=True):
        assert same_bits(first, second)


def test_indices_and_offsets_that_nobody_checked(monkeypatch):
    """Values of a device are not read: such an index counts as a sentinel, and every row is written."""
    case = Case(5, 16, 8, 3, 2, dtype=torch.float32)
    arguments = [argument.detach() for argument in case.arguments()]
    wild = arguments[1].clone()
    wild[0], wild[3, 1] = torch.tensor([-7, 10**12]), 4
    sentinels = torch.where((wild < 0) | (wild >= 3), 3, wild)
    outs = [
        ops.moe_experts_triton(arguments[0], index, *arguments[2:], *SILU, True, *NO_LORA)[0]
        for index in (wild, sentinels)
    ]
    assert same_bits(*outs) and (outs[0][0] == 0).all()
    zones = Redzones()
    make = torch.Tensor.new_empty

    def between_canaries(self, *shape, **options):
        return (
            zones.output(*shape, dtype=self.dtype)
            if shape[0] and not options
            else make(self, *shape, **options)
        )

    monkeypatch.setattr(torch.Tensor, "new_empty", between_canaries)
    assert_every_row_is_written(
        lambda *arguments: run_on("triton", GROUPED_GEMM, GemmCall(*arguments, False, False))
    )
    zones.check()


def test_what_is_saved_for_sentinels_is_written(monkeypatch):
    case = Case(5, 16, 8, 3, 2, dtype=torch.bfloat16)
    hidden, indices, weights, gate_up, down = (argument.detach() for argument in case.arguments())
    indices[1:] = 3
    zones = Redzones()
    make = torch.Tensor.new_empty

    def full_of_nan(self, *shape, **options):
        return (
            zones.output(*shape, dtype=self.dtype)
            if shape[0] and not options
            else make(self, *shape, **options)
        )

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    _, kept, *_ = ops.moe_experts_triton(
        hidden, indices, weights.float(), gate_up, down, *SILU, True, *NO_LORA
    )
    assert kept.shape == (10, 16) and kept[:2].isfinite().all() and (kept[2:] == 0).all()


@pytest.mark.parametrize("keep", [True])
def test_the_ops_keep_their_schemas(keep):
    case = LoraCase(4, 16, 8, 3, 2, dtype=torch.float32)
    hidden, indices, weights, gate_up, down = (argument.detach() for argument in case.arguments())
    lora = (*(matrix.detach() for matrix in case.matrices), case.scale)
    arguments = (hidden, indices, weights, gate_up, down, *SILU, keep, *lora)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.moe_experts_triton.default, arguments, test_utils=checks)
    _, *saved = ops.moe_experts_triton(*arguments)
    backward = (case.grad, hidden, weights, gate_up, down, *saved, *SILU, *(True, keep) * 4, *lora)
    torch.library.opcheck(ops.moe_experts_triton_backward.default, backward, test_utils=checks)
    x, offsets = torch.randn(9, 16), torch.tensor([0, 4, 4, 8], dtype=torch.int32)
    torch.library.opcheck(
        ops.grouped_gemm_triton.default, (x, gate_up, offsets, False, False), test_utils=checks
    )
    call = (torch.randn(9, 16), x, gate_up, offsets, False, keep, True)
    torch.library.opcheck(ops.grouped_gemm_triton_backward.default, call, test_utils=checks)
