"""Decoding: what a second stream and a second look cost, beside the usual ways of writing the same tokens.

    python -m bench.decode [--model PATH [--videos DIR]] [--device cuda] [--rows 1 8 64] [--tokens 48] [--json FILE]

Streams, milliseconds a token of the whole batch (time of a long answer less that of a two-token one: the prompt is left out):
    plain         our decoder, one stream
    contrastive   the same with an amateur: two streams in one batch, one fused op
    two loops     expert and amateur each with a cache and a pass of its own, mixed and sampled by the usual torch ops
    hf generate   Hugging Face generate with its logits processors, one stream
    hf guidance   Hugging Face generate with UnbatchedClassifierFreeGuidanceLogitsProcessor; text alone: it passes no video on
Second looks, milliseconds of a whole batch, vision tower included: drafts alone, drafts and second looks, and their ratio;
`before` is the second look as a question of its own, which shares only the features of the frames.

The model is a small LLaVA-OneVision built from a configuration and shown noise, or the one given (the demo's captioner is in its
folder `captioner`) and shown scenes of the demo's world or the videos given; `long` has 2,500 visual tokens and answers of 100. A
random model never repeats its draft: what guessing ahead gives shows only with a trained one.
A time is printed only after greedy tokens agreed, and as soon as it is there. How times are taken: bench/measure.py. Medians,
[20th, 80th percentile]. Memory is the peak of one run above what was held before it. The file is written anew after every row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from bench import measure  # before torch

import torch  # isort: skip
from torch import Tensor  # isort: skip
from transformers import DynamicCache
from transformers.utils import logging as hf_logging

from bench.contrast import draw, nucleus
from bench.report import reason_of
from synpo.config import ContrastConfig, ModelConfig, SamplingConfig
from synpo.demo.render import frames_of
from synpo.demo.world import FPS, make_split
from synpo.model.adapter import CaptionModel, Prompt, load, pad_rows
from synpo.model.tiny import tiny_captioner, tiny_text_model, word_tokenizer
from synpo.model.vision import OneVision
from synpo.pipeline.caption import describe
from synpo.pipeline.decode import generate
from synpo.pipeline.retrospect import retrospective_prompt, second_looks
from synpo.video import FrameSampling, amateur_frames, list_videos, probe, read_frames

SAMPLED = SamplingConfig(temperature=0.9, top_k=32, top_p=0.95)
GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)
CONTRAST = ContrastConfig()
QUESTION = "Describe the video in detail."
STORY = "A long story of a small red circle that moves from left to right, and of what happened to it on the way. "
Run = Callable[[], Any]


def small(side: int, width: int, layers: int, device: torch.device) -> CaptionModel:
    """A random LLaVA-OneVision with a vocabulary of 8,000: ⌈side / 24⌉² visual tokens a frame."""
    words = " ".join(f"w{i}" for i in range(8000))
    tokenizer = word_tokenizer([QUESTION, retrospective_prompt(QUESTION, ""), STORY, words])
    model = tiny_captioner(
        tokenizer, image_side=side, vision_width=96, text_width=width, text_layers=layers, text_heads=width // 32
    )
    generator = torch.Generator().manual_seed(0)
    for weight in model.model.language_model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=width**-0.5, generator=generator)
    half = (0.5, 0.5, 0.5)
    vision = OneVision(model, tokenizer, half, half)
    return CaptionModel(cast(torch.nn.Module, model).to(device), tokenizer, vision)


def endless(lm: CaptionModel) -> CaptionModel:
    """The same model, none of whose tokens ends an answer."""
    copy = CaptionModel(lm.model, lm.tokenizer, lm.vision)
    copy.eos_token_ids = (-1,)
    copy.model.generation_config.eos_token_id = None
    return copy


def noise(count: int, frames: int, side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (frames, 3, side, side), generator=generator).to(torch.uint8) for _ in range(count)]


def scenes(count: int) -> list[Tensor]:
    """Frames (F, 3, S, S) of videos of the demo's world that its captioner has not learned from, as they are before encoding."""
    views = []
    for scene in make_split(0, "held-out", count):
        frames = torch.from_numpy(frames_of(scene)).permute(0, 3, 1, 2)
        at = [min(len(frames) - 1, round(t * FPS)) for t in FrameSampling().times(0.0, scene.duration)]
        views.append(frames[at].contiguous())
    return views


