"""The pieces of the report as HTML: tables, charts of intervals, figures, samples, the time bar. Every text is escaped here."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from synpo.evaluate.ptb import tokenize
from synpo.report.table import Chart, Table

COLOURS = 6
# fmt: off
_SMALL_WORDS = frozenset([
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "has", "have", "he", "her", "his", "in", "into", "is",
    "it", "its", "of", "on", "or", "she", "that", "the", "their", "then", "there", "they", "this", "to", "was",
    "were", "while", "with", "'s", "-lrb-", "-rrb-",
])
# fmt: on


def table_html(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "".join(
        "<tr>" + "".join(_cell(text, table.style(r, c)) for c, text in enumerate(row)) + "</tr>"
        for r, row in enumerate(table.rows)
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<section class="card"><h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{notes}</section>"
    )


def _cell(text: str, style: str) -> str:
    first, *rest = text.split("\n")
    below = "".join(f"<small>{escape(line)}</small>" for line in rest)
    return f'<td class="{style}">{escape(first)}{below}</td>'


def chart_html(chart: Chart) -> str:
    """Dots with whiskers on one scale that spans all of them."""
    width, left, right, step = 360, 92, 44, 30
    ends = [end for _, value, i in chart.rows for end in ((value,) if i is None else (value, i.low, i.high))]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    height = step * len(chart.rows) + 26
    parts = []
    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 22}"/>'
            f'<text class="soft" x="{x(tick):.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
        )
    for r, (name, value, interval) in enumerate(chart.rows):
        y = step * r + 4 + step / 2
        parts.append(f'<text x="0" y="{y + 4:.0f}">{escape(_short(name))}</text><g class="mark s{r % COLOURS}">')
        if interval is not None:
            parts.append(
                f'<line x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}" y1="{y}" y2="{y}" stroke-width="2"/>'
            )
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="5"/></g>')
        parts.append(f'<text x="{width}" y="{y + 4:.0f}" text-anchor="end">{value:.1f}</text>')
    return (
        f'<figure class="card"><h3>{escape(chart.title)}</h3><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(chart.title)}">{"".join(parts)}</svg></figure>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers between low and high."""
    span = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(span))
    unit = next(m * power for m in (1, 2, 5, 10) if m * power >= span)
    return [round(k * unit, 10) for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def _short(name: str) -> str:
    return name if len(name) <= 13 else name[:12] + "…"


def image_uri(image: bytes | Path) -> str:
    """A PNG as a data URI. Raises ValueError when it is not one."""
    data = image if isinstance(image, bytes) else image.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(
            f"a report embeds PNG images, got {'bytes' if isinstance(image, bytes) else image} starting {data[:8]!r}"
        )
    return "data:image/png;base64," + base64.b64encode(data).decode()


def plot_html(title: str, caption: str, image: bytes | Path) -> str:
    return (
        f'<figure class="card"><h3>{escape(title)}</h3><img src="{image_uri(image)}" alt="{escape(title)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def sample_html(video: str, references: Sequence[str], captions: Mapping[str, str], image: bytes | Path | None) -> str:
    known = {word for reference in references for word in tokenize(reference)} | _SMALL_WORDS
    picture = f'<img src="{image_uri(image)}" alt="frames of {escape(video)}">' if image is not None else ""
    rows = (
        [f'<dt>reference</dt><dd class="reference">{"<br>".join(map(escape, references))}</dd>'] if references else []
    )
    for number, (system, caption) in enumerate(captions.items()):
        said = _marked(caption, known) if references else escape(caption)
        rows.append(f'<dt class="s{number % COLOURS}">{escape(system)}</dt><dd>{said or "<em>(nothing)</em>"}</dd>')
    return (
        f'<article class="card sample"><h3>{escape(video)}</h3>{picture}<dl class="said">{"".join(rows)}</dl></article>'
    )


def _marked(caption: str, known: set[str]) -> str:
    """The caption with every word that no reference uses in <mark>."""
    return " ".join(
        f"<mark>{escape(word)}</mark>" if any(token not in known for token in tokenize(word)) else escape(word)
        for word in caption.split()
    )


def info_html(rows: Mapping[str, str]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f'<section class="card"><table class="info"><tbody>{body}</tbody></table></section>'


def stages_html(seconds: Mapping[str, float]) -> str:
    """Wall time of each stage as one bar and its key."""
    bar = "".join(
        f'<span class="s{n % COLOURS}" style="flex-grow:{max(time, 0):.3f}" title="{escape(name)}"></span>'
        for n, (name, time) in enumerate(seconds.items())
    )
    key = "".join(
        f'<span class="key s{n % COLOURS}">{escape(name)} {duration(time)}</span>'
        for n, (name, time) in enumerate(seconds.items())
    )
    total = duration(sum(seconds.values()))
    return f'<section class="card"><h3>Wall time: {total}</h3><div class="stages">{bar}</div>{key}</section>'


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
