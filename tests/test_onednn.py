"""oneDNN is capped where AMX dies, and nowhere else; the processor is asked once."""

import json
import os
from pathlib import Path

import pytest

from synpo import machine, onednn

DIES = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
WORKS = "print(512.0)"


@pytest.fixture
def amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CPU that says it has AMX and has not been tried; the cache it is noted in."""
    monkeypatch.setenv(onednn.VARIABLE, "")  # so that it is taken back in the end
    monkeypatch.delenv(onednn.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "instruction_sets", lambda: ["avx2", "amx_tile"])
    monkeypatch.setattr(onednn, "_tried", None)
    return tmp_path / "synpo" / "amx.json"


@pytest.mark.parametrize(("product", "capped"), [(DIES, True), (WORKS, False), ("print(3.0)", True)])
def test_capped_only_where_the_product_dies(
    product: str, capped: bool, amx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "PRODUCT", product)
    onednn.settle()
    assert os.environ.get(onednn.VARIABLE) == (onednn.CAP if capped else None)
    assert ("dies" in onednn.described()) == capped == (not onednn.described().startswith("works"))
    assert list(json.loads(amx.read_text()).values()) == [not capped]
    monkeypatch.delenv(onednn.VARIABLE, raising=False)
    monkeypatch.setattr(onednn, "PRODUCT", WORKS if capped else DIES)
    onednn.settle()
    assert (onednn.VARIABLE in os.environ) == capped, "the answer on the disk counts"


def test_another_processor_or_torch_is_tried_again(amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "PRODUCT", WORKS)
    onednn.settle()
    monkeypatch.setattr(onednn, "PRODUCT", DIES)
    monkeypatch.setattr(machine, "cpu_name", lambda: "another")
    onednn.settle()
    assert os.environ[onednn.VARIABLE] == onednn.CAP
    assert sorted(json.loads(amx.read_text()).values()) == [False, True]


def test_what_was_set_counts_and_nothing_is_tried(amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "PRODUCT", DIES)
    monkeypatch.setenv(onednn.VARIABLE, "AVX2")
    onednn.settle()
    assert os.environ[onednn.VARIABLE] == "AVX2" and not amx.exists()
    assert onednn.described() == "not tried: ONEDNN_MAX_CPU_ISA=AVX2 is set"
    monkeypatch.delenv(onednn.VARIABLE)
    monkeypatch.setattr(machine, "instruction_sets", lambda: ["avx2"])
    onednn.settle()
    assert onednn.VARIABLE not in os.environ and not amx.exists() and onednn.described() == "this CPU has none"


@pytest.mark.parametrize("product", ["import no_such_package", "import time; time.sleep(60)"])
def test_a_trial_that_says_nothing_changes_nothing(product: str, amx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "PRODUCT", product)
    monkeypatch.setattr(onednn, "SECONDS", 1)
    onednn.settle()
    assert onednn.VARIABLE not in os.environ and not amx.exists() and "not tried" in onednn.described()


@pytest.mark.parametrize("content", ["not json", "[1]"])
def test_a_cache_that_cannot_be_used_costs_a_trial(
    content: str, amx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    amx.parent.mkdir()
    amx.write_text(content)
    monkeypatch.setattr(onednn, "PRODUCT", DIES)
    onednn.settle()
    assert os.environ[onednn.VARIABLE] == onednn.CAP
    monkeypatch.delenv(onednn.VARIABLE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    onednn.settle()
    assert os.environ[onednn.VARIABLE] == onednn.CAP


def test_the_product_itself_comes_out_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert onednn._try() is True
