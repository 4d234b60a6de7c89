"""Which files are videos, and where the path of a record leads."""

import os
from pathlib import Path

import pytest

from synpo.video import VideoError, list_videos, resolve_video, video_size


def test_only_videos_below_the_folder_are_listed(tmp_path: Path) -> None:
    for name in ("b.mp4", "a/c.WEBM", "notes.txt", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert list_videos(tmp_path) == ["a/c.WEBM", "b.mp4"]
    with pytest.raises(VideoError, match="is not a folder; --videos"):
        list_videos(tmp_path / "b.mp4")
    with pytest.raises(VideoError, match="no video below"):
        list_videos(tmp_path / "folder.mp4")


def test_links_to_videos_and_to_folders_of_videos_are_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each folder once, under its own name where it has one below the root; loops end."""
    root, disk = tmp_path / "videos", tmp_path / "disk"
    for name in ("videos/own/a.mp4", "disk/b.mp4", "disk/deep/c.mp4", "disk/.d.mp4", "e.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "again").symlink_to(root / "own")
    (root / "aside").symlink_to(disk)
    (root / "second").symlink_to(disk)
    (root / "e.mp4").symlink_to(tmp_path / "e.mp4")
    (disk / "back").symlink_to(root)
    (disk / "deep" / "self").symlink_to(disk / "deep")
    names = ["aside/b.mp4", "aside/deep/c.mp4", "e.mp4", "own/a.mp4"]
    assert list_videos(root) == names
    assert all(resolve_video(root, name).is_file() for name in names)
    assert capsys.readouterr().err == ""
    (root / "unmounted").symlink_to(tmp_path / "gone")
    assert list_videos(root) == names
    assert f"warning: {root / 'unmounted'} leads to {tmp_path / 'gone'}, where nothing is" in capsys.readouterr().err
    (tmp_path / "linked").symlink_to(root)
    assert list_videos(tmp_path / "linked") == names


@pytest.mark.parametrize("name", [os.fsdecode(b"b\xff.mp4"), "b\ufffd.mp4"])
def test_a_name_that_no_record_can_hold_costs_that_video_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "fine \u00a0\u200d.mp4").touch()
    (tmp_path / name).touch()
    assert list_videos(tmp_path) == ["b\ufffd.mp4", "fine \u00a0\u200d.mp4"]
    if name.isprintable():
        return
    with pytest.raises(VideoError, match=r"b\ufffd\.mp4' is in .* under no name that is UTF-8; rename the file"):
        resolve_video(tmp_path, "b\ufffd.mp4")


@pytest.mark.parametrize("name", ["a\0b.mp4", "a" * 300 + ".mp4", "a/" * 3000 + "b.mp4"])
def test_a_name_that_no_file_can_have_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="is not in"):
        resolve_video(tmp_path, name)


def test_paths_from_records_stay_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "videos"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.mp4").touch()
    (tmp_path / "secret.mp4").touch()
    (tmp_path / "disk").mkdir()
    (root / "disk").symlink_to(tmp_path / "disk")
    for path in ("a/b.mp4", "./a//b.mp4", "disk/../a/b.mp4"):
        assert resolve_video(root, path) == root.resolve() / "a" / "b.mp4"
    with pytest.raises(VideoError, match="is not in"):
        resolve_video(root, "disk/../secret.mp4")  # for the file system that were a file beside the folder
    for path in ("../secret.mp4", str(tmp_path / "secret.mp4"), "a/../../secret.mp4", "..", "disk/../../secret.mp4"):
        with pytest.raises(VideoError, match="leaves the videos folder"):
            resolve_video(root, path)
    for path in ("a/c.mp4", "b.mp4", "a"):
        with pytest.raises(VideoError, match="is not in"):
            resolve_video(root, path)
        with pytest.raises(VideoError, match="is not in"):
            video_size(root, path)
    (root / "a" / "b.mp4").write_bytes(b"xyz")
    assert video_size(root, "a/b.mp4") == 3


def test_nothing_is_passed_over_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a file that was moved is listed, and found missing when it is used; a folder that is barred is an error."""
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "moved.mp4")
    (tmp_path / "sub").mkdir()
    assert list_videos(tmp_path) == ["a.mp4", "link.mp4"]
    with pytest.raises(VideoError, match=r"'link\.mp4' is not in"):
        resolve_video(tmp_path, "link.mp4")
    scan = os.scandir

    def scandir(path: str | os.PathLike[str]) -> object:
        if os.fspath(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(VideoError, match=r"sub cannot be read: Permission denied"):
        list_videos(tmp_path)
