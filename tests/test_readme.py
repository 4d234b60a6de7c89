"""What the README shows is true: its code runs, its configuration is accepted, its commands parse, its links lead somewhere."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from transformers import Gemma2Config, Gemma2ForCausalLM

from synpo.config import Config, build
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.pipeline.judge import make_judge
from synpo.train.run import settings
from synpo_kernels import OBJECTIVES
from synpo_kernels.reference import naive_synpo

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_code_runs():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=31, num_key_value_heads=2, final_logit_softcapping=0.5, **sizes)
    labels = torch.randint(31, (4, 5))
    labels[1, 3:] = -100
    names = {
        "model": Gemma2ForCausalLM(config),
        "ids": torch.randint(1, 31, (4, 5)),
        "mask": torch.ones(4, 5, dtype=torch.long),
        "labels": labels,
        "bounds": torch.tensor([0, 5, 8, 13, 18]),
    }
    code, own_objective, _ = blocks("python")
    padded = code.split("# packed rows")[0]
    exec(padded, names)
    loss = names["out"].loss.item()
    logits = names["model"](names["ids"]).logits
    assert loss == pytest.approx(
        naive_synpo(logits, torch.eye(31), labels).loss.item(), rel=1e-5
    )  # the soft cap is in it
    exec(code, names)
    assert names["out"].loss.item() == pytest.approx(loss)  # packed rows give what padded rows give
    assert names["logps"].shape == (18,)
    assert names["model"].get_input_embeddings().weight.grad is not None
    exec(own_objective, names)
    assert OBJECTIVES.pop("hinge").function is names["hinge"]
    chosen, rejected = names["logps"].detach().split([8, 10])
    gaps = [c.mean() - r.mean() for c, r in zip(chosen.split([5, 3]), rejected.split([5, 5]))]
    assert names["loss"].item() == pytest.approx(sum(max(0.0, 0.5 - gap.item()) for gap in gaps) / 2)


def test_the_trainer_trains(tmp_path):
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, tmp_path / "model")
    code = blocks("python")[2].replace("Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path / "model"))
    names = {"rows": [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "No."} for i in range(4)]}
    exec(code.replace("runs/synpo", str(tmp_path / "run")), names)
    assert names["trainer"].state.global_step == 5
    assert (tmp_path / "run" / "train_log.jsonl").exists()


def test_the_configuration_is_accepted(tmp_path):
    (text,) = blocks("yaml")
    config = build(Config, yaml.safe_load(text))
    assert settings(config, tmp_path).loss_type == "synpo"
    assert config.judge.key_env == "JUDGE_KEY"
    address = config.judge.base_url.replace("…", "api.example.com")
    assert make_judge(replace(config.judge, base_url=address), tmp_path).name == config.judge.model


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


FOLDERS = ("synpo_kernels", "python", "csrc", "bench", "examples", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize(
    "name", ["README.md", "python/synpo/README.md", "python/synpo/demo/README.md", "bench/FIGURES.md"]
)
def test_lines_fit_a_screen(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []


def test_every_chapter_is_in_the_contents():
    for name in ("README.md", "python/synpo/README.md"):
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        contents = text[text.index("Contents: ") :].split("\n\n")[0]
        chapters = re.findall(r"^## (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        assert len(chapters) == contents.count("](#") and len(chapters) > 5


def test_the_picture_is_whole_and_follows_light_and_dark():
    (said, name) = re.search(r"!\[([^]]+)\]\(([^)]+\.svg)\)", TEXT).groups()
    text = (ROOT / name).read_text(encoding="utf-8")
    picture = ElementTree.fromstring(text)
    assert picture.get("viewBox") and "prefers-color-scheme: dark" in text
    bright, dark = text.split("@media")
    classes = re.compile(r"\.(page|box|fuse|ink|soft|name|way|tip|rule)\b")
    assert set(classes.findall(bright)) == set(classes.findall(dark)) != set()
    assert all(word in said for word in ("clips", "judge", "pair", "SynPO", "eval", "kernels"))
    assert f"include LICENSE README.md {name} " in (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