def shown(lm: CaptionModel, views: Sequence[Tensor]) -> list[Prompt]:
    """The question about every view, through the vision tower."""
    prompts = [lm.prompt(QUESTION, view) for view in views]
    return [replace(p, vision=v) for p, v in zip(prompts, lm.encode_vision([p.vision for p in prompts]))]


def inputs_of(lm: CaptionModel, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    ids, mask = pad_rows([p.input_ids for p in prompts], lm.pad_token_id, side="left")
    return lm.forward_kwargs(ids.to(lm.device), mask.to(lm.device), [p.vision for p in prompts])


@torch.inference_mode()
def two_loops(
    lm: CaptionModel, experts: Sequence[Prompt], amateurs: Sequence[Prompt], sampling: SamplingConfig, length: int
) -> Tensor:
    """Tokens (R, T) from two plain loops side by side."""
    streams: list[dict[str, Any]] = []
    for prompts in (experts, amateurs):
        inputs = inputs_of(lm, prompts)
        mask, position = inputs["attention_mask"], inputs["position_ids"].amax(-1, keepdim=True)
        streams.append({"cache": DynamicCache(config=lm.base.config), "mask": mask, "position": position})
        out = lm.model(**inputs, past_key_values=streams[-1]["cache"], use_cache=True, logits_to_keep=1)
        streams[-1]["logits"] = out.logits[:, -1]
    generator, written = torch.Generator(lm.device).manual_seed(0), []
    for step in range(length):
        mixed = (1 + CONTRAST.alpha) * streams[0]["logits"] - CONTRAST.alpha * streams[1]["logits"]
        if sampling.temperature == 0:
            token = mixed.argmax(-1)
        else:
            probs = torch.softmax(mixed / sampling.temperature, -1)
            kept, ids = probs.topk(min(sampling.top_k, probs.shape[1]), -1)
            kept = nucleus(kept / kept.sum(-1, keepdim=True))
            uniform = torch.rand(len(kept), generator=generator, device=lm.device)
            token = draw(kept / kept.sum(-1, keepdim=True), ids, uniform)
        written.append(token)
        if step + 1 == length:
            break
        for s in streams:
            s["mask"] = torch.cat([s["mask"], s["mask"].new_ones(len(token), 1)], 1)
            s["position"] = s["position"] + 1
            out = lm.model(
                input_ids=token[:, None], attention_mask=s["mask"], position_ids=s["position"],
                past_key_values=s["cache"], use_cache=True,
            )  # fmt: skip
            s["logits"] = out.logits[:, -1]
    return torch.stack(written, 1)


@torch.inference_mode()
def hf_generate(
    lm: CaptionModel, prompts: Sequence[Prompt], sampling: SamplingConfig, length: int, amateurs: Sequence[Prompt] = ()
) -> Tensor:
    """Tokens (R, T) from Hugging Face generate; with amateurs, guided away from them."""
    inputs = inputs_of(lm, prompts)
    inputs.pop("position_ids")
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    if amateurs:
        negative, mask = pad_rows([p.input_ids for p in amateurs], lm.pad_token_id, side="left")
        options |= {
            "guidance_scale": 1 + CONTRAST.alpha,
            "negative_prompt_ids": negative.to(lm.device),
            "negative_prompt_attention_mask": mask.to(lm.device),
        }
    out = lm.base.generate(**inputs, **options, max_new_tokens=length, pad_token_id=lm.pad_token_id)
    return out[:, -length:]


def ours(
    lm: CaptionModel,
    prompts: Sequence[Prompt],
    amateurs: Sequence[Prompt] | None,
    sampling: SamplingConfig,
    length: int,
) -> Tensor:
    answers = generate(
        lm, prompts, replace(sampling, max_new_tokens=length), keys=[str(i) for i in range(len(prompts))],
        amateurs=amateurs, contrast=None if amateurs is None else CONTRAST,
    )  # fmt: skip
    return torch.tensor([a.tokens for a in answers])


def streams(
    lm: CaptionModel, text: CaptionModel, views: Sequence[Tensor], rows: int
) -> dict[str, Callable[..., Tensor]]:
    """Every way of writing, as a function of sampling and length."""
    lm, text = endless(lm), endless(text)
    experts, amateurs = shown(lm, views), shown(lm, [amateur_frames(v) for v in views])
    e, a = ([p[i * len(p) // rows] for i in range(rows)] for p in (experts, amateurs))  # as candidates come: by video
    te = [text.prompt(STORY * 4 + f"w{i}") for i in range(rows)]
    ta = [text.prompt(STORY + f"w{i}") for i in range(rows)]
    return {
        "plain": lambda s, n: ours(lm, e, None, s, n),
        "contrastive": lambda s, n: ours(lm, e, a, s, n),
        "two loops": lambda s, n: two_loops(lm, e, a, s, n),
        "hf generate": lambda s, n: hf_generate(lm, e, s, n),
        "text plain": lambda s, n: ours(text, te, None, s, n),
        "text contrastive": lambda s, n: ours(text, te, ta, s, n),
        "text hf guidance": lambda s, n: hf_generate(text, te, s, n, ta),
    }


# In the order in which they are shown, the first two at once: a peer, and ours that must write the same.
AGREE = (("hf generate", "plain"), ("two loops", "contrastive"), ("text hf guidance", "text contrastive"))


class Disagreement(RuntimeError):
    """Two ways wrote different tokens: neither gets a time."""


def check(runs: dict[str, Callable[..., Tensor]], peer: str, own: str) -> str | None:
    """Greedy tokens of a peer are ours: rounding may part one row in fifty. Why it failed, where it did."""
    expected = runs[own](GREEDY, 8)
    try:
        found = runs[peer](GREEDY, 8).cpu()
    except Exception as error:  # whatever another package raises is its reason
        return reason_of(error)
    differ = int((found != expected).any(1).sum())
    if differ > len(found) / 50:
        raise Disagreement(f"{peer} and {own} disagree in {differ} of {len(found)} rows")
    return None


def stream_table(
    lm: CaptionModel, views: Sequence[Tensor], rows: int, length: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for each way, printed and handed over when it is measured: in turn with the plain way of its model."""
    text = CaptionModel(tiny_text_model(lm.tokenizer, width=128, layers=3).to(lm.device), lm.tokenizer, None)
    runs = streams(lm, text, views, rows)
    print(
        f"\n{rows} rows, {length} tokens each\n{'':18}{'ms/token':>10}{'/ plain':>9}{'whole answer, ms':>32}{'runs':>6}"
        f"{'peak MiB':>10}",
        flush=True,
    )

    def timed(name: str) -> dict[str, Any]:
        base = "text plain" if name.startswith("text") else "plain"
        turns: dict[str, Run] = {}
        for way in dict.fromkeys((name, base)):
            turns[way] = partial(runs[way], SAMPLED, length)
            turns[way + " 2"] = partial(runs[way], SAMPLED, 2)
            turns[way + " 2"]()
        title = f"{rows} rows, {name}"
        took = measure.interleave(turns, device=lm.device, seconds=seconds / len(runs), least=3, most=50, title=title)
        token, plain = ((took[way].p50 - took[way + " 2"].p50) / (length - 2) for way in (name, base))
        ratio = token / plain if plain > 0 else None  # too few runs can show no time for a token
        peak, whole = measure.peak_bytes(turns[name], lm.device), took[name]
        times = "-" if ratio is None else f"{ratio:.2f}"
        mib = "-" if peak is None else f"{peak / 2**20:.1f}"
        print(
            f"{name:18}{token:10.3f}{times:>9}{whole.p50:12.1f} [{whole.p20:8.1f} {whole.p80:8.1f}]{whole.runs:6d}{mib:>10}",
            flush=True,
        )
        return {
            "rows": rows,
            "way": name,
            "ms_a_token": token,
            "to_plain": ratio,
            "peak": peak,
            **asdict(whole),
        }

    for peer, own in AGREE:
        try:
            reason = check(runs, peer, own)
        except Disagreement as found:
            print(f"{found}: no times are printed", flush=True)
            yield {"rows": rows, "way": peer, "reason": str(found)}
            continue
        if own == "text contrastive":
            yield timed("text plain")
        yield timed(own)
        if reason is None:
            yield timed(peer)
        else:
            print(f"{peer:18} failed: {reason}", flush=True)
            yield {"rows": rows, "way": peer, "reason": reason}


def before(
    lm: CaptionModel, views: Sequence[Tensor], keys: list[list[str]], sampling: SamplingConfig, contrast: Any
) -> None:
    """Drafts and second looks as two questions that know nothing of each other but the features of the frames."""
    at = [i for i, row in enumerate(keys) for _ in row]
    names = [key for row in keys for key in row]
    sides = [(shown(lm, v), v) for v in ([views, [amateur_frames(x) for x in views]] if contrast else [views])]
    asked = [[prompts[i] for i in at] for prompts, _ in sides]
    answers = generate(lm, asked[0], sampling, keys=names, amateurs=asked[1] if contrast else None, contrast=contrast)
    drafts = [a.text for a in answers]
    asked = [second_looks(lm, p, [v[i] for i in at], QUESTION, drafts) for p, (_, v) in zip(asked, sides)]
    names = [f"{n} look 1" for n in names]
    generate(lm, asked[0], sampling, keys=names, amateurs=asked[1] if contrast else None, contrast=contrast)


def look_table(
    title: str, lm: CaptionModel, views: Sequence[Tensor], answers: int, length: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """Three rows for plain decoding, then three for contrastive, each three timed in turn."""
    sampling = replace(SAMPLED, max_new_tokens=length)
    keys = [[f"{i} {j}" for j in range(answers)] for i in range(len(views))]
    length_of = len(lm.prompt(QUESTION, views[0]).input_ids)
    print(
        f"\n{title}: {len(views)} videos, {answers} answers each, prompt {length_of} tokens, at most {length} a text",
        flush=True,
    )
    for contrast in (None, CONTRAST):
        kind = "contrastive" if contrast else "plain"
        draft = partial(describe, lm, views, keys, QUESTION, sampling, contrast=contrast)
        timed: dict[str, Run] = {
            f"{kind} draft": partial(draft, refinements=0),
            f"{kind} draft, look": partial(draft, refinements=1),
            f"{kind} before": partial(before, lm, views, keys, sampling, contrast),
        }
        for run in timed.values():
            run()
        took = measure.interleave(timed, device=lm.device, seconds=seconds / 2, least=2, most=30, title=title)
        for name, t in took.items():
            ratio = t.p50 / took[f"{kind} draft"].p50
            peak = measure.peak_bytes(timed[name], lm.device)
            print(
                f"{name:24}{t.p50:10.1f} ms [{t.p20:8.1f} {t.p80:8.1f}]{ratio:8.2f} x draft{t.runs:5d} runs"
                f"{'-' if peak is None else format(peak / 2**20, '.1f'):>10} MiB",
                flush=True,
            )
            yield {"case": title, "answers": answers, "what": name, "ratio": ratio, "peak": peak, **asdict(t)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder of a video model (default: small, random)")
    parser.add_argument(
        "--videos",
        type=Path,
        help="folder whose first videos are shown (scenes of the demo; noise without --model)",
    )
    parser.add_argument("--views", type=int, default=8, help="how many videos are shown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument(
        "--answers", nargs="+", type=int, default=[1, 8], help="for each video, in the table of second looks"
    )
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="for each table; the case `long` takes what it needs"
    )
    parser.add_argument("--skip-long", action="store_true")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    hf_logging.set_verbosity_error()
    device = torch.device(args.device)
    where = measure.machine(device) | {"model": args.model or "random"}
    for key, value in where.items():
        print(f"{key:20} {value}")
    lm = load(ModelConfig(path=args.model, device=args.device)) if args.model else small(96, 128, 3, device)
    ends = lm.base.generation_config.eos_token_id
    views = scenes(args.views) if args.model else noise(args.views, 8, 96)
    if args.videos:
        paths = [args.videos / name for name in list_videos(args.videos)[: args.views]]
        views = [read_frames(p, FrameSampling().times(0.0, probe(p).duration)) for p in paths]
    table: list[dict[str, Any]] = []

    def note(rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            table.append(row)
            if args.json:
                args.json.write_text(json.dumps({"machine": where, "rows": table}, indent=1))

    for rows in args.rows:
        note(stream_table(lm, views, rows, args.tokens, args.seconds))
    lm.base.generation_config.eos_token_id = ends
    for answers in args.answers:
        note(look_table("short", lm, views, answers, args.tokens, args.seconds))
    if not args.skip_long:
        long = small(336, 512, 3, device)  # 13 frames of 14 x 14 visual tokens
        for answers in (2, 8):
            note(look_table("long", long, noise(1, 13, 336), answers, 100, args.seconds))
    return int(any("disagree" in row.get("reason", "") for row in table))


if __name__ == "__main__":
    sys.exit(main())
