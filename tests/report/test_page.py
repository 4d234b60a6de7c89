"""The report: one file, nothing fetched, every text escaped, every figure in it, every picture in the page's colours."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synpo.evaluate.bootstrap import Interval
from synpo.report.draw import POINTS, Curves, chart_html, curves_html
from synpo.report.page import Group, Highlight, PairSample, Report, Sample, plain, render, write_report
from synpo.report.parts import duration, stages_html, table_html
from synpo.report.style import CSS
from synpo.report.table import Chart, Table

EVIL = '<script>alert("x")</script> & <img src=http://a.b/c.png>'


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = frozenset(["meta", "img", "br"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def straight(steps: Sequence[float], values: Sequence[float]) -> Any:
    points = list(zip(steps, values))
    return points, points


@pytest.fixture
def report(png: bytes, tmp_path: Path) -> Report:
    picture = tmp_path / "frames.png"
    picture.write_bytes(png)
    said = {"base": f"a blue dog {EVIL}", "SynPO": ""}
    caption = Sample(f"v/{EVIL}.mp4", ["a red dog", EVIL], said, picture, {"base": EVIL}, EVIL)
    pair = PairSample(EVIL, f"a red dog {EVIL}", f"a cat {EVIL}", png, EVIL, (EVIL, EVIL), EVIL)
    return Report(
        title=f"Title {EVIL}",
        lead=f"Lead {EVIL}",
        findings=[EVIL],
        highlights=[Highlight("CIDEr", "42.5", EVIL), Highlight(EVIL, EVIL, "", EVIL)],
        terms=[(EVIL, EVIL)],
        systems=["base", EVIL],
        notes=[EVIL],
        charts=[Chart(EVIL, [("base", 1.0, Interval(0.5, 1.5)), (EVIL, 2.0, None)], zero=True)],
        tables=[Table(f"T {EVIL}", ["system", EVIL], [[EVIL, "1.0\n0.5–1.5"]], best={(0, 1)}, notes=[EVIL])],
        captions=[Group(EVIL, EVIL, [caption])],
        pairs=[Group(EVIL, EVIL, [pair])],
        curves=[Curves(f"P {EVIL}", EVIL, EVIL, {EVIL: {EVIL: straight([1, 2], [0.5, 0.7])}, "b": {}}, False)],
        training=[Table("T", ["", "a"], [[EVIL, EVIL]])],
        seconds={"render": 12.3, EVIL: 100.0},
        run={"command": EVIL, EVIL: "x"},
        figures={"caption": EVIL, "loss": [1.0, float("nan")]},
        beside=EVIL,
    )


def test_the_page_is_self_contained_and_escaped(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "out" / "report.html", report)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figures"}]
    sources = [attributes["src"] or "" for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any("href" in attributes for _, attributes in page.tags)
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert page.texts.count("Title " + EVIL) == 2  # title and heading
    assert "42.5" in page.texts
    assert "0.5–1.5" in page.texts
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_figures_are_embedded(report: Report) -> None:
    found = re.search(r'id="figures">(.*?)</script>', render(report), re.DOTALL)
    assert found is not None
    assert json.loads(found[1]) == {"caption": EVIL, "loss": [1.0, "NaN"]}


def test_words_that_no_reference_uses_are_marked() -> None:
    sample = Sample("v", ["a red dog, running."], {"base": "The blue dog is running", "two": "cats & <b>"})
    text = render(Report("t", captions=[Group("g", "", [sample])]))
    assert "The <mark>blue</mark> dog is running" in text
    assert "<mark>cats</mark> <mark>&amp;</mark> <mark>&lt;b&gt;</mark>" in text


def test_words_that_one_answer_has_alone_are_marked() -> None:
    text = render(Report("t", pairs=[Group("g", "", [PairSample(None, "a red dog runs", "the blue dog runs")])]))
    assert '<dd class="side0">a <mark>red</mark> dog runs</dd>' in text
    assert '<dd class="side1">the <mark>blue</mark> dog runs</dd>' in text


def test_a_system_has_one_colour_all_over_the_page() -> None:
    systems = ["base", "DPO", "SynPO"]
    curve = Curves("c", "", "", {name: {"chosen": straight([1, 2], [0, 1])} for name in ("SynPO", "DPO")}, True)
    text = render(
        Report(
            "t",
            systems=systems,
            highlights=[Highlight("SynPO", "1", "", "SynPO")],
            charts=[Chart("m", [("SynPO", 1.0, None)])],
            tables=[Table("t", ["system", "m"], [["SynPO", "1"]])],
            captions=[Group("g", "", [Sample("v", [], {"SynPO": "x"})])],
            curves=[curve],
        )
    )
    assert len(re.findall(r'class="[^"]*\bs2"', text)) == 5  # tile, chart, table, caption, curve
    assert len(re.findall(r'class="[^"]*\bs1"', text)) == 1  # the other curve


def test_colours_are_those_of_the_style_sheet(report: Report) -> None:
    """Nothing but the style sheet names a colour, so that what is drawn follows the reader's light or dark."""
    body = render(report).split("</style>")[1]
    assert not re.findall(r'(?:fill|stroke|color|style)="(?!width:)', body)
    light, dark = (re.findall(r"(--[\w-]+): #", part) for part in CSS.split("@media (prefers-color-scheme: dark)")[:2])
    assert light and set(light) == set(dark)
    assert {f"--{name}" for name in re.findall(r"var\(--([\w-]+)", CSS)} <= {*light, "--c"}


