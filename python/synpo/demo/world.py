"""The offline world: scenes of moving shapes, and exactly what is true in any stretch of them.

A scene is one to three shapes over 4–12 seconds. A shape has a size and a colour, may move across, bounce or stay, may change
its colour, come later, leave, or pass in front of a shape that stays. `facts_of` states what is to be seen in a stretch of
time, so that a clip of a video has its own facts. Everything follows from (seed, index) alone.

Shape legend: coordinates are fractions of the frame side, x to the right and y downwards; F frames or moments in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
SIZES = ("small", "large")
DIRECTIONS = ("left to right", "right to left", "top to bottom", "bottom to top")
MOTIONS = (*DIRECTIONS, "bounce", "still")
STEPS = {"left to right": (1, 0), "right to left": (-1, 0), "top to bottom": (0, 1), "bottom to top": (0, -1)}

FPS = 8
DURATIONS = (4.0, 12.0)  # seconds
VISIBLE_SHARE = 0.25  # of a stretch of time that a shape must be there for to count as seen in it
EDGE_SHARE = 0.125  # of a stretch: a change this near to its ends cannot be told from no change


class Fact(NamedTuple):
    """One statement about a shape: ("circle", "colour", "red"), ("circle", "turns", "blue"), ("circle", "passes", "square")."""

    subject: str
    attribute: str
    value: str


Facts = frozenset[Fact]


@dataclass(frozen=True)
class Body:
    """One shape on its way. `start` and `end` bound the seconds in which it exists (`end` None: to the end of the video).

    It goes from `origin` to `target` at even speed; a body that bounces does `hops` hops of `origin` − `target` height.
    """

    shape: str
    size: str
    colour: str
    motion: str
    radius: float
    origin: tuple[float, float]
    target: tuple[float, float]
    start: float = 0.0
    end: float | None = None
    hops: float = 0.0
    turns: str | None = None
    turn_time: float = 0.0

    def colour_at(self, time: float) -> str:
        return self.turns if self.turns is not None and time >= self.turn_time else self.colour


@dataclass(frozen=True)
class Passing:
    """`front` goes by in front of `behind`, nearest at `time` seconds."""

    front: str
    behind: str
    time: float


@dataclass(frozen=True)
class Scene:
    """One video to be: `bodies` in drawing order (the last is in front)."""

    id: str
    seed: int
    duration: float
    bodies: tuple[Body, ...]
    passings: tuple[Passing, ...] = ()

    @property
    def video(self) -> str:
        """Name of its file below the videos folder."""
        return f"{self.id}.mp4"


def path_of(body: Body, duration: float, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (F, 2) of a body at `times` (F,) in seconds, and whether it is there at all (F,)."""
    end = duration if body.end is None else body.end
    share = np.clip((times - body.start) / (end - body.start), 0, 1)
    if body.motion == "bounce":
        share = np.abs(np.sin(math.pi * body.hops * share))
    (x0, y0), (x1, y1) = body.origin, body.target
    centre = np.stack([x0 + (x1 - x0) * share, y0 + (y1 - y0) * share], axis=1)
    return centre, (times >= body.start) & (times <= end)


def facts_of(scene: Scene, start: float = 0.0, end: float | None = None) -> Facts:
    """What is to be seen in a scene between `start` and `end` seconds (by default in all of it)."""
    end = scene.duration if end is None else end
    length = end - start
    facts: set[Fact] = set()
    seen: set[str] = set()
    for body in scene.bodies:
        last = scene.duration if body.end is None else body.end
        if min(last, end) - max(body.start, start) < VISIBLE_SHARE * length:
            continue
        seen.add(body.shape)
        first_colour, last_colour = (
            body.colour_at(t) for t in (start + EDGE_SHARE * length, end - EDGE_SHARE * length)
        )
        facts.add(Fact(body.shape, "size", body.size))
        facts.add(Fact(body.shape, "colour", first_colour))
        facts.add(Fact(body.shape, "motion", body.motion))
        if last_colour != first_colour:
            facts.add(Fact(body.shape, "turns", last_colour))
        if body.start > start + EDGE_SHARE * length:
            facts.add(Fact(body.shape, "comes", "later"))
        if body.end is not None and body.end < end - EDGE_SHARE / 2 * length:
            facts.add(Fact(body.shape, "goes", "away"))
    for passing in scene.passings:
        if start <= passing.time <= end and {passing.front, passing.behind} <= seen:
            facts.add(Fact(passing.front, "passes", passing.behind))
    return frozenset(facts)


