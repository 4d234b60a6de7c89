"""Scenes → H.264 mp4 files: anti-aliased shapes over a textured, slightly noisy background, encoded through PyAV.

Files appear complete or not at all, and what is already there is not rendered again. One process a core.
Shape legend: F frames, S frame side in pixels.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np

from synpo.demo.world import FPS, Body, Scene, path_of
from synpo.progress import Bar
from synpo.records import atomic_path

SIDE = 96
# With macroblock-tree rate control x264 writes other bytes now and then; a seed should give the same files.
X264 = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
RGB = {
    "red": (215, 40, 40),
    "green": (45, 170, 60),
    "blue": (50, 85, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 180),
    "orange": (240, 135, 30),
    "white": (240, 240, 240),
}


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (negative inside) to the outline of a shape of `radius` about the origin, elementwise, y downwards."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82 * radius
    if shape == "cross":
        a, b = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(a - radius, b - 0.3 * radius)
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.55 * radius, y - 0.7 * radius)
    if shape == "star":  # fold the plane into half of one of five points, then the distance to its edge
        half = math.pi / 5
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
        u, v = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        inner = 0.42 * radius
        ex, ey = inner * math.cos(half) - radius, inner * math.sin(half)
        return ((u - radius) * ey - v * ex) / math.hypot(ex, ey)
    raise ValueError(f"expected a shape of the world, got {shape!r}")


def _background(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A dim, smooth texture with a little noise that differs from frame to frame: (F, S, S, 3) float32."""
    coarse = rng.uniform(30, 75, (5, 5, 3))
    grid = np.linspace(0, 3.999, SIDE)
    low, part = grid.astype(int), (grid % 1)[:, None]
    rows = coarse[low] * (1 - part[..., None]) + coarse[low + 1] * part[..., None]  # (S, 5, 3)
    smooth = rows[:, low] * (1 - part) + rows[:, low + 1] * part  # (S, S, 3)
    grain = rng.normal(0, 3, (SIDE, SIDE, 1))
    flicker = rng.normal(0, 1.5, (frames, 1, 1, 3))
    return (smooth + grain + flicker).astype(np.float32)


def _draw(frames: np.ndarray, body: Body, duration: float, times: np.ndarray) -> None:
    """Lay a body over frames (F, S, S, 3), in place."""
    centres, present = path_of(body, duration, times)
    radius = body.radius * SIDE
    for i in np.flatnonzero(present):
        cx, cy = centres[i] * SIDE
        x0, x1 = (int(np.clip(v, 0, SIDE)) for v in (cx - radius - 2, cx + radius + 3))
        y0, y1 = (int(np.clip(v, 0, SIDE)) for v in (cy - radius - 2, cy + radius + 3))
        if x0 == x1 or y0 == y1:
            continue
        x, y = np.meshgrid(np.arange(x0, x1) + 0.5 - cx, np.arange(y0, y1) + 0.5 - cy)
        cover = np.clip(0.5 - _distance(body.shape, x, y, radius), 0, 1)[..., None].astype(np.float32)
        patch = frames[i, y0:y1, x0:x1]
        patch += cover * (np.array(RGB[body.colour_at(times[i])], np.float32) - patch)


def frames_of(scene: Scene) -> np.ndarray:
    """All frames of a scene, before encoding: (F, S, S, 3) uint8 RGB."""
    times = np.arange(round(scene.duration * FPS)) / FPS
    frames = _background(np.random.default_rng(scene.seed), len(times))
    for body in scene.bodies:
        _draw(frames, body, scene.duration, times)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def render(scene: Scene, folder: str | os.PathLike[str]) -> Path:
    """Write a scene below `folder` as H.264 in mp4 (yuv420p), unless its file is there already; returns its path."""
    target = Path(folder) / scene.video
    if target.exists():
        return target
    with atomic_path(target) as temporary, av.open(os.fspath(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=X264)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames_of(scene):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return target


def _render_one(job: tuple[Scene, str]) -> None:
    render(*job)


def render_all(scenes: Iterable[Scene], folder: str | os.PathLike[str], processes: int | None = None) -> None:
    """Render what is missing below `folder`, with a progress bar. `processes` None takes one a core."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    jobs = [(scene, os.fspath(folder)) for scene in scenes if not (Path(folder) / scene.video).exists()]
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), mp_context=context) as pool:
        done = pool.map(_render_one, jobs, chunksize=8)
        for _ in Bar(done, total=len(jobs), desc="rendering", unit="video"):
            pass
