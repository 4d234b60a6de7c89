"""bench/gpu.sh keeps its books: every part of a phase is recorded whatever becomes of it, and the exit code tells."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
LOSS = ["facts", "build", "doctor", "aot", "tests", "kernels", "memcheck", "racecheck", "tune", "loss"]
PIPELINE = ["facts", "contrast", "step", "decode"]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")


def started(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), str(out), *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def parts(out: Path) -> dict[str, str]:
    return {part["name"]: part["exit"] for part in json.loads((out / "status.json").read_text())["parts"]}


@pytest.mark.parametrize(("options", "names"), [(["--cpu"], LOSS), (["--pipeline", "--cpu"], PIPELINE)])
def test_what_is_not_asked_for_is_recorded_as_skipped(tmp_path: Path, options: list[str], names: list[str]) -> None:
    done = started(tmp_path, *options, PARTS="none", GPU_BUDGET="60")
    assert done.returncode == 0, done.stdout + done.stderr
    found = parts(tmp_path)
    assert set(names) <= set(found) and set(found.values()) == {"skipped"}
    assert "not among PARTS" in (tmp_path / "logs.txt").read_text()


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "asked for $*"\ncase "$*" in *bench.step*) exit 7 ;; *contrast*) kill -9 $$ ;; esac\n'
    )
    python.chmod(0o755)
    done = started(
        tmp_path / "out", "--cpu", "--pipeline", PYTHON=str(python), CAPTIONER=str(tmp_path), PARTS="", GPU_BUDGET="60"
    )
    assert done.returncode == 1
    assert parts(tmp_path / "out") == {"facts": "0", "contrast": "137", "step": "7", "decode": "0"}
    assert "failed: contrast step" in done.stdout
    assert f"--model {tmp_path}" in (tmp_path / "out" / "logs.txt").read_text()


def test_time_that_is_spent(tmp_path: Path) -> None:
    done = started(tmp_path, "--pipeline", "--cpu", GPU_BUDGET="0")
    assert set(parts(tmp_path).values()) == {"skipped"}
    assert "the budget of 0 s was spent" in done.stdout


def test_options_it_does_not_know(tmp_path: Path) -> None:
    done = started(tmp_path / "out", "--everything")
    assert done.returncode == 2 and "usage: bench/gpu.sh OUTDIR" in done.stderr
    assert not (tmp_path / "out").exists()
