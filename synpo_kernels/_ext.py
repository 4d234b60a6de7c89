"""The C++ extension `_C`, and the reason in words when it is not there.

Loading `_C` registers the tensor ops `torch.ops.synpo_kernels.*`. Its absence never breaks an import: `contrast.py` and
`backends/choice.py` then take the torch path and say so once.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch  # before _C, which resolves its symbols in the libraries torch loads

logger = logging.getLogger("synpo_kernels")

_C: ModuleType | None = None
reason = ""
try:
    _C = importlib.import_module("._C", __package__)
except ModuleNotFoundError:
    reason = (
        "the C++ extension is not built (pip install --no-build-isolation -e . builds it where there is a C++ compiler)"
    )
except ImportError as error:
    reason = f"the C++ extension cannot be loaded ({error})"


def available() -> bool:
    """Whether the extension is loaded; `reason` says why not."""
    return _C is not None


def module() -> ModuleType:
    """The extension; RuntimeError where it is not loaded."""
    if _C is None:
        raise RuntimeError(reason)
    return _C


def multiplies() -> bool:
    """Whether the extension multiplies matrices faster than plain torch does after widening them: with vector instructions."""
    return available() and module().isa() != "portable"


def outdoes_library(dtype: torch.dtype) -> bool:
    """Whether the extension's pass over `dtype` is faster than one on torch's own products.

    It is with vector instructions, but for fp32 on CPUs of Intel's, whose own library torch calls there: 867 against 806 ms
    on a Xeon, 1257 against 1518 on an AMD Epyc (1024 x 32000 x 2048, forward and backward, two cores).
    """
    return multiplies() and not (dtype == torch.float32 and module().on_intel())


def build_info() -> dict[str, str]:
    """Version, compile flags, torch the extension was built beside, and `isa`, the instruction set in use on this CPU.

    Raises RuntimeError where the extension is not loaded.
    """
    return dict(module().build_info())


@cache
def say_once() -> None:
    """Log, the first time only, that the torch path does the work of the missing extension."""
    logger.warning("%s; the torch path is used: same results, slower", reason)


def describe() -> str:
    """One line for people: what was loaded, or why nothing was."""
    if not available():
        return f"synpo: {reason}"
    return "synpo: C++ extension " + ", ".join(f"{key} {value}" for key, value in build_info().items())