def _body(rng: np.random.Generator, shape: str, later: bool, duration: float) -> Body:
    size = str(rng.choice(SIZES, p=(0.5, 0.5)))
    radius = rng.uniform(0.13, 0.15) if size == "small" else rng.uniform(0.22, 0.25)
    colour, other = (str(c) for c in rng.choice(COLOURS, 2, replace=False))
    motion = str(rng.choice(MOTIONS, p=(0.2, 0.2, 0.15, 0.15, 0.15, 0.15)))
    start = duration * float(rng.choice((0.42, 0.62))) if later else 0.0
    leaves = not later and motion in DIRECTIONS and rng.random() < 0.4
    end = duration * rng.uniform(0.75, 0.88) if leaves else None
    lane = rng.uniform(radius + 0.02, 0.98 - radius)
    hops = 0.0
    if motion in DIRECTIONS:
        near, far = radius + rng.uniform(0.0, 0.06), 1 - radius - rng.uniform(0.0, 0.06)
        near = -radius if later else near  # who comes later enters from outside
        far = 1 + radius if leaves else far
        step = STEPS[motion]
        along = (near, far) if sum(step) > 0 else (1 - near, 1 - far)
        origin, target = (((a, lane) if step[0] else (lane, a)) for a in along)
    elif motion == "bounce":
        floor = rng.uniform(0.9, 1.0) - radius
        origin, target = (lane, floor), (lane, max(floor - rng.uniform(0.4, 0.5), radius))
        hops = float(rng.choice((1.5, 2.0))) if later else float(rng.choice((2.0, 2.5, 3.0)))
    else:
        origin = target = (lane, rng.uniform(radius + 0.02, 0.98 - radius))
    turns = other if rng.random() < 0.3 else None
    last = duration if end is None else end
    return Body(
        shape=shape,
        size=size,
        colour=colour,
        motion=motion,
        radius=float(radius),
        origin=origin,
        target=target,
        start=start,
        end=end,
        hops=hops,
        turns=turns,
        turn_time=float(start + rng.uniform(0.35, 0.6) * (last - start)),
    )


def _behind(rng: np.random.Generator, mover: Body, still: Body) -> Body:
    """`still` moved on to the way of `mover`."""
    (x0, y0), (x1, y1) = mover.origin, mover.target
    share = rng.uniform(0.35, 0.65)
    place = (x0 + (x1 - x0) * share, y0 + (y1 - y0) * share)
    return replace(still, origin=place, target=place)


def _passings(bodies: Sequence[Body], duration: float) -> tuple[Passing, ...] | None:
    """Who passes in front of whom; None if bodies touch in any other way (both moving, too briefly, drawn the wrong way)."""
    times = np.arange(0, duration, 1 / FPS)
    paths = [path_of(b, duration, times) for b in bodies]
    found = []
    for j, front in enumerate(bodies):
        for i, behind in enumerate(bodies[:j]):
            both = paths[i][1] & paths[j][1]
            gap = np.where(both, np.linalg.norm(paths[i][0] - paths[j][0], axis=1), np.inf)
            reach = 0.9 * (front.radius + behind.radius)
            if gap.min() > reach:
                continue
            if front.motion not in DIRECTIONS or behind.motion != "still" or gap.min() > 0.5 * reach:
                return None
            found.append(Passing(front.shape, behind.shape, float(times[int(gap.argmin())])))
    return tuple(found)


def make_scene(seed: int, index: int, split: str = "train") -> Scene:
    """The scene number `index` of a split. Equal arguments give equal scenes on every machine."""
    number = int.from_bytes(split.encode(), "little") % (2**31)
    rng = np.random.default_rng((seed, number, index))
    while True:  # draw again until nothing touches that should not
        duration = round(float(rng.uniform(*DURATIONS)) * FPS) / FPS
        count = int(rng.choice((1, 2, 3), p=(0.5, 0.4, 0.1)))
        shapes = [str(s) for s in rng.choice(SHAPES, count, replace=False)]
        bodies = [_body(rng, shape, i > 0 and rng.random() < 0.4, duration) for i, shape in enumerate(shapes)]
        bodies.sort(key=lambda b: b.motion in DIRECTIONS)  # movers in front
        still = [i for i, b in enumerate(bodies) if b.motion == "still"]
        moving = [i for i, b in enumerate(bodies) if b.motion in DIRECTIONS]
        if still and moving and rng.random() < 0.6:
            bodies[still[0]] = _behind(rng, bodies[moving[-1]], bodies[still[0]])
        passings = _passings(bodies, duration)
        if passings is not None:
            return Scene(f"{split}-{index:05d}", int(rng.integers(2**31)), duration, tuple(bodies), passings)


def make_split(seed: int, split: str, count: int) -> list[Scene]:
    """The first `count` scenes of a split."""
    return [make_scene(seed, index, split) for index in range(count)]
