"""The package as it is built and installed: metadata, source archive, build decisions, Makefile. No network, no compiling."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKERS = {"tensorboard", "wandb", "trackio"}
EXTRAS = {"train", "pipeline", "judge", "eval", "all", "flash", "liger", "vllm", "qlora", "bench", "dev"} | TRACKERS


@pytest.fixture(scope="module")
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("synpo")
    except metadata.PackageNotFoundError:
        pytest.skip("synpo is not installed in this environment: make setup, or pip install -e .")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names setup.py defines; asking it for the project's name runs it without building anything."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--quiet", "--name"])
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_metadata(installed: metadata.Distribution) -> None:
    import synpo

    assert installed.version == synpo.__version__
    assert set(installed.metadata.get_all("Provides-Extra") or []) == EXTRAS
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    assert installed.metadata["Requires-Python"] == ">=3.10"
    [script] = [e for e in installed.entry_points if e.group == "console_scripts"]
    assert (script.name, script.value) == ("synpo", "synpo.cli:main")
    base = [r for r in installed.requires or [] if "extra ==" not in r]
    assert [r.split("<")[0].split(">")[0] for r in base] == ["torch"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy, so that nothing is written into the real one."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "results")
    for folder in ("csrc", "synpo_kernels", "python", "tests", "bench", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ROOT.glob("*"):
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def test_source_distribution_is_complete(checkout: Path, tmp_path: Path) -> None:
    """Everything a build from source needs is in the archive."""
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    sources += [p for folder in ("synpo_kernels", "python/synpo") for p in (ROOT / folder).rglob("*.py")]
    missing = {str(p.relative_to(ROOT)) for p in sources} - names
    assert not missing
    assert {"setup.py", "pyproject.toml", "LICENSE", "Makefile"} <= names
    assert not [name for name in names if name.endswith(".so")]


HIDDEN = "import runpy, sys; sys.modules['pybind11'] = None; sys.argv[0] = 'setup.py'; "
HIDDEN += "runpy.run_path('setup.py', run_name='__main__')"
HEADERS = "import sysconfig; real = sysconfig.get_path; "
HEADERS += "sysconfig.get_path = lambda name, *a, **k: '/nowhere' if name == 'include' else real(name, *a, **k); "
BUILD = ["--quiet", "build_ext", "--inplace"]


@pytest.mark.parametrize(
    ("compiler", "program", "reason", "without"),
    [
        ("no-such-compiler", ["setup.py"], "there is no C++ compiler (no-such-compiler)", True),
        ("false", ["setup.py"], "false'", False),  # as setuptools words it
        ("true", ["-c", HIDDEN], 'pip install "setuptools>=77" wheel "pybind11>=2.13"', False),
        ("true", ["-c", HEADERS + HIDDEN], "Python's headers are missing; install them", False),
    ],
    ids=["no compiler", "a compiler that fails", "no pybind11", "no headers"],
)
def test_no_extension_is_an_error_unless_there_is_no_compiler(
    compiler: str, program: list[str], reason: str, without: bool, checkout: Path
) -> None:
    """pip shows errors; warnings it shows from release 26 on. An earlier build, of other sources, is not left to be loaded."""
    stale = checkout / "synpo_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    other = checkout / "synpo_kernels" / "_C.cpython-399-x86_64-linux-gnu.so"

    def build(required: str) -> subprocess.CompletedProcess[str]:
        stale.touch()
        other.touch()
        environment = os.environ | {"CXX": compiler, "SYNPO_REQUIRE_EXT": required}
        command = [sys.executable, *program, *BUILD]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)

    for required in ("", "0", "1"):
        done = build(required)
        said = " ".join(done.stderr.split())
        assert reason in said
        if required == "0" or (without and required == ""):
            assert done.returncode == 0 and said.count("the C++ extension was not built: ") == 1
            assert other.exists() and not stale.exists()
        else:
            assert done.returncode != 0 and "set SYNPO_REQUIRE_EXT=0 in the environment" in said
    done = build("yes")
    assert done.returncode != 0 and "SYNPO_REQUIRE_EXT='yes'; expected 0 or 1" in done.stderr


def test_torch_is_found_where_build_isolation_hides_it(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    folder, version = build["find_torch"]()
    assert folder == Path(torch.__file__).parent and version == torch.__version__


def test_the_binary_says_what_it_was_built_from(build: dict[str, Any]) -> None:
    from synpo_kernels import _ext

    assert build["fingerprint"]() == _ext._fingerprint()


def test_ci_runs_the_tests_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)

    def test_help_lists_every_target(self) -> None:
        shown = self.make("help").stdout
        assert all(f"make {target} " in shown for target in ("demo", "test", "lint", "bench", "clean", "help"))

    def test_an_old_python_is_named(self, tmp_path: Path) -> None:
        python = tmp_path / "python3"
        python.write_text('#!/bin/sh\ntest "$1" = --version && { echo Python 3.9.18; exit; }\nexit 1\n')
        python.chmod(0o755)
        done = self.make("setup", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert (
            "Python 3.10 or newer" in done.stderr and "Python 3.9.18" in done.stderr and "make PYTHON=" in done.stderr
        )
