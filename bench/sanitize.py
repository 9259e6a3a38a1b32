"""Every op once, forward and backward, at a small shape: what compute-sanitizer watches.

compute-sanitizer --tool memcheck python -m bench.sanitize
"""

from __future__ import annotations

import argparse

import torch

import r1kernels
from r1kernels import backends, examples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    for dtype in (torch.float32, torch.bfloat16):
        for op, (args, kwargs) in examples.calls(device, dtype).items():
            for backend in backends.registered(op):
                with r1kernels.use_backend(backend, op):
                    _both_ways(op, args, kwargs)
            print(f"{op} {dtype}: {', '.join(backends.registered(op))}", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


def _both_ways(op: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """One call, and its backward from the sum of every result that has one."""
    leaves = [
        value.detach().clone().requires_grad_()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and op != "update_router_bias"
        else value
        for value in args
    ]
    found = getattr(r1kernels, op)(*leaves, **kwargs)
    parts = found if isinstance(found, tuple) else (found,)
    results = [part for part in parts if isinstance(part, torch.Tensor) and part.requires_grad]
    if results:
        torch.stack([result.sum().float() for result in results]).sum().backward()


if __name__ == "__main__":
    main()
