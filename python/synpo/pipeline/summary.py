"""What building pairs came to: the figures of a run, and the table that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from synpo import terminal
from synpo.pipeline.judge.audit import Agreement


@dataclass(frozen=True)
class PairsResult:
    """The figures of one run.

    Attributes:
        path: the pairs file.
        pairs: pairs in it.
        videos: videos found; `problems` names those that could not be used, with the reason.
        clips, candidates: of the usable videos.
        scored, failed: candidates with and without a verdict; `failures` counts the reasons.
        empty: candidates without a word, which no judge saw.
        cut: captions made by this run that were stopped at max_new_tokens.
        below_margin, alike, too_few: videos that gave no pair, and why.
        seconds: stage → wall time of this run.
        audit: what is known of how far the judge can be trusted.
    """

    path: Path
    pairs: int
    videos: int
    clips: int
    candidates: int
    scored: int
    failed: int
    failures: dict[str, int]
    empty: int
    cut: int
    below_margin: int
    alike: int
    too_few: int
    problems: dict[str, str]
    seconds: dict[str, float]
    audit: list[Agreement]


def print_result(result: PairsResult, console: Console | None = None) -> None:
    """Print the figures, the videos that were left out, and how far the judge agrees."""
    console = console or terminal.console()
    table = Table(title="Preference pairs", title_justify="left")
    table.add_column("")
    table.add_column("count", justify="right")
    for name, count in (
        ("videos", result.videos),
        ("videos left out", len(result.problems)),
        ("clips captioned", result.clips),
        ("candidates", result.candidates),
        ("candidates scored", result.scored),
        ("judgements failed", result.failed),
        ("captions empty", result.empty),
        ("captions cut at max_new_tokens (this run)", result.cut),
        ("videos below the margin", result.below_margin),
        ("videos whose candidates are alike", result.alike),
        ("videos with too few scores", result.too_few),
        ("pairs", result.pairs),
    ):
        table.add_row(name, str(count))
    for stage, seconds in result.seconds.items():
        table.add_row(f"seconds: {stage}", f"{seconds:.1f}")
    console.print(table)
    if result.audit:
        console.print(_audit_table(result.audit))
    for reason, count in result.failures.items():
        console.print(f"failed {count}×: {reason}")
    for video, reason in result.problems.items():
        console.print(f"left out {video}: {reason}")
    if not result.pairs and result.below_margin:
        console.print("no candidates of a video are pairs.margin apart: lower it, or raise pairs.candidates")
    if len(result.problems) < result.videos and (result.scored or not result.failed):
        pairs = f"{result.pairs} pair{'' if result.pairs == 1 else 's'}"
        console.print(f"{pairs} in {result.path}")


def _audit_table(rows: list[Agreement]) -> Table:
    table = Table(title="Judge: agreement within a video", title_justify="left")
    for name in ("", "candidates", "Spearman", "pairs alike", "κ"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        figures = (row.spearman, row.accuracy, row.kappa)
        table.add_row(row.name, str(row.count), *("–" if x is None else f"{x:.2f}" for x in figures))
    return table
