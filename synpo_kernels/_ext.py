"""The C++ extension `_C`, and the reason in words when it is not there.

Loading `_C` registers the tensor ops `torch.ops.synpo_kernels.*`. Its absence never breaks an import: `contrast.py` and
`backends/choice.py` then take the torch path and say so once.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shlex
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # before _C, which resolves its symbols in the libraries torch loads

logger = logging.getLogger("synpo_kernels")

ROOT = Path(__file__).resolve().parent.parent  # the checkout, where this was not copied out of it


def _fingerprint() -> str | None:
    """Of the sources beside this package, as setup.py takes it; None where there are none."""
    digest, found = hashlib.sha256(), sorted(p for kind in ("*.cpp", "*.h") for p in (ROOT / "csrc").glob(kind))
    for path in found:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16] if found else None


def _way_out() -> str:
    """What builds the extension, to be copied into a shell."""
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    lacking = "" if shutil.which(compiler) else f"there is no C++ compiler ({compiler}): install g++, then "
    here = f"-e {shlex.quote(str(ROOT))}" if (ROOT / "setup.py").is_file() else "FOLDER_OF_THE_CHECKOUT"
    return f"{lacking}run {shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps {here}"


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why not."""
    try:
        module = importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        return None, f"the C++ extension is not built; {_way_out()}"
    except ImportError as error:
        return None, f"the C++ extension cannot be loaded ({error}); {_way_out()}"
    sources = _fingerprint()
    if sources is not None and getattr(module, "sources", None) != sources:
        return None, f"the C++ extension was built from other sources than those in {ROOT / 'csrc'}; {_way_out()}"
    return module, ""


_C, reason = _load()


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
