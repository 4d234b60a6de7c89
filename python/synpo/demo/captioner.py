"""The demo's captioner: a LLaVA-OneVision small enough to train from nothing, taught to see and then to say.

    rendered videos ─ decode ─→ views (kept on disk) ─→ sight: tower + projector ─→ speech: language model ─→ checkpoint

Sight: a linear probe on every visual token learns what lies in its cell of the frame (shape, colour, size, place), and
the tower and the projector with it. That is far quicker than learning to see through captions. Speech: tower and projector are
frozen and their features kept, and the language model learns to answer two questions about a view: what is in it, from
captions that are wrong as often as web captions (`language.distort`), and what a better caption than an earlier one would
be, from captions that are wrong less often. So the model sees more than it says at first: that is what preference learning
can bring out.

A view is the frames of a whole video or of one of its clips, or every third frame of those (contrastive decoding's amateur).
Shape legend: F frames, S frame side in pixels, G cells along a side, n visual tokens of a view, D width of the language model.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from synpo.demo.language import VOCABULARY, describe, distort
from synpo.demo.world import COLOURS, MOTIONS, SHAPES, SIZES, Facts, Scene, facts_of, path_of
from synpo.model.adapter import CaptionModel, pad_rows
from synpo.model.tiny import save, tiny_captioner, word_tokenizer
from synpo.model.vision import OneVision, Vision
from synpo.pipeline.clips import clip_count
from synpo.pipeline.retrospect import retrospective_prompt
from synpo.progress import Bar
from synpo.records import atomic_path, record_id
from synpo.video import FrameSampling, amateur_frames, read_frames

PLACE_WEIGHT = 8.0  # in the loss of sight: an error of an eighth of the frame counts as one nat of what is there
MOTION_WEIGHT = 0.5  # in the loss of speech, of its probe's


@dataclass(frozen=True)
class CaptionerConfig:
    """Size and schooling of the captioner. Error shares are of captions, for each habit of `language.HABITS`."""

    image_side: int = 48
    patch: int = 12
    vision_width: int = 96
    vision_layers: int = 3
    text_width: int = 128
    text_layers: int = 3
    sight_steps: int = 3000
    sight_batch: int = 32  # frames
    sight_rate: float = 3e-3
    speech_steps: int = 1000
    speech_batch: int = 32  # captions
    speech_rate: float = 3e-3
    clean_share: float = 0.6  # of the steps of speech, the first ones: captions are right
    web_errors: float = 0.6
    second_look_errors: float = 0.25
    second_looks: float = 0.3  # share of captions that answer the retrospective question
    amateur_views: float = 0.15  # share of captions of every third frame only


@dataclass(frozen=True)
class View:
    """What the model is shown: uint8 frames (F, 3, S, S) at `times` seconds of `scene`, and what is to be seen in them."""

    scene: Scene
    times: tuple[float, ...]
    frames: Tensor
    facts: Facts


def _stretches(scene: Scene) -> list[tuple[float, float]]:
    """The whole video and its clips, as the pipeline cuts them."""
    count = clip_count(scene.duration)
    edges = [scene.duration * i / count for i in range(count + 1)]
    return [(0.0, scene.duration), *zip(edges, edges[1:])]


def amateur_of(view: View) -> View:
    """Every third frame of a view: what contrastive decoding's amateur sees of it."""
    times = amateur_frames(torch.tensor(view.times, dtype=torch.float64)).tolist()
    return View(view.scene, tuple(times), amateur_frames(view.frames), view.facts)


def decode_views(scenes: Sequence[Scene], videos: Path, side: int, sampling: FrameSampling) -> list[list[View]]:
    """For every scene its views, the whole video first, decoded from its file and scaled to `side` pixels.

    What was decoded is kept in one safetensors file beside the videos and read from there the next time.
    """
    wanted = [[sampling.times(*stretch) for stretch in _stretches(scene)] for scene in scenes]
    kept = videos / f".views-{record_id([s.id for s in scenes], wanted, side)}.safetensors"
    if kept.exists():
        frames = load_file(kept)
    else:

        def decode(scene: Scene, times: Sequence[Sequence[float]]) -> Tensor:
            every = sorted({t for row in times for t in row})
            images = read_frames(videos / scene.video, every).float()
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)
            return images.round().byte()[[every.index(t) for row in times for t in row]]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = Bar(pool.map(decode, scenes, wanted), total=len(scenes), desc="decoding", unit="video")
            frames = {scene.id: images for images, scene in zip(decoded, scenes)}
        with atomic_path(kept) as temporary:
            save_file(frames, temporary)
    views = []
    for scene, times in zip(scenes, wanted):
        parts = frames[scene.id].split([len(row) for row in times])
        facts = [facts_of(scene, *stretch) for stretch in _stretches(scene)]
        views.append([View(scene, tuple(t), part, f) for t, part, f in zip(times, parts, facts)])
    return views


