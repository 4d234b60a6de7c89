"""report.html of a training run: which pairs it shows, what it explains, and what it keeps to itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from synpo.config import Config
from synpo.records import Pair, write_jsonl
from synpo.train.show import NAMES, OBJECTIVES, show
from synpo_kernels import OBJECTIVES as LOSSES


def log_of(folder: Path) -> Path:
    values = ("chosen_logp", "rejected_logp", "grad_balance/chosen", "grad_balance/rejected")
    rows = [{"step": i, "rewards/accuracies": 0.5, **{f"synpo/{name}": -1.0 / i for name in values}} for i in (1, 2, 3)]
    write_jsonl(folder / "train_log.jsonl", rows)
    return folder / "train_log.jsonl"


def page_of(folder: Path, pairs: list[Pair], **train: Any) -> str:
    metrics = {
        "loss_type": train.get("loss_type", "synpo"),
        "pairs": len(pairs),
        "steps": 3,
        "seconds": 61.0,
        "trainable_parameters": 1234,
        "warnings": ["the sigmoid saturates"],
    }
    config = json.loads(json.dumps(asdict(Config(train=train))))
    return show(folder, log_of(folder), pairs, None, config, metrics).read_text()


def test_it_says_what_was_done_and_what_went_wrong(tmp_path: Path) -> None:
    page = page_of(tmp_path, [Pair("a", None, "Why?", "so", "no")], learning_rate=1e-5)
    assert "Training with SynPO" in page and "1 pair, 3 steps, 1 min 01 s; 1,234 parameters trained." in page
    assert "Warning: the sigmoid saturates" in page
    assert OBJECTIVES["synpo"] in page
    assert "learning_rate" in page and "1e-05" in page


def test_every_objective_is_named_and_explained() -> None:
    assert set(NAMES) == set(OBJECTIVES) == set(LOSSES)


def test_a_token_of_the_hub_stays_out_of_a_page_that_is_shown_around(tmp_path: Path) -> None:
    assert "hf_secret" not in page_of(tmp_path, [Pair("a", None, "?", "so", "no")], hub_token="hf_secret")


def test_the_widest_middle_and_narrowest_margins_are_shown(tmp_path: Path) -> None:
    pairs = [Pair(str(m), None, "?", f"chosen{m}", "x", float(m), 0.0) for m in (3, 9, 1, 7, 5)]
    page = page_of(tmp_path, pairs)
    assert [page.find(f"<mark>chosen{m}</mark>") > 0 for m in (9, 7, 5, 3, 1)] == [True, False, True, False, True]
    assert page.find("chosen9") < page.find("chosen5") < page.find("chosen1")
    assert "score 9.0" in page and "widest margin" in page


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (2, 2), (3, 3), (9, 3)])
def test_without_all_scores_the_first_middle_and_last_are_shown(count: int, shown: int, tmp_path: Path) -> None:
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which day?"}]
    pairs = [Pair(str(i), None, question, f"day{i}", "none", *([i, 0] if i == 1 else [])) for i in range(count)]
    page = page_of(tmp_path, pairs)
    assert page.count("<article") == shown == page.count("Which day?")
    assert (
        "the first, the middle one and the last" in page
        and "margin" not in page.split("</style>")[1].split("Preference pairs")[1]
    )
