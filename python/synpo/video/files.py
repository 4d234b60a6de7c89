"""Which files are videos, and where they lie. Nothing here opens one."""

from __future__ import annotations

import os
import posixpath
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from synpo.text import clean

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})


class VideoError(ValueError):
    """A video that cannot be used; the message names the file and the reason."""


def list_videos(root: str | os.PathLike[str]) -> list[str]:
    """Videos below `root` as sorted POSIX paths relative to it.

    Links are followed: who owns the folder put them there, as for videos on another disk. A folder that can be reached in
    several ways is listed once, under its own name if it lies below `root`. Of links that lead nowhere, those with the name
    of a video are listed too, so that their use is an error, and a warning tells of the others. So is a name that is not UTF-8,
    as text, under which no file is found.

    Raises:
        VideoError: no such folder, one below it that cannot be read, or no video in it.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise VideoError(f"{folder} is not a folder; --videos takes the folder that holds the video files")

    def barred(error: OSError) -> None:
        raise VideoError(f"{error.filename} cannot be read: {error.strerror}") from error

    found = []
    for path in _files(folder, barred):
        if path.suffix.lower() in VIDEO_SUFFIXES and (path.is_file() or path.is_symlink()):
            found.append(clean(path.relative_to(folder).as_posix()))
        elif path.is_symlink() and not path.exists():
            print(
                f"warning: {path} leads to {os.readlink(path)}, where nothing is: no video is taken from there",
                file=sys.stderr,
            )
    found.sort()
    if not found:
        raise VideoError(f"no video below {folder}; looked for {', '.join(sorted(VIDEO_SUFFIXES))}")
    return found


def _files(root: Path, barred: Callable[[OSError], None]) -> Iterator[Path]:
    """Files below `root` without the hidden ones; links to folders are entered when everything else has been seen."""
    seen: set[str] = set()
    links = [str(root)]
    while links:
        starts, links = sorted(links), []
        for where, folders, names in (step for start in starts for step in os.walk(start, onerror=barred)):
            real = os.path.realpath(where)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            links += [path for name in folders if os.path.islink(path := os.path.join(where, name))]
            yield from (Path(where, name) for name in names if not name.startswith("."))


def resolve_video(root: str | os.PathLike[str], relative: str) -> Path:
    """The file that a record's `video` names. Raises VideoError if the path leaves `root` or is not there.

    The path of a record never leads out of the folder; a link that lies in the folder, which no record can make, may.
    """
    folder = Path(root).resolve()
    inside = posixpath.normpath(relative)
    if inside.startswith(("/", "../")) or inside == "..":
        raise VideoError(
            f"video path {relative!r} leaves the videos folder {folder}; it should be relative to --videos and stay below it"
        )
    path = folder / inside
    if not os.path.isfile(path):  # for a name that no file can have, too
        if "\ufffd" in relative:
            raise VideoError(
                f"video {relative!r} is in {folder} under no name that is UTF-8; rename the file, and name it so"
            )
        raise VideoError(
            f"video {relative!r} is not in {folder}; --videos should name the folder its path is relative to"
        )
    return path


def video_size(root: str | os.PathLike[str], relative: str) -> int:
    """Bytes of the file that a record's `video` names. Raises VideoError as `resolve_video` does."""
    path = resolve_video(root, relative)
    try:
        return path.stat().st_size
    except OSError as error:  # it was there a moment ago
        raise VideoError(f"{path} cannot be read: {error.strerror}") from error
