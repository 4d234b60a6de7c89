"""No kernel reads or writes outside its tensors, masked lanes and ignored labels included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from guarded import guarded

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not sys.platform.startswith("linux"),
    reason="memory is guarded for the interpreter under Linux; compute-sanitizer does it on a GPU (bench.sanitize)",
)


def test_every_path_stays_inside_its_tensors() -> None:
    """Before the label of a row that was ignored was left alone, the exact kernel read a hundred rows before W."""
    path = os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "guarded"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"in {done.stdout.splitlines()[-1:]}: {done.stderr[-2000:]}"


def test_the_guards_are_there() -> None:
    tensor = torch.arange(10.0)
    for at_end in (False, True):
        assert torch.equal(guarded(tensor, at_end=at_end), tensor)
    code = (
        "import ctypes, torch; from guarded import guarded; t = guarded(torch.arange(12.0), at_end=True); "
        "print(ctypes.c_float.from_address(t.data_ptr() + 44).value, flush=True); "
        "ctypes.c_float.from_address(t.data_ptr() + 48).value"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "support")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "11.0\n" and done.returncode < 0
