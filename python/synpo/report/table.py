"""Results for people: a table and a chart of intervals, the same for the terminal, the report and whoever wants the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from synpo import terminal
from synpo.evaluate.bootstrap import Interval
from synpo.text import printable, tolerant


@dataclass(frozen=True)
class Table:
    """`rows` of texts under `header`; the first column names the row, the others hold figures.

    best       (row, column) cells to stand out as the best of their column
    good, bad  cells to stand out as surely better, and as surely worse
    notes      in words, printed under the table

    A cell may hold two lines (a score, and its interval below it).
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)
    good: set[tuple[int, int]] = field(default_factory=set)
    bad: set[tuple[int, int]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(
                    f"row {number} of table {self.title!r} has {len(row)} cells, its header {len(self.header)}"
                )

    def style(self, row: int, column: int) -> str:
        """ "best", "good", "bad" or "" for a cell."""
        kinds = {"good": self.good, "bad": self.bad, "best": self.best}
        return next((name for name, cells in kinds.items() if (row, column) in cells), "")


@dataclass(frozen=True)
class Chart:
    """One metric: rows of (name, score, interval or None), drawn as dots with whiskers on a common scale.

    `zero` has a line at 0, for differences.
    """

    title: str
    rows: list[tuple[str, float, Interval | None]]
    zero: bool = False


def print_table(table: Table, console: Console | None = None) -> None:
    """Print to the terminal (or to `console`), figures right-aligned, notes below."""
    console = console or terminal.console()
    tolerant(console.file)
    shown = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=0,
    )
    for number, name in enumerate(table.header):
        shown.add_column(Text(name), justify="left" if number == 0 else "right", overflow="fold")
    for r, row in enumerate(table.rows):
        shown.add_row(*(_cell(text, table.style(r, c)) for c, text in enumerate(row)))
    console.print(shown, soft_wrap=False)
    for note in table.notes:
        console.print(Text(f"  {printable(note)}", style="dim"), soft_wrap=False)


def _cell(text: str, style: str) -> Text:
    first, *rest = printable(text).split("\n")
    cell = Text(first, style={"best": "bold", "good": "bold green", "bad": "bold red"}.get(style, ""))
    for line in rest:
        cell.append("\n" + line, style="not bold dim default")
    return cell
