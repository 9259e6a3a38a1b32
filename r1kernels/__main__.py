"""``python -m r1kernels``: versions, what is built, what this machine has, and which backend would run each op here."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, backends, examples, extension


def versions() -> list[str]:
    """Versions of r1kernels, Python and what the kernels are built on."""
    lines = [f"r1kernels {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    lines.append(f"torch {torch.__version__} ({cuda})")
    for package in ("triton", "transformers"):
        lines.append(f"{package} {_installed(package)}")
    return lines


def built() -> list[str]:
    """What the extension holds, or why it is not there."""
    failure = extension.missing()
    if failure:
        return [failure]
    info = extension.build_info()
    lines = [
        f"built with torch {info['torch']}, {info['compiler']}",
        f"CPU kernels: {_list(info['cpu_isas'])}",
    ]
    if info["cuda_architectures"]:
        lines.append(f"CUDA {info['cuda']} kernels for sm_{info['cuda_architectures'].replace(' ', ', sm_')}")
        if {"90", "90a"} & {*extension.cuda_architectures()} == {"90"}:
            lines.append(
                "no wgmma kernels for H100 and H200, which run the portable ones: pip install --no-deps nvidia-cutlass, "
                "and build r1kernels again"
            )
    else:
        lines.append(f"CUDA kernels: {extension.cuda_missing()}")
    return lines


def devices() -> list[str]:
    """The processor with the instruction set chosen on it, and every GPU."""
    threads = f"{torch.get_num_threads()} threads"
    lines = [f"CPU {platform.machine()}, {threads}"]
    if extension.missing() is None:
        lines[0] += f", runs {_chosen_isa()} (features: {', '.join(extension.cpu_features()) or 'none'})"
    if not torch.cuda.is_available():
        return [*lines, "no GPU"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def choices(device: str) -> list[str]:
    """For every op, its backends for a small float32 call on ``device``: which would run, why the others would not."""
    calls = examples.calls(device)
    lines = []
    for op in backends.ops():
        args, kwargs = calls[op]
        lines += backends.explain(op, *args, **kwargs).splitlines()
    return lines


def report() -> str:
    """The whole text."""
    parts = [("versions", versions()), ("extension", built()), ("devices", devices())]
    parts.append(("ops on the CPU, float32", choices("cpu")))
    if torch.cuda.is_available():
        parts.append(("ops on the GPU, float32", choices("cuda")))
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _list(names: str) -> str:
    return ", ".join(names.split())


def _chosen_isa() -> str:
    try:
        return extension.chosen_isa()
    except RuntimeError as error:
        return f"nothing: {error}"


if __name__ == "__main__":
    print(report())
    sys.exit(0)
