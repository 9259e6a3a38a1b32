"""Every public op by the table of ops: it has a reference, torch ops that keep their schemas, a page, a sample call and a case."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import r1kernels
from bench.ops.cases import CASES
from r1kernels import backends, examples, extension
from tests.support.numerics import same_bits
from tests.support.sample_calls import differentiable_call, first

DOCS = "\n".join(page.read_text() for page in Path(__file__).parents[1].joinpath("docs").glob("*.md"))
EVERY = sorted(examples.calls("cpu"))
# two sets, and tokens that keep everything
KEPT = (
    torch.tensor([3, 0, 9, 5]),
    torch.tensor([0, 2, 2, 4, 4, 4, 4]),
)
checked = set()
KERNELS = [op for op in EVERY if "cpu" in backends.registered(op)]


class Recorder(TorchDispatchMode):
    """The torch ops of the package that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "r1kernels":
            self.calls.append((func, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args)))
        return func(*args, **(kwargs or {}))


def test_the_table_holds_every_public_op():
    assert set(EVERY) == set(backends.ops())
    assert all(callable(getattr(r1kernels, op, None)) and op in r1kernels.__all__ for op in EVERY)


@pytest.mark.parametrize("op", EVERY)
def test_an_op_has_a_reference_an_explanation_and_a_page(op):
    assert backends.registered(op)[-1] == "reference"
    args, kwargs = examples.calls("cpu")[op]
    text = r1kernels.explain(getattr(r1kernels, op), *args, **kwargs)
    assert all(f"  {backend}" in text for backend in backends.registered(op))
    assert f"`{op}" in DOCS, "docs/ says nothing of it"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("op", EVERY)
def test_torchs_default_dtype_changes_nothing(op, backend):
    function, leaves = differentiable_call(op)

    def run():
        with r1kernels.use_backend(backend):
            results = function(*leaves)
        found = [
            x for x in (results if isinstance(results, tuple) else (results,)) if isinstance(x, torch.Tensor)
        ]
        wanted = [x for x in found if x.requires_grad]
        return [*found, *torch.autograd.grad([x.sum() for x in wanted], leaves)] if wanted else found

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


def check_named(change, expected):
    """Each tensor argument of each op, changed, is named."""
    for op in EVERY:
        function = getattr(r1kernels, op)
        args, kwargs = examples.calls("cpu")[op]
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        for name, value in given.items():
            changed = change(value) if isinstance(value, torch.Tensor) else None
            if changed is not None:
                with pytest.raises(TypeError, match=rf"^{name}: expected {expected}"):
                    function(**given | {name: changed})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.to_sparse(), "a dense tensor, got one of layout torch.sparse_coo"),
        (lambda x: x.to_sparse_csr() if x.ndim == 2 else None, "a dense tensor, got one of layout"),
        (lambda x: x.to_mkldnn() if x.dtype == torch.float32 else None, "a dense tensor, got one of layout"),
        (lambda x: torch.nested.nested_tensor(list(x)), "a dense tensor, got a nested one"),
        (
            lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.ndim > 1 else None,
            "a dense tensor, got a nested one",
        ),
        (lambda x: torch.masked.masked_tensor(x, x == x), "a plain tensor, got a MaskedTensor: get_data"),
        (lambda x: x.tolist(), "a torch.Tensor, got list"),
        (lambda x: x.numpy(), "a torch.Tensor, got ndarray"),
    ],
    ids=["sparse", "csr", "mkldnn", "nested", "jagged", "masked", "list", "numpy"],
)
def test_an_argument_that_is_no_dense_tensor_is_named(change, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of its prototypes
        check_named(change, expected)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_a_sharded_argument_is_named(mesh):
    check_named(
        lambda x: distribute_tensor(x, mesh, [Replicate()]), "a plain tensor, got a DTensor: full_tensor"
    )


@pytest.mark.parametrize("op", KERNELS)
def test_a_kernel_that_is_differentiated_races_others(op):
    """What has no gradient, and what is plain PyTorch, is in ``python -m bench overhead`` alone."""
    function, leaves = differentiable_call(op)
    if leaves and first(function(*leaves)).requires_grad:
        assert op in {case.op for case in CASES}


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize("save_logits", [False, True])
def test_the_torch_ops_of_several_targets_a_token_keep_their_schemas_and_shapes(save_logits):
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    targets = torch.tensor([[3, 0], [9, 9], [5, -100], [-100, -100], [1, 2], [15, 4]]).view(2, 3, 2)
    with Recorder() as recorder:
        one = r1kernels.linear_logprobs(hidden, weight, targets, save_logits=save_logits)
        other, entropy = r1kernels.token_logprobs(hidden @ weight.T, targets, return_entropy=True)
        (one.sum() + other.sum() + entropy.sum()).backward()
    assert {"columns", "linear_columns"} <= {
        op.name().split("::")[1].split("_cpu")[0] for op, _ in recorder.calls
    }
    keep_their_schemas(recorder)


def form(argument):
    """What shapes of results may follow from, besides sizes."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.ndim, argument.numel() == 0, argument.is_contiguous()
    return argument if argument is None or isinstance(argument, bool) else type(argument)


def keep_their_schemas(recorder):
    """Calls of one form, as several public ops make them, are checked once."""
    assert recorder.calls
    for function, arguments in recorder.calls:
        call = function, *map(form, arguments)
        if call in checked:
            continue
        checked.add(call)
        torch.library.opcheck(
            function, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        )


@pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
@pytest.mark.parametrize(
    ("op", "options"),
    [(op, {}) for op in KERNELS] + [(op, {"kept": KEPT}) for op in KERNELS if op.endswith("_logprobs")],
)
def test_the_torch_ops_of_a_call_keep_their_schemas_and_shapes(op, options):
    function, leaves = differentiable_call(op, **options)
    with Recorder() as recorder:
        result = first(function(*leaves))
        if result.requires_grad:
            result.sum().backward()
    keep_their_schemas(recorder)
