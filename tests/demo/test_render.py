"""Rendering: real H.264 of the right length and size, complete or absent, never rendered twice."""

from pathlib import Path

import av
import numpy as np
import pytest

from synpo.demo import render as rendering
from synpo.demo.render import RGB, SIDE, frames_of, render, render_all
from synpo.demo.world import FPS, SHAPES, Body, Scene, make_split
from synpo.video import probe, read_frames

SCENES = make_split(seed=5, split="train", count=3)


def test_a_rendered_video_is_h264_of_the_right_length_and_size(tmp_path: Path) -> None:
    for scene in SCENES:
        path = render(scene, tmp_path)
        assert path == tmp_path / scene.video
        info = probe(path)
        assert (info.width, info.height, info.fps) == (SIDE, SIDE, FPS)
        assert info.duration == pytest.approx(scene.duration, abs=1 / FPS)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(stream)) == round(scene.duration * FPS)


def test_decoded_frames_are_the_rendered_ones(tmp_path: Path) -> None:
    scene = SCENES[0]
    decoded = read_frames(render(scene, tmp_path), [0.01, scene.duration / 2, scene.duration - 0.01])
    drawn = frames_of(scene)[[0, int(scene.duration / 2 * FPS), -1]].transpose(0, 3, 1, 2)
    assert np.abs(decoded.numpy().astype(float) - drawn).mean() < 6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_where_it_should_be_and_nowhere_else(shape: str) -> None:
    body = Body(shape, "large", "white", "still", 0.2, (0.3, 0.6), (0.3, 0.6))
    image = frames_of(Scene("x", 0, 4.0, (body,)))[0].astype(float)
    lit = image.min(axis=2) > 200
    rows, columns = np.nonzero(lit)
    assert image[int(0.6 * SIDE), int(0.3 * SIDE)] == pytest.approx(RGB["white"], abs=1)
    assert abs(columns.mean() / SIDE - 0.3) < 0.02 and abs(rows.mean() / SIDE - 0.6) < 0.04
    assert 0.6 * 2 * 0.2 * SIDE < np.ptp(columns) + 1 <= 2 * 0.2 * SIDE + 1
    partly = ((image.min(axis=2) > 90) & ~lit).sum()
    assert partly > 4, "edges are anti-aliased"


def test_shapes_differ() -> None:
    areas = {}
    for shape in SHAPES:
        body = Body(shape, "large", "white", "still", 0.2, (0.5, 0.5), (0.5, 0.5))
        areas[shape] = int((frames_of(Scene("x", 0, 4.0, (body,)))[0].min(axis=2) > 150).sum())
    assert len(set(areas.values())) == len(SHAPES), areas


def test_the_front_body_covers_the_one_behind() -> None:
    behind = Body("square", "large", "red", "still", 0.2, (0.5, 0.5), (0.5, 0.5))
    front = Body("circle", "small", "blue", "left to right", 0.1, (0.0, 0.5), (1.0, 0.5))
    middle = frames_of(Scene("x", 0, 4.0, (behind, front)))[int(2 * FPS)][SIDE // 2, SIDE // 2]
    assert middle == pytest.approx(RGB["blue"], abs=1)


def test_rendering_again_leaves_what_is_there(tmp_path: Path) -> None:
    render_all(SCENES[:2], tmp_path, processes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [s.video for s in SCENES[:2]]
    (tmp_path / SCENES[0].video).write_bytes(b"kept")
    render_all(SCENES[:2], tmp_path, processes=1)
    assert (tmp_path / SCENES[0].video).read_bytes() == b"kept"


def test_a_failure_leaves_no_half_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scene: Scene) -> np.ndarray:
        raise RuntimeError("killed while drawing")

    monkeypatch.setattr(rendering, "frames_of", broken)
    with pytest.raises(RuntimeError, match="killed"):
        render(SCENES[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_same_scene_gives_the_same_bytes(tmp_path: Path) -> None:
    for scene in make_split(seed=0, split="train", count=16):
        first, again = (render(scene, tmp_path / name).read_bytes() for name in ("first", "again"))
        assert first == again, scene.id
