"""Warnings in words, and the two pictures."""

import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from synpo.train.diagnostics import Finding, Watched, findings, read_log, warnings_of
from synpo.train.guard import Guard
from synpo.train.plots import PICTURES, Picture, curves, plot
from synpo.train.repetition import repeated_share


def run(steps: int = 20, **ends: tuple[float, float]) -> list[dict[str, Any]]:
    """Log rows that go straight from the first to the second value of each metric."""
    healthy = {
        "synpo/chosen_logp": (-1.0, -0.9),
        "synpo/rejected_logp": (-1.2, -1.5),
        "synpo/chosen_prob": (0.37, 0.41),
        "synpo/margin": (0.07, 0.19),
        "synpo/language_reward": (0.5, 0.52),
        "synpo/saturation": (0.3, 0.6),
        "synpo/grad_balance/chosen": (0.5, 0.4),
        "synpo/grad_balance/rejected": (0.4, 0.2),
    }
    ends = healthy | {f"synpo/{name.replace('__', '/')}": value for name, value in ends.items()}
    return [
        {"step": i + 1, **{k: a + (b - a) * i / max(1, steps - 1) for k, (a, b) in ends.items()}} for i in range(steps)
    ]


def test_a_healthy_run_gets_no_warning() -> None:
    assert warnings_of(run(), "synpo") == []
    assert warnings_of([], "synpo") == []
    assert warnings_of(run(9, saturation=(1.0, 1.0)), "synpo") == []
    assert warnings_of(run(10, saturation=(1.0, 1.0)), "synpo") != []


@pytest.mark.parametrize("seed", range(20))
def test_chance_and_unequal_lengths_are_no_finding(seed: int) -> None:
    """A run in warm-up: nothing moves, batches differ; rejected answers are a quarter longer. Looked at after every step."""
    draw = random.Random(seed)
    rows = run(60, grad_balance__chosen=(0.4, 0.4), grad_balance__rejected=(0.447, 0.447), margin=(0.1, 0.1))
    for row in rows:
        row["synpo/margin"] += draw.gauss(0, 0.05)
    found = [warnings_of(rows[:count], "dpo") for count in range(61)]
    assert sum(map(bool, found)) <= 2
    for i, row in enumerate(rows):
        row["synpo/margin"] -= 0.005 * i
    (fell,) = warnings_of(rows, "dpo")
    assert "margin fell" in fell


@pytest.mark.parametrize(
    ("ends", "loss_type", "words"),
    [
        ({"grad_balance__rejected": (0.4, 0.9)}, "dpo", ("negatives dominate", "learning_rate", "loss_type synpo")),
        ({"grad_balance__rejected": (0.4, 0.9)}, "synpo", ("negatives dominate", "train.alpha", "train.beta")),
        ({"saturation": (0.3, 1.0)}, "synpo", ("saturates", "Lower train.alpha")),
        ({"chosen_prob": (0.4, 0.2)}, "synpo", ("became unlikely", "learning_rate", "raise train.beta")),
        ({"chosen_prob": (0.4, 0.2)}, "dpo", ("became unlikely", "use loss_type synpo")),
        ({"language_reward": (0.5, 0.2)}, "synpo", ("language collapses", "learning_rate", "raise train.beta")),
        ({"margin": (0.2, 0.1)}, "simpo", ("margin fell", "Raise train.learning_rate")),
    ],
)
def test_each_failure_is_named_with_its_knob(ends: Any, loss_type: str, words: tuple[str, ...]) -> None:
    (warning,) = warnings_of(run(**ends), loss_type)
    assert all(word in warning for word in words), warning


def test_answers_that_begin_to_repeat_themselves_are_noticed() -> None:
    evaluations = [{"step": i, "eval_loss": 0.0, "eval_synpo/repetition": share} for i, share in enumerate((0.1, 0.2))]
    assert findings(Watched([*run(), *evaluations]), "synpo") == []
    (found,) = findings(Watched([*evaluations, {"eval_loss": 0.0, "eval_synpo/repetition": 0.6}]), "synpo")
    assert (found.kind, found.serious) == ("repetition", True)
    assert "10% of their 4-grams at the first evaluation, 60% now" in found.text


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([1, 2, 3, 4] * 2, 0.2), ([7] * 8, 0.8)],
)
def test_repeated_share(tokens: list[int], share: float) -> None:
    assert repeated_share(tokens) == pytest.approx(share)