@dataclass(frozen=True)
class Cells:
    """What lies in each of G × G cells of frames.

    kind: (F, G·G, 4) int64 indices of shape, colour, size and motion; −100 is nothing. place: (F, G·G, 2) its centre.
    """

    kind: Tensor
    place: Tensor


def cells_of(view: View, side: int) -> Cells:
    """A cell holds the front one of the bodies whose centre it has, or is nearer to than half their radius."""
    times = np.array(view.times)
    kind = np.full((len(times), side, side, 4), -100)
    place = np.zeros((len(times), side, side, 2), np.float32)
    low = np.arange(side) / side
    for body in view.scene.bodies:
        centre, there = path_of(body, view.scene.duration, times)
        # distance from the centre to the cell, along each axis: (F, G)
        across, down = (np.maximum(low - c, c - low - 1 / side).clip(0) for c in (centre[:, :1], centre[:, 1:]))
        inside = there & (np.abs(centre - 0.5) < 0.5 + 0.4 * body.radius).all(axis=1)
        covered = np.hypot(across[:, None, :], down[:, :, None]) < 0.5 * body.radius
        own = (across == across.min(1, keepdims=True))[:, None, :] & (down == down.min(1, keepdims=True))[:, :, None]
        for frame in np.flatnonzero(inside):
            mine = covered[frame] | own[frame]
            kind[frame][mine] = (
                SHAPES.index(body.shape),
                COLOURS.index(body.colour_at(times[frame])),
                SIZES.index(body.size),
                MOTIONS.index(body.motion),
            )
            place[frame][mine] = centre[frame]
    return Cells(torch.from_numpy(kind).flatten(1, 2), torch.from_numpy(place).flatten(1, 2))


def _schedule(parameters: list[nn.Parameter], rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW, and a learning rate that rises for a tenth of the steps and then falls along a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)


