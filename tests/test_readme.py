"""What the README shows is true: its code runs, its configuration is accepted, its commands parse, its links lead somewhere."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from synpo.config import Config, build
from synpo.pipeline.judge import make_judge
from synpo.train.run import settings
from synpo_kernels import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_code_runs():
    torch.manual_seed(0)
    pairs, length, width, vocabulary = 2, 5, 8, 11
    hidden = torch.randn(2 * pairs, length, width, requires_grad=True)
    labels = torch.randint(vocabulary, (2 * pairs, length))
    labels[1, 3:] = -100
    rows = labels.flatten() != -100
    names = {
        "model": SimpleNamespace(lm_head=torch.nn.Linear(width, vocabulary, bias=False).requires_grad_(False)),
        "hidden": hidden,
        "labels": labels,
        "hidden_rows": hidden.flatten(0, 1)[rows],
        "label_rows": labels.flatten()[rows],
        "bounds": torch.tensor([0, 5, 8, 13, 18]),
    }
    code, own_objective = blocks("python")
    padded = code.split("# packed rows")[0]
    exec(padded, names)
    loss = names["out"].loss.item()
    exec(code, names)
    assert names["out"].loss.item() == pytest.approx(loss)  # packed rows give what padded rows give
    assert names["logps"].shape == (18,)
    assert hidden.grad is not None
    exec(own_objective, names)
    assert OBJECTIVES.pop("hinge").function is names["hinge"]
    chosen, rejected = names["logps"].detach().split([8, 10])
    gaps = [c.mean() - r.mean() for c, r in zip(chosen.split([5, 3]), rejected.split([5, 5]))]
    assert names["loss"].item() == pytest.approx(sum(max(0.0, 0.5 - gap.item()) for gap in gaps) / 2)


def test_the_configuration_is_accepted(tmp_path):
    (text,) = blocks("yaml")
    config = build(Config, yaml.safe_load(text))
    assert settings(config, tmp_path).loss_type == "synpo"
    assert config.judge.key_env == "JUDGE_KEY"
    address = config.judge.base_url.replace("…", "api.example.com")
    assert make_judge(replace(config.judge, base_url=address), tmp_path).name == config.judge.model


def test_the_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "synpo_kernels" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