@pytest.mark.parametrize("mode", ["off", "warn", "stop"])
def test_the_guard_says_each_trouble_once_and_stops_only_for_the_serious(mode: str) -> None:
    said: list[str] = []
    guard = Guard("synpo", mode, say=said.append)
    stopped = []
    for row in run(saturation=(1.0, 1.0), chosen_prob=(0.4, 0.1)):
        state = SimpleNamespace(global_step=row["step"], is_world_process_zero=True)
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        guard.on_log(None, state, control, logs={k: v for k, v in row.items() if k != "step"})
        if control.should_training_stop:
            assert control.should_save
            stopped.append(row["step"])
    assert len(said) == (0 if mode == "off" else 2)
    if mode != "off":
        assert "step 10: the sigmoid saturates" in said[0]
        assert "the chosen answers became unlikely" in said[1]
    assert bool(stopped) == (mode == "stop")
    if stopped:
        assert guard.stopped is not None and guard.stopped.kind == "chosen"
        assert stopped[0] >= 10


def by_hand(rows: list[dict[str, Any]]) -> dict[str, tuple[float, ...]]:
    """The figures of each kind of trouble from all rows, as diagnostics.py words them."""
    fifth = max(1, round(0.2 * len(rows)))

    def means(name: str) -> tuple[float, float]:
        values = [row[f"synpo/{name}"] for row in rows]
        return sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth

    found = {}
    rejected, chosen = means("grad_balance/rejected")[1], means("grad_balance/chosen")[1]
    if rejected > 1.2 * chosen:
        found["negatives"] = (rejected / chosen,)
    if (saturation := means("saturation")[1]) > 0.9:
        found["saturation"] = (100 * saturation,)
    for kind, name in (("chosen", "chosen_prob"), ("language", "language_reward")):
        before, after = means(name)
        if after < 0.7 * before:
            found[kind] = (before, after)
    before, after = means("margin")
    margins = [row["synpo/margin"] for row in rows]
    variance = sum((b - a) ** 2 for a, b in zip(margins, margins[1:])) / (2 * (len(margins) - 1))
    if before - after > 3 * math.sqrt(2 * variance / fifth):
        found["margin"] = (before, after)
    return found


def random_run(seed: int, steps: int = 200) -> list[dict[str, Any]]:
    """Values that wander between trouble and none."""
    draw, rows = random.Random(seed), run(steps)
    for row in rows:
        for i, name in enumerate(sorted(row.keys() - {"step"})):
            row[name] = row[name] * (1 + 0.7 * math.sin(row["step"] / 30 + 2 * i + seed)) + draw.gauss(0, 0.02)
    return rows


def observed(guard: Guard, rows: list[dict[str, Any]], begin: int = 0) -> dict[int, list[Finding]]:
    """What holds after every step of `rows`, fed to a guard that goes on from step `begin`."""
    found = {}
    state = SimpleNamespace(global_step=begin, is_world_process_zero=True)
    guard.on_train_begin(None, state, None)
    for row in rows:
        state.global_step = row["step"]
        guard.on_log(None, state, SimpleNamespace(), logs={k: v for k, v in row.items() if k != "step"})
        found[row["step"]] = findings(guard.run, guard.loss_type)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_running_sums_find_what_all_rows_show_also_after_going_on(seed: int) -> None:
    rows = random_run(seed)
    said: list[str] = []
    whole = observed(Guard("synpo", "warn", say=said.append), rows)
    kinds = set()
    for count in range(10, len(rows) + 1):
        expected = by_hand(rows[:count])
        assert [f.kind for f in whole[count]] == list(expected), count
        for finding in whole[count]:
            figures = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?(?=[ %.,:])", finding.text)]
            for value in expected[finding.kind]:
                assert any(math.isclose(x, value, rel_tol=6e-3, abs_tol=0.5 * (value > 20)) for x in figures), (
                    finding.text
                )
        kinds |= expected.keys()
    assert len(kinds) >= 3 and len(said) == len(kinds)
    for at in (7, 60):  # the log goes beyond the checkpoint
        again = observed(Guard("synpo", "warn", rows=rows[: at + 5], say=said.append), rows[at:], begin=at)
        assert again == {step: whole[step] for step in range(at + 1, len(rows) + 1)}


