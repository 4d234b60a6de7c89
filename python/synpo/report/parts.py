"""The pieces of the report as HTML: tables, samples, pairs, words explained, the run. Every text is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from synpo.evaluate.ptb import tokenize
from synpo.report.draw import tone
from synpo.report.table import Table

MANY_COLUMNS = 4  # a table of more is wider than a telephone
# fmt: off
_SMALL_WORDS = frozenset([
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "has", "have", "he", "her", "his", "in", "into", "is",
    "it", "its", "of", "on", "or", "she", "that", "the", "their", "then", "there", "they", "this", "to", "was",
    "were", "while", "with", "'s", "-lrb-", "-rrb-",
])
# fmt: on


@dataclass(frozen=True)
class Sample:
    """What each system said of one video.

    image   PNG or JPEG of its frames; scores: what to say of each system's caption; remark: of the sample as a whole
    """

    video: str
    references: Sequence[str]
    captions: Mapping[str, str]
    image: bytes | Path | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""


@dataclass(frozen=True)
class PairSample:
    """A preference pair; `remarks` say something of the chosen and of the rejected answer, `remark` of both; `answers` is what
    systems say to the prompt themselves."""

    video: str | None
    chosen: str
    rejected: str
    image: bytes | Path | None = None
    prompt: str = ""
    remarks: tuple[str, str] = ("", "")
    remark: str = ""
    answers: Mapping[str, str] = field(default_factory=dict)


def table_html(table: Table, systems: Sequence[str] = ()) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = "".join(
        f"<tr>{_row_name(row[0], systems)}"
        + "".join(_cell(text, table.style(r, c)) for c, text in enumerate(row[1:], 1))
        + "</tr>"
        for r, row in enumerate(table.rows)
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    hint = '<p class="more">more columns to the right →</p>' if len(table.header) > MANY_COLUMNS else ""
    return (
        f'<section class="card"><h3>{escape(table.title)}</h3>{hint}<div class="scroll" tabindex="0" role="group" '
        f'aria-label="{escape(table.title)}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{notes}</section>"
    )


def _row_name(name: str, systems: Sequence[str]) -> str:
    inside = f'<span class="key {tone(name, systems)}">{escape(name)}</span>' if name in systems else escape(name)
    return f'<th scope="row">{inside}</th>'


def _cell(text: str, style: str) -> str:
    first, *rest = text.split("\n")
    below = "".join(f"<small>{escape(line)}</small>" for line in rest)
    return f'<td class="{style}">{escape(first)}{below}</td>'


def terms_html(terms: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{escape(word)}</dt><dd>{escape(meaning)}</dd></div>" for word, meaning in terms)
    return f'<section class="card"><h3>Words on this page</h3><dl class="terms">{rows}</dl></section>'


def image_uri(image: bytes | Path) -> str:
    """A PNG or a JPEG as a data URI. Raises ValueError when it is neither."""
    data = image if isinstance(image, bytes) else image.read_bytes()
    for kind, start in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if data.startswith(start):
            return f"data:image/{kind};base64," + base64.b64encode(data).decode()
    raise ValueError(
        f"a report embeds PNG and JPEG images, got {'bytes' if isinstance(image, bytes) else image} starting {data[:8]!r}"
    )


def _picture(video: str | None, image: bytes | Path | None) -> str:
    return f'<img src="{image_uri(image)}" alt="frames of {escape(video or "")}">' if image is not None else ""


def sample_html(sample: Sample | PairSample, systems: Sequence[str] = ()) -> str:
    """A card with the frames of a video and what was said of it."""
    rows = _answers(sample, systems) if isinstance(sample, PairSample) else _captions(sample, systems)
    head = f"<h4>{escape(sample.video)}</h4>" if sample.video else ""
    said = f"<p>{escape(sample.remark)}</p>" if sample.remark else ""
    picture = ""
    if sample.image is not None:
        picture = f'<img src="{image_uri(sample.image)}" alt="frames of {escape(sample.video or "")}">'
    return f'<article class="card sample">{head}{said}{picture}<dl class="said">{"".join(rows)}</dl></article>'


def _captions(sample: Sample, systems: Sequence[str]) -> list[str]:
    known = {word for reference in sample.references for word in tokenize(reference)}
    rows = []
    if sample.references:
        first, *others = map(escape, sample.references)
        more = f"<details><summary>{len(others)} more</summary>{'<br>'.join(others)}</details>" if others else ""
        rows.append(f'<dt>reference</dt><dd class="reference">{first}{more}</dd>')
    for system, caption in sample.captions.items():
        said = _marked(caption, known) if sample.references else escape(caption)
        name = f"{escape(system)}<small>{escape(sample.scores.get(system, ''))}</small>"
        rows.append(f'<dt class="key {tone(system, systems)}">{name}</dt><dd>{said or "<em>(nothing)</em>"}</dd>')
    return rows


def _answers(pair: PairSample, systems: Sequence[str]) -> list[str]:
    words = [set(tokenize(text)) for text in (pair.chosen, pair.rejected)]
    rows = [f'<dt>prompt</dt><dd class="reference">{escape(pair.prompt)}</dd>'] if pair.prompt else []
    for n, (name, text) in enumerate((("chosen", pair.chosen), ("rejected", pair.rejected))):
        name = f"{name}<small>{escape(pair.remarks[n])}</small>"
        rows.append(f'<dt class="key side{n}">{name}</dt><dd class="side{n}">{_marked(text, words[1 - n])}</dd>')
    for system, answer in pair.answers.items():
        said = escape(answer) or "<em>(nothing)</em>"
        rows.append(f'<dt class="key {tone(system, systems)}">{escape(system)}</dt><dd>{said}</dd>')
    return rows


def _marked(text: str, known: set[str]) -> str:
    """The text with every word that is not known in <mark>."""
    return " ".join(
        f"<mark>{escape(word)}</mark>"
        if any(token not in known and token not in _SMALL_WORDS for token in tokenize(word))
        else escape(word)
        for word in text.split()
    )


def info_html(rows: Mapping[str, str]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows.items()
    )
    return f'<section class="card"><table class="info"><tbody>{body}</tbody></table></section>'


def stages_html(seconds: Mapping[str, float]) -> str:
    """Wall time of each stage, a bar each."""
    longest = max([*seconds.values(), 1e-9])
    rows = "".join(
        f'<dt>{escape(name)}</dt><dd><span style="width:{100 * max(time, 0) / longest:.1f}%"></span>{duration(time)}</dd>'
        for name, time in seconds.items()
    )
    total = duration(sum(seconds.values()))
    return f'<section class="card"><h3>Wall time: {total}</h3><dl class="stages">{rows}</dl></section>'


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