def test_a_table_wider_than_a_telephone_says_so() -> None:
    wide = Table("t", list("abcde"), [list("12345")])
    assert "more columns" in table_html(wide)
    assert "more columns" not in table_html(replace(wide, header=list("abcd"), rows=[list("1234")]))


def test_an_empty_report_is_a_page_too(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Report("Nothing ran"))
    page = Page((tmp_path / "r.html").read_text())
    assert "h2" not in [tag for tag, _ in page.tags]


def test_a_failure_leaves_the_old_report_alone(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    gif = Sample("v", [], {}, b"GIF89a")
    with pytest.raises(ValueError, match="embeds PNG and JPEG images, got bytes starting"):
        write_report(tmp_path / "report.html", Report("t", captions=[Group("g", "", [gif])]))
    with pytest.raises(ValueError, match=r"figures\.a\[1\] is a object, which has no JSON form"):
        write_report(tmp_path / "report.html", Report("t", figures={"a": [1, object()]}))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_plain_json() -> None:
    value = {"a": np.float32(0.5), 3: np.arange(2), "p": Path("x/y"), "s": {"b", "a"}, "i": Interval(0.0, float("inf"))}
    expected: dict[str, Any] = {
        "a": 0.5,
        "3": [0, 1],
        "p": "x/y",
        "s": ["a", "b"],
        "i": {"low": 0.0, "high": "Infinity"},
    }
    assert plain(value) == expected
    with pytest.raises(ValueError, match="figures.x is a bytes"):
        plain({"x": b"abc"})


@pytest.mark.parametrize(
    "values",
    [
        [(0.0, None)],
        [(5.0, None), (5.0, None)],
        [(1e-6, (0.0, 3e-6))],
        [(42.5, (39.0, 45.0)), (-3.0, (-9.0, 2.0))],
        [(1e9, None)],
    ],
)
def test_chart_positions_stay_inside(values: list[tuple[float, tuple[float, float] | None]]) -> None:
    rows = [("s", value, None if interval is None else Interval(*interval)) for value, interval in values]
    for zero in (False, True):
        text = chart_html(Chart("m", rows, zero))
        xs = [float(x) for x in re.findall(r'(?:x|x1|x2|cx)="([-\d.]+)"', text)]
        assert all(0 <= x <= 340 for x in xs)
        assert 1 <= text.count('class="grid"') + text.count('class="zero"') <= 6
        assert text.count('class="zero"') == zero


@pytest.mark.parametrize(
    ("steps", "values"),
    [
        ([1], [0.5]),
        ([1, 2, 3], [1.0, float("nan"), 2.0]),
        (range(1, 5001), range(5000)),
        ([7, 8], [3.0, 3.0]),
        ([], []),
    ],
)
@pytest.mark.parametrize("shared", [True, False])
def test_curves_stay_inside_and_small(steps: Sequence[float], values: Sequence[float], shared: bool) -> None:
    lines = {"chosen": straight(steps, values), "rejected": straight(steps, [-v for v in values])}
    text = curves_html(Curves("c", "", "", {"run": lines}, shared))
    Page(text)
    drawn = [
        tuple(map(float, point.split(",")))
        for found in re.findall(r'points="([^"]+)"', text)
        for point in found.split()
    ]
    assert all(0 <= x <= 340 for x, _ in drawn)
    assert all(0 <= y <= 210 for _, y in drawn)
    assert len(drawn) <= 4 * POINTS
    labels = re.findall(r'text-anchor="middle">([^<]*)<', text)
    assert all(label == "step" or label.isdigit() for label in labels)  # whole steps
    assert len(labels) >= 1 + bool(steps)


LETTER = 6.5  # how wide one of a label is at least


@pytest.mark.parametrize("values", [[-5.675, -5.75], [0.5, 1.0], [-12345.5, -12345.7], [1e-7, 2e-7]])
def test_labels_of_a_scale_have_room(values: list[float]) -> None:
    text = curves_html(Curves("c", "", "", {"run": {"chosen": straight([1, 2], values)}}, True))
    labels = re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="end">([^<]+)<', text)
    assert labels and all(float(x) >= LETTER * len(label) for x, label in labels)


def test_the_figure_beside_a_chart_stands_clear_of_its_mark() -> None:
    text = chart_html(Chart("c", [("a − b", 100.0, None), ("b", 0.0, None)], zero=True))
    dots = [float(x) for x in re.findall(r'cx="([\d.]+)"', text)]
    labels = re.findall(r'x="340" y="\d+" text-anchor="end">([^<]+)<', text)
    assert labels == ["+100.0", "+0.0"]
    assert all(dot + 5 < 340 - LETTER * len(label) for dot, label in zip(dots, labels))


def test_curves_say_which_line_is_which() -> None:
    lines = {"chosen": straight([1, 2], [1, 2]), "rejected": straight([1, 2], [2, 1])}
    text = curves_html(Curves("c", "", "", {"run": lines}, True))
    assert '<span class="side0">chosen</span><span class="side1">rejected</span>' in text
    assert text.count('class="bold side0"') == text.count('class="bold side1"') == 1


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 12.34, 245, 7620)] == ["0.0 s", "12.3 s", "4 min 05 s", "2 h 07 min"]
    assert "Wall time: 1 min 15 s" in stages_html({"a": 30, "b": 45})
