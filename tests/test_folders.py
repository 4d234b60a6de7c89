"""Folders of runs: errors that name the flag, and that one run at a time holds a folder."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from synpo.cli import main
from synpo.folders import LOCK, FolderInUse, make_folder, own_folder

HOLDER = """
import os, sys, time
from synpo.folders import own_folder
with own_folder(sys.argv[1], "--work"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # when it has let go of what it was born with
    time.sleep(60)
"""


def test_a_folder_that_cannot_be_had_is_named_with_its_flag(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", "--output")
    make_folder(tmp_path / "a" / "b", "--output")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"--output: {path} cannot be made a folder: .*; name another"):
            make_folder(path, "--output")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PermissionError, match="--output: nothing may be written to"):
        make_folder(tmp_path / "locked", "--output")


def test_a_folder_is_one_run_s_until_the_end_of_its_block(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "work"
    with own_folder(folder, "--work"), own_folder(tmp_path / "a", "--output"):
        said = rf"--work: {folder} is in use by process {os.getpid()} on .*Wait until .* or name another folder"
        with pytest.raises(FolderInUse, match=said), own_folder(folder, "--work"):
            raise AssertionError("unreachable")
    assert not folder.exists(), "nothing was written, and it was not there before"
    (tmp_path / "kept").mkdir()
    with pytest.raises(KeyError), own_folder(tmp_path / "kept" / "b" / "c", "--output"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and not any((tmp_path / "kept").iterdir())
    with pytest.raises(KeyError), own_folder(folder, "--work"):
        (folder / "clips.jsonl").touch()
        raise KeyError
    with own_folder(folder, "--work"):
        pass
    assert [path.name for path in folder.iterdir()] == ["clips.jsonl"]


def test_a_killed_run_holds_nothing_though_its_worker_lives(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            with (
                pytest.raises(FolderInUse, match=f"in use by process {process.pid} on"),
                own_folder(tmp_path, "--work"),
            ):
                raise AssertionError("unreachable")
            process.kill()
            process.wait()
            os.kill(worker, 0)
            assert (tmp_path / LOCK).exists()
            with own_folder(tmp_path, "--work"):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)
    assert not any(tmp_path.iterdir())


def test_a_lock_file_that_its_run_removes_meanwhile_locks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends, and removes its lock file, after the next one opened it: a third would make the file anew."""
    real, removed = fcntl.flock, []

    def flock(file: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with own_folder(tmp_path, "--work"):
        assert removed and (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on")
        with pytest.raises(FolderInUse), own_folder(tmp_path, "--work"):
            raise AssertionError("unreachable")


def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with own_folder(tmp_path / "work", "--work"):
        pass
    assert f"warning: {tmp_path / 'work'} cannot be locked (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pairs", "train", "eval", "demo"])
def test_every_command_that_writes_a_folder_holds_it(
    command: str, tiny_captioner_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "output"
    pairs.write_text(json.dumps({"prompt": "Say", "chosen": "Yes.", "rejected": "No."}) + "\n")
    model = ["--model", str(tiny_captioner_path), "--device", "cpu"]
    videos = ["--videos", str(tmp_path / "videos")]
    arguments = {
        "pairs": [*model, *videos, "--pairs", str(tmp_path / "new.jsonl"), "--work", str(output)],
        "train": [*model, "--pairs", str(pairs), "--output", str(output)],
        "eval": [*model, *videos, "--output", str(output)],
        "demo": ["--output", str(output)],
    }[command]
    with own_folder(output, "--output"):
        assert main([command, *arguments]) == 2
    assert f"{output} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not output.exists()