def test_a_look_costs_the_same_however_long_the_run_is() -> None:
    """Counted in lines of Python run, which is no matter of the machine's mood."""
    counts = []
    guard = Guard("synpo", "warn", say=lambda text: None)
    for rows in (random_run(1, 50), random_run(1, 2000)):
        observed(guard, rows[:-1])
        lines = 0

        def trace(*_: Any) -> Any:
            nonlocal lines
            lines += 1
            return trace

        state = SimpleNamespace(global_step=rows[-1]["step"], is_world_process_zero=True)
        sys.settrace(trace)
        try:
            guard.on_log(None, state, SimpleNamespace(), logs=rows[-1])
        finally:
            sys.settrace(None)
        counts.append(lines)
    assert counts[1] < 1.2 * counts[0]


def test_a_value_that_is_not_a_number_does_not_blind_the_guard() -> None:
    rows = run(40, saturation=(1.0, 1.0))
    rows[3]["synpo/saturation"] = float("nan")
    assert warnings_of(rows, "synpo") == warnings_of(run(40, saturation=(1.0, 1.0)), "synpo") != []


def test_only_training_steps_are_read(tmp_path: Path) -> None:
    rows = [*run(3), {"step": 3, "eval_loss": 1.0}, {"step": 3, "train_runtime": 2.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 4, "synpo/ch')
    assert read_log(tmp_path / "log.jsonl") == run(3)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
@pytest.mark.parametrize("names", [["SynPO"], ["SynPO", "DPO", "SFT"]])
def test_pictures_are_pngs_with_a_panel_a_run(picture: Picture, names: list[str], tmp_path: Path) -> None:
    path = plot(picture, {name: run(1 if name == "SFT" else 60) for name in names}, tmp_path / "deep")
    image = Image.open(path)
    assert image.format == "PNG"
    assert image.width == pytest.approx(100 * (4.2 * len(names) + 0.8), abs=2)
    colours = {c for _, c in image.convert("RGB").getcolors(1 << 20)}
    assert {(27, 127, 77), (192, 57, 43)} <= colours  # both lines were drawn
    assert [p.name for p in path.parent.iterdir()] == [f"{picture.name}.png"]


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 400])
def test_steps_are_whole_on_the_axis(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []

    def look(canvas: Any, path: str) -> None:
        canvas.draw()
        panel = canvas.figure.axes[0]
        low, high = panel.get_xlim()
        ticks.extend(tick for tick in panel.get_xticks() if low <= tick <= high)
        Path(path).touch()

    monkeypatch.setattr("synpo.train.plots.FigureCanvasAgg.print_png", look)
    plot(PICTURES[0], {"SynPO": run(steps)}, tmp_path)
    assert ticks and all(tick == int(tick) for tick in ticks)


def test_curves_are_what_the_pictures_show() -> None:
    rows = run(48)
    found = curves(PICTURES[0], {"SynPO": rows})
    faint, bold = found.panels["SynPO"]["chosen"]
    assert faint == [(row["step"], row["synpo/chosen_logp"]) for row in rows]
    values = [row["synpo/chosen_logp"] for row in rows]
    assert bold[20] == (21, pytest.approx(sum(values[18:23]) / 5))
    assert [step for step, _ in bold] == [step for step, _ in faint]


@pytest.mark.parametrize("runs", [{}, {"SynPO": []}])
def test_nothing_to_plot_is_an_error(runs: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(PICTURES[0], runs, tmp_path)
    with pytest.raises(ValueError, match="nothing to plot"):
        curves(PICTURES[0], runs)
