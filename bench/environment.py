"""What the numbers were measured on: the device, the versions, the threads; no name of a host, no path."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import r1kernels
from r1kernels import extension

from .ops.peers import version

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Facts about the machine and what runs on it, for one kind of device."""
    found: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "r1kernels": r1kernels.__version__,
        "commit": commit(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    found["extension"] = extension.missing() or f"built, runs {extension.chosen_isa()}"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["capability"] = f"sm_{properties.major}{properties.minor}"
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The commit of this checkout, with a mark where files differ from it; "unknown" outside of a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short=10", "HEAD") + (" and changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
