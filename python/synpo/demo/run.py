"""`synpo demo`: the whole system on a small video world, from rendering to a report.

    scenes ─ render ─→ videos/{train,pairs,held-out} ─ SFT on noisy captions ─→ captioner
    captioner + videos/pairs ─ synpo pairs ─→ pairs.jsonl
    captioner + pairs ─ synpo train ─→ sft, dpo, synpo         the same start, pairs and number of steps
    base, sft, dpo, synpo on videos/held-out ─→ CIDEr, facts ─→ report.html, report.json

The stages are the functions behind `synpo pairs`, `synpo train` and `synpo eval`, with the settings of config.yaml in the output
folder: each can be run again by hand. Every stage resumes, so a killed demo goes on where it was.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from synpo import terminal
from synpo.config import Config, ConfigError, EvalConfig, LoraSection, ModelConfig, PairsConfig, SamplingConfig
from synpo.demo.captioner import CaptionerConfig, train_captioner
from synpo.demo.language import parse, references
from synpo.demo.render import render_all
from synpo.demo.show import show
from synpo.demo.world import Scene, facts_of, make_split
from synpo.evaluate.caption import caption_videos
from synpo.evaluate.run import EvalResult, FactSheet, evaluate
from synpo.folders import LOCK, own_folder
from synpo.model.adapter import load
from synpo.pipeline.run import build_pairs
from synpo.records import write_json, write_jsonl
from synpo.train.run import train

OBJECTIVES: dict[
    str, dict[str, Any]
] = {  # each at the rate of 1e-4, 3e-4, 1e-3, 3e-3 that did best on videos not used here
    "SFT": {"loss_type": "sft", "learning_rate": 1e-3},
    "DPO": {"loss_type": "dpo", "learning_rate": 3e-4},
    "SynPO": {"loss_type": "synpo", "learning_rate": 1e-3},
}
VIDEOS = {"train": 1200, "pairs": 400, "held-out": 150}  # split → videos at scale 1
REFERENCES = 5  # captions a held-out video
CANDIDATES, MARGIN = 8, 2.0  # the offline judge spreads less than the paper's, hence a margin below its 4
BATCH, MAX_NEW_TOKENS = 64, 64  # rows decoded together; no caption of this world is longer
LORA = LoraSection(r=32, alpha=64)
TRAIN = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
}


@dataclass(frozen=True)
class Plan:
    """What a demo of this seed and scale consists of. The same plan resumes; another needs another folder."""

    seed: int
    scale: float
    videos: dict[str, int]
    captioner: CaptionerConfig
    objectives: dict[str, dict[str, Any]]
    config: Config

    @classmethod
    def make(cls, output: Path, seed: int, scale: float) -> Plan:
        if not 0 < scale < math.inf:
            raise ConfigError(f"--scale takes a positive number, got {scale}")
        sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS)
        config = Config(
            seed=seed,
            model=ModelConfig(path=str(output / "captioner")),
            pairs=PairsConfig(
                margin=MARGIN,
                candidates=CANDIDATES,
                batch_size=BATCH,
                candidate_sampling=sampling,
                clip_sampling=replace(sampling, temperature=0.5, top_p=0.9),
            ),
            lora=LORA,
            train=TRAIN | OBJECTIVES["SynPO"],
            eval=EvalConfig(
                batch_size=BATCH,
                sampling=replace(sampling, temperature=0.0, top_k=0, top_p=1.0),
            ),
        )
        schooling = CaptionerConfig()
        schooling = replace(
            schooling,
            sight_steps=max(10, round(schooling.sight_steps * scale)),
            speech_steps=max(10, round(schooling.speech_steps * scale)),
        )
        videos = {name: max(4, round(count * scale)) for name, count in VIDEOS.items()}
        return cls(seed, scale, videos, schooling, OBJECTIVES, config)


@dataclass
class Clock:
    """Wall time of every stage, kept on disk, so that the report of a resumed run still tells what each took."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.seconds = json.loads(self.path.read_text(encoding="utf-8"))

    @contextmanager
    def stage(self, console: Console, name: str) -> Iterator[None]:
        """Time a stage. One that had been finished before keeps the longer time it took then."""
        console.rule(Text(name, "bold"), align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = max(time.perf_counter() - start, self.seconds.get(name, 0.0))
        write_json(self.path, self.seconds)


def _open(output: Path, plan: Plan, resume: bool) -> None:
    """Begin a demo in an empty folder, or check that it holds this very one. `resume` False empties a folder a demo made."""
    mark = output / "demo.json"
    wanted = json.loads(json.dumps(asdict(plan)))
    if there := [path for path in output.iterdir() if path.name != LOCK]:
        if not mark.exists():
            raise ConfigError(f"{output} is not empty and no demo made it; name another folder with --output")
        if not resume:
            for path in there:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        elif (held := json.loads(mark.read_text(encoding="utf-8"))) != wanted:
            raise ConfigError(
                f"{output} holds a demo of seed {held.get('seed')} and scale {held.get('scale')} or of another version, not of "
                f"seed {plan.seed} and scale {plan.scale}; name another --output, or start over with --no-resume"
            )
    write_json(mark, wanted)
    (output / "config.yaml").write_text(yaml.safe_dump(asdict(plan.config), sort_keys=False), encoding="utf-8")


def _pairs(plan: Plan, output: Path) -> None:
    """Preference pairs, unless the file is there: it is written last, and whole."""
    summary = output / "pairs-summary.json"
    if not summary.exists():
        result = build_pairs(plan.config, output / "videos" / "pairs", output / "pairs.jsonl")
        write_json(summary, asdict(result) | {"path": str(result.path)})


def _evaluate(
    plan: Plan, output: Path, scenes: list[Scene], told: dict[str, list[str]]
) -> tuple[EvalResult, dict[str, dict[str, str]]]:
    """Caption the held-out videos with all four captioners and score the captions against references and exact facts."""
    captions = {}
    for system in ("base", *OBJECTIVES):
        folder = system.lower()
        adapter = str(output / folder / "adapter") if system in OBJECTIVES else None
        config = replace(plan.config, model=replace(plan.config.model, adapter=adapter))
        found, problems = caption_videos(
            load(config.model),
            config,
            output / "videos" / "held-out",
            list(told),
            output / "captions" / f"{folder}.jsonl",
        )
        if problems:
            raise ConfigError(f"held-out videos cannot be read: {problems}; start over with --no-resume")
        captions[system] = {video: found[video] for video in told}
    sheet = FactSheet({scene.video: facts_of(scene) for scene in scenes}, parse)
    return evaluate(captions, told, sheet, seed=plan.seed, meteor=False), captions


def folder_of(seed: int, scale: float) -> Path:
    """Where a demo goes that was given no folder: each plan has its own, so that one bars no other."""
    parts = ["demo-out", *([f"seed-{seed}"] if seed else []), *([f"scale-{scale:g}"] if scale != 1 else [])]
    return Path("-".join(parts))


def demo(output: Path, seed: int = 0, scale: float = 1.0, resume: bool = True) -> Path:
    """Run the demo in `output` and return the path of its report.

    Args:
        seed: of everything random. scale: multiplies the numbers of videos and the steps of the captioner's
            schooling.
        resume: go on from what `output` holds (default), or start over.

    Raises:
        ConfigError: `output` holds something else. FolderInUse: another run writes to it.
    """
    plan = Plan.make(output, seed, scale)
    with own_folder(output, "--output"):
        _open(output, plan, resume)
        return _stages(output, plan)


def _stages(output: Path, plan: Plan) -> Path:
    """Everything from rendering to the report, whose path is returned."""
    console = terminal.console()
    clock = Clock(output / "seconds.json")
    scenes = {split: make_split(plan.seed, split, count) for split, count in plan.videos.items()}
    with clock.stage(console, "videos"):
        for split in VIDEOS:
            render_all(scenes[split], output / "videos" / split)
    with clock.stage(console, "captioner"):
        train_captioner(
            scenes["train"],
            output / "videos" / "train",
            output / "captioner",
            plan.config.pairs.prompt,
            seed=plan.seed,
            settings=plan.captioner,
            sampling=plan.config.frames,
        )
    with clock.stage(console, "pairs"):
        _pairs(plan, output)
    trained: dict[str, Any] = {}
    for name, settings in OBJECTIVES.items():
        with clock.stage(console, f"train {name}"):
            config = replace(plan.config, train=plan.config.train | settings)
            trained[name] = train(config, output / "videos" / "pairs", output / "pairs.jsonl", output / name.lower())
    told = {scene.video: references(facts_of(scene), REFERENCES, scene.seed) for scene in scenes["held-out"]}
    write_jsonl(output / "references.jsonl", ({"video": v, "captions": c} for v, c in told.items()))
    with clock.stage(console, "evaluation"):
        result, captions = _evaluate(plan, output, scenes["held-out"], told)
    return show(
        output,
        plan=asdict(plan),
        scenes=scenes,
        told=told,
        result=result,
        captions=captions,
        trained=trained,
        summary=json.loads((output / "pairs-summary.json").read_text(encoding="utf-8")),
        seconds=clock.seconds,
        console=console,
    )
