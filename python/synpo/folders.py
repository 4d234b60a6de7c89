"""Folders that a run writes to: made where they are not there, and held by one run at a time.

Two runs in one folder would mix the lines of its files, so a run holds a lock (flock) on a file in it for as long as it
writes there. The kernel drops the lock with the process, however that ends: a file that a killed run left bars nobody.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".synpo-lock"
_held: set[int] = set()  # descriptors of the lock files this process holds


class FolderInUse(ValueError):
    """Another run holds the folder. The message names the folder, the process and what to do."""


def make_folder(path: str | os.PathLike[str], flag: str) -> None:
    """Make the folder that `flag` names, and those above it. Raises OSError, saying which it is and why it cannot be had."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"{flag}: {os.fspath(path)} cannot be made a folder: {error.strerror}; name another"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag}: nothing may be written to {os.fspath(path)}; name another folder")


@contextlib.contextmanager
def made_folder(path: str | os.PathLike[str], flag: str) -> Iterator[None]:
    """`make_folder`; what was not there before, and has nothing in it at the end of the block, is removed again."""
    made = [folder for folder in (Path(path), *Path(path).parents) if not folder.is_dir()]
    make_folder(path, flag)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def own_folder(path: str | os.PathLike[str], flag: str) -> Iterator[None]:
    """`made_folder`, and be the only run in it until the end of the block.

    Processes that are forked inside the block do not hold it. On a file system without locks the run goes on with a warning.

    Raises:
        FolderInUse: another run, or another thread of this one, holds it. OSError: as `make_folder`.
    """
    with made_folder(path, flag):
        file = Path(path, LOCK)
        lock = _locked(file, flag)
        _held.add(lock)
        try:
            os.ftruncate(lock, 0)
            os.write(
                lock, f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M')}".encode()
            )
            yield
        finally:
            if lock in _held:
                _held.remove(lock)
                file.unlink(missing_ok=True)
                os.close(lock)


def _locked(file: Path, flag: str) -> int:
    """Descriptor of the lock file, locked; the file is there under its name."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(lock, 200).decode(errors="replace") or "another process"
            os.close(lock)
            raise FolderInUse(
                f"{flag}: {file.parent} is in use by {holder}; two runs would mix their lines in its files. Wait until that one "
                "has ended, or end it (the same command goes on from there), or name another folder"
            ) from error
        except OSError as error:
            print(
                f"warning: {file.parent} cannot be locked ({error.strerror or error}): see to it that no other run writes there",
                file=sys.stderr,
            )
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(file)):
                return lock
        os.close(lock)  # that of a run that ended just now, and removed it


def _let_go() -> None:
    """In a forked child: a child that outlives its parent, as that was killed, would go on holding its folders."""
    for lock in _held:
        os.close(lock)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)
