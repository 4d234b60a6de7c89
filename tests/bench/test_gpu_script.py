"""bench/gpu.sh keeps its books: every part of a call is recorded whatever becomes of it, and the exit code tells."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
CALLS = {
    "loss": {"facts", "build", "smoke", "loss", "kernels"},
    "tests": {"facts", "build", "doctor", "tests"},
    "pipeline": {"facts", "build", "step", "contrast", "decode"},
    "peers": {"facts", "build", "peers", "sweep"},
    "checks": {"facts", "build", "tune", "aot", "kernels", "memcheck", "racecheck"},
}

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


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_asked_for_is_recorded_as_skipped(tmp_path: Path, call: str) -> None:
    done = started(tmp_path, call, "--cpu", PARTS="none", GPU_BUDGET="60")
    assert done.returncode == 0, done.stdout + done.stderr
    found = parts(tmp_path / call)
    assert set(found) == CALLS[call] and set(found.values()) == {"skipped"}
    assert "not among PARTS" in (tmp_path / call / "logs.txt").read_text()


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "asked for $*"\ncase "$*" in *bench.step*) exit 7 ;; *contrast*) kill -9 $$ ;; esac\n'
    )
    python.chmod(0o755)
    done = started(
        tmp_path / "out", "pipeline", "--cpu", PYTHON=str(python), CAPTIONER=str(tmp_path), PARTS="", GPU_BUDGET="60"
    )
    assert done.returncode == 1
    out = tmp_path / "out" / "pipeline"
    assert parts(out) == {"facts": "0", "build": "skipped", "step": "7", "contrast": "137", "decode": "0"}
    assert "failed: step contrast" in done.stdout
    assert f"--model {tmp_path}" in (out / "logs.txt").read_text()


def test_the_loss_is_measured_without_a_peer_that_brought_it_down(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "asked for $*"\ncase "$*" in *--providers*) ;; *bench.loss*) exit 3 ;; esac\n')
    python.chmod(0o755)
    done = started(tmp_path / "out", "peers", "--cpu", PYTHON=str(python), PARTS="", GPU_BUDGET="100")
    found = parts(tmp_path / "out" / "peers")
    assert done.returncode == 1 and found["peers"] == "3" and found["ours"] == found["sweep"] == "0"


def test_time_that_is_spent(tmp_path: Path) -> None:
    done = started(tmp_path, "pipeline", "--cpu", GPU_BUDGET="0")
    assert set(parts(tmp_path / "pipeline").values()) == {"skipped"}
    assert "the budget of 0 s was spent" in done.stdout


@pytest.mark.parametrize("options", [[], ["everything"], ["loss", "--gpu"]])
def test_options_it_does_not_know(tmp_path: Path, options: list[str]) -> None:
    done = started(tmp_path / "out", *options)
    assert done.returncode == 2 and "usage: bench/gpu.sh OUTDIR loss|tests" in done.stderr
    assert not (tmp_path / "out").exists()
