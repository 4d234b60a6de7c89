"""The C++ extension: what it says about itself, and that nothing breaks where it is missing."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from synpo_kernels import _ext
from synpo_kernels.contrast import contrastive_sample

needs_extension = pytest.mark.skipif(not _ext.available(), reason=f"C++ extension: {_ext.reason}")

WITHOUT_EXTENSION = """
import sys
sys.modules["synpo_kernels._C"] = None  # makes `from . import _C` an ImportError
import logging
logging.basicConfig(format="%(message)s", stream=sys.stdout)
import torch
import synpo_kernels
from synpo_kernels import _ext
assert not _ext.available() and _ext.reason, _ext.reason
for _ in range(2):
    tokens, logps = synpo_kernels.contrastive_sample(torch.tensor([[0.0, 1.0]]), None, temperature=0.0)
assert tokens.tolist() == [1]
"""


@needs_extension
def test_build_info_says_what_was_built() -> None:
    import synpo

    info = _ext.build_info()
    assert info["version"] == synpo.__version__
    assert info["isa"] in _ext.module().isas()
    assert "-ffp-contract=off" in info["flags"]
    assert info["torch"].startswith("2.")
    assert "extension" in _ext.describe()


@needs_extension
def test_instruction_sets_are_checked() -> None:
    from synpo_kernels import _C

    before = _C.isa()
    with pytest.raises(ValueError, match="riscv"):
        _C.use_isa("riscv")
    assert _C.isa() == before
    _C.use_isa("portable")
    assert _ext.build_info()["isa"] == "portable"
    _C.use_isa(before)


@needs_extension
def test_a_binary_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a pull, where nothing was built again: its functions may have other arguments."""
    assert _ext._load()[0] is not None
    monkeypatch.setattr(_ext, "_fingerprint", lambda: "of others")
    module, reason = _ext._load()
    assert module is None and "was built from other sources than those in" in reason and "-m pip install" in reason
    monkeypatch.setattr(_ext, "_fingerprint", lambda: None)  # installed, without sources
    assert _ext._load()[0] is not None


def test_the_way_to_an_extension_can_be_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_ext, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    command = f"run {sys.executable} -m pip install --force-reinstall --no-deps FOLDER_OF_THE_CHECKOUT"
    assert _ext._way_out() == f"there is no C++ compiler (no-such-compiler): install g++, then {command}"
    (tmp_path / "setup.py").touch()
    monkeypatch.setenv("CXX", sys.executable)
    assert _ext._way_out() == command.replace("FOLDER_OF_THE_CHECKOUT", f"-e {tmp_path}")


def test_import_without_the_extension_warns_once() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the torch path is used") == 1


def test_asking_for_a_missing_extension_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_ext, "_C", None)
    monkeypatch.setattr(_ext, "reason", "not built here")
    _ext.say_once.cache_clear()
    logits = torch.tensor([[0.0, 1.0]])
    with pytest.raises(ValueError, match="not built here"):
        contrastive_sample(logits, None, backend="cpp")
    with pytest.raises(RuntimeError, match="not built here"):
        _ext.build_info()
    assert "not built here" in _ext.describe()
    with caplog.at_level(logging.WARNING, logger="synpo_kernels"):
        for _ in range(2):
            assert contrastive_sample(logits, None, temperature=0.0)[0].tolist() == [1]
    assert len(caplog.records) == 1
    _ext.say_once.cache_clear()