def _step(loss: Tensor, parameters: list[nn.Parameter], optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def _seer(lm: CaptionModel) -> OneVision:
    if not isinstance(lm.vision, OneVision):
        raise ValueError(f"expected a LLaVA-OneVision captioner, got {type(lm.base).__name__}")
    return lm.vision


def learn_to_see(lm: CaptionModel, views: Sequence[View], settings: CaptionerConfig, seed: int) -> None:
    """Train tower and projector, in place, with a linear probe that names what lies in the cell of each visual token."""
    core = lm.base.model
    seer = _seer(lm)
    pixels = torch.cat([v.frames for v in views])  # (all frames, 3, S, S)
    cells = [cells_of(v, math.isqrt(seer.per_frame)) for v in views]
    kinds, places = torch.cat([c.kind for c in cells]), torch.cat([c.place for c in cells])  # (all frames, G·G, ·)
    sizes = [len(SHAPES), len(COLOURS), len(SIZES)]
    torch.manual_seed(seed)
    probe = nn.Linear(settings.text_width, 3 + sum(sizes)).to(lm.device)  # is something there, where, what
    parameters = [*core.vision_tower.parameters(), *core.multi_modal_projector.parameters(), *probe.parameters()]
    optimizer, schedule = _schedule(parameters, settings.sight_rate, settings.sight_steps)
    bar = Bar(range(settings.sight_steps), desc="learning to see", unit="step")
    for _ in bar:
        rows = torch.randint(len(pixels), (settings.sight_batch,))
        kind, place = (t[rows].flatten(0, 1).to(lm.device) for t in (kinds, places))  # (rows · G · G, ·)
        full = kind[:, 0] >= 0
        images = ((pixels[rows].float() / 255 - seer.mean) / seer.std).to(lm.device)
        features = core.get_video_features(images[None], return_dict=True).pooler_output[0]
        tokens = features[: len(kind)]  # (rows · G · G, D); newer releases of transformers append a newline
        there, where, *what = probe(tokens).split([1, 2, *sizes], dim=-1)
        loss = F.binary_cross_entropy_with_logits(there[:, 0], full.float())
        loss = loss + PLACE_WEIGHT * F.l1_loss(where[full], place[full])
        for column, logits in enumerate(what):
            loss = loss + F.cross_entropy(logits, kind[:, column])
        _step(loss, parameters, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


@dataclass(frozen=True)
class Glance:
    """A view that has been through the frozen tower.

    motions: (n,) int64, how the body in the cell of each visual token moves; −100 where there is none.
    """

    view: View
    vision: Vision
    motions: Tensor


Sights = Sequence[Sequence[tuple[Glance, Glance]]]
"""For every scene and every view of it: the view, and its amateur."""


def look(lm: CaptionModel, views: Sequence[Sequence[View]]) -> Sights:
    """Run the tower once over all views and their amateurs."""
    side = math.isqrt(_seer(lm).per_frame)
    flat = [v for row in views for view in row for v in (view, amateur_of(view))]
    visions: list[Vision] = []
    for start in Bar(range(0, len(flat), 64), desc="looking", unit="batch"):
        visions += lm.encode_vision([lm.prompt("", v.frames).vision for v in flat[start : start + 64]])
    motions = (
        F.pad(cells_of(v, side).kind[..., 3].flatten(), (0, 1), value=-100) for v in flat
    )  # the last is a newline
    glances = map(Glance, flat, visions, motions)
    return [[(next(glances), next(glances)) for _ in row] for row in views]


class Lesson(NamedTuple):
    """Token ids of a question (P,) and of its answer (T,), and what the question shows."""

    question: Tensor
    answer: Tensor
    shown: Glance


def draw_lesson(
    lm: CaptionModel, sights: Sights, prompt: str, settings: CaptionerConfig, rng: np.random.Generator, clean: bool
) -> Lesson:
    """A question and an answer about a random view: half of them about whole videos, half about clips.

    `clean`: the answer is true. An earlier caption that the question quotes is wrong as often as web captions even so.
    """
    row = sights[int(rng.integers(len(sights)))]
    both = row[0] if rng.random() < 0.5 else row[int(rng.integers(1, len(row)))]
    shown = both[int(rng.random() < settings.amateur_views)]
    question, errors, truth = prompt, settings.web_errors, shown.view.facts
    if rng.random() < settings.second_looks:
        question = retrospective_prompt(prompt, describe(distort(truth, rng, errors), rng))
        errors = settings.second_look_errors
    ids = lm.prompt(question, shown.view.frames, shown.vision).input_ids
    answer = describe(truth if clean else distort(truth, rng, errors), rng)
    return Lesson(ids, lm.completion(answer), shown)


def batches_of(
    draw: Callable[[], Lesson], size: int, rng: np.random.Generator, pool: int = 8
) -> Iterator[list[Lesson]]:
    """Batches of lessons of about equal length: `pool` batches are drawn together, sorted by length and dealt in random order."""
    while True:
        lessons = sorted((draw() for _ in range(pool * size)), key=lambda x: len(x.question) + len(x.answer))
        for start in rng.permutation(pool) * size:
            yield lessons[start : start + size]


def learn_to_say(lm: CaptionModel, sights: Sights, prompt: str, settings: CaptionerConfig, seed: int) -> None:
    """Train the language model and its head, in place, to answer questions; only answers count towards its loss.

    Captions say little about motion and say it late, so a second probe helps: from the visual tokens before the last layer
    it names how the body in their cell moves.
    """
    core = lm.base.model
    torch.manual_seed(seed)
    probe = nn.Linear(settings.text_width, len(MOTIONS)).to(lm.device)
    parameters = [*core.language_model.parameters(), *lm.base.lm_head.parameters(), *probe.parameters()]
    optimizer, schedule = _schedule(parameters, settings.speech_rate, settings.speech_steps)
    rng = np.random.default_rng((seed, 1))
    clean, web = (
        batches_of(lambda c=c: draw_lesson(lm, sights, prompt, settings, rng, c), settings.speech_batch, rng)  # type: ignore[misc]
        for c in (True, False)
    )
    bar = Bar(range(settings.speech_steps), desc="learning to say", unit="step")
    for step in bar:
        questions, answers, shown = zip(*next(clean if step < settings.clean_share * settings.speech_steps else web))
        ids, mask = pad_rows([torch.cat(qa) for qa in zip(questions, answers)], lm.pad_token_id)
        target = torch.full_like(ids, -100)  # what the hidden state at each place should predict
        for row, question, answer in zip(target, questions, answers):
            row[len(question) - 1 : len(question) + len(answer) - 1] = answer
        ids, mask, target = (t.to(lm.device) for t in (ids, mask, target))
        motions = torch.cat([g.motions for g in shown]).to(lm.device)
        inputs = lm.forward_kwargs(ids, mask, [g.vision for g in shown])
        states = core(**inputs, use_cache=False, output_hidden_states=True).hidden_states  # (B, L, D) after each layer
        said = F.cross_entropy(lm.base.lm_head(states[-1][target >= 0]), target[target >= 0])
        moved = F.cross_entropy(probe(states[-2][ids == _seer(lm).token_id]), motions)
        _step(said + MOTION_WEIGHT * moved, parameters, optimizer, schedule)
        bar.set_postfix(loss=f"{said.item():.2f}", motion=f"{moved.item():.2f}", refresh=False)


def build_captioner(prompt: str, settings: CaptionerConfig, seed: int, device: torch.device) -> CaptionModel:
    """An untrained captioner whose vocabulary is the world's language and the two questions."""
    tokenizer = word_tokenizer([VOCABULARY, retrospective_prompt(prompt, "")])
    model = tiny_captioner(
        tokenizer,
        vision_width=settings.vision_width,
        vision_layers=settings.vision_layers,
        vision_heads=4,
        patch=settings.patch,
        image_side=settings.image_side,
        text_width=settings.text_width,
        text_layers=settings.text_layers,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    for weight in model.model.language_model.parameters():
        if weight.dim() == 2:  # the usual deviation, 0.02, is for far wider models: here hardly anything would flow
            nn.init.normal_(weight, std=settings.text_width**-0.5, generator=generator)
    half = (0.5, 0.5, 0.5)
    vision = OneVision(model, tokenizer, mean=half, std=half)
    return CaptionModel(cast(nn.Module, model).to(device), tokenizer, vision)


def train_captioner(
    scenes: Sequence[Scene],
    videos: Path,
    output: Path,
    prompt: str,
    seed: int = 0,
    settings: CaptionerConfig | None = None,
    sampling: FrameSampling | None = None,
) -> Path:
    """Build a captioner, train it on rendered scenes and save it as a checkpoint folder that `load` takes.

    A killed run goes on after the last of its three parts that was finished (decoding, sight, speech); a finished one is
    returned as it is.

    Args:
        scenes: what to learn from; their files are in `videos`.
        output: the checkpoint folder, whole or absent.
        prompt: the question asked of every video and clip (`pairs.prompt` of a configuration).
        sampling: which frames of a view are seen, as later in the pipeline.

    Raises:
        VideoError: a scene's file is missing or broken.
    """
    settings, sampling = settings or CaptionerConfig(), sampling or FrameSampling()
    if output.exists():
        return output
    views = decode_views(scenes, videos, settings.image_side, sampling)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = build_captioner(prompt, settings, seed, device)
    key = record_id(asdict(settings), seed, [scene.id for scene in scenes], asdict(sampling))
    sight = output.with_name(f".{output.name}-sight-{key}.safetensors")
    if not sight.exists():
        learn_to_see(lm, [view for row in views for view in row], settings, seed)
        with atomic_path(sight) as temporary:
            save_file(_sight_weights(lm), temporary)
    lm.base.load_state_dict(load_file(sight), strict=False)
    learn_to_say(lm, look(lm, views), prompt, settings, seed)
    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    save(lm.base.cpu(), lm.tokenizer, unfinished)
    os.replace(unfinished, output)
    sight.unlink()
    return output


def _sight_weights(lm: CaptionModel) -> dict[str, Tensor]:
    parts = ("model.vision_tower.", "model.multi_modal_projector.")
    return {name: weight.contiguous() for name, weight in lm.base.state_dict().items() if name.startswith(parts)}
