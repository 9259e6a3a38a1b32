"""Where a stage's results come from: the versions of code and packages that a lineage file records."""

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "r1kernels",
    "peft",
    "bitsandbytes",
    "math-verify",
    "stopwordsiso",
)
_ROOT = Path(__file__).parent.parent


@functools.cache
def code_version() -> str:
    """SHA-256 (16 digits) over the Python sources of training/ and r1kernels/, as they are on the disk."""
    digest = hashlib.sha256()
    for package in ("r1kernels", "training"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def package_versions() -> dict[str, str]:
    """Version of Python and of every package that decides a result; "absent" where one is not installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions
