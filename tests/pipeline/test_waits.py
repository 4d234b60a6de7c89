"""Decoding reads nothing back from a device but which rows are finished, once in `check_every` passes, and asks little of it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from host_reads import HostReads
from passes import MAKES, VIEWS
from synpo.config import ContrastConfig, SamplingConfig
from synpo.model.adapter import CaptionModel
from synpo.pipeline import streams
from synpo.pipeline.decode import generate
from synpo_kernels.contrast import contrastive_sample

SAMPLED = SamplingConfig(temperature=0.8, top_k=16, top_p=0.9)
GREEDY = SamplingConfig(temperature=0.0, top_k=0, top_p=1.0)


def endless(lm: CaptionModel) -> CaptionModel:
    copy = CaptionModel(lm.model, lm.tokenizer, lm.vision)
    copy.eos_token_ids = (-1,)
    return copy


@pytest.mark.parametrize("contrast", [None, ContrastConfig(plausibility=0.1)], ids=["plain", "contrastive"])
@pytest.mark.parametrize(
    ("sampling", "guessing"),
    [(GREEDY, False), (SAMPLED, False), (replace(SAMPLED, repetition_penalty=1.2), False), (SAMPLED, True)],
    ids=["greedy", "sampled", "repetition penalty", "guessing"],
)
def test_a_token_is_written_without_waiting(
    sampling: SamplingConfig, guessing: bool, contrast: ContrastConfig | None, captioner: CaptionModel
) -> None:
    lm = endless(captioner)
    # three different prompts about two videos, one of them asked twice: shared and padded
    views = [torch.zeros(n, 3, 48, 48, dtype=torch.uint8) for n in (6, 9)]
    one, two = (lm.prompt("Describe.", v) for v in views)
    prompts = [one, one, two, replace(lm.prompt("What moves?", views[1]), vision=two.vision)]
    weak = [replace(lm.prompt("Describe.", v), vision=lm.prompt("", v).vision) for v in (views[0][::3], views[1][::3])]
    amateurs = [weak[0], weak[0], weak[1], weak[1]]

    def reads(limit: int) -> int:
        options: dict[str, Any] = {} if contrast is None else {"amateurs": amateurs, "contrast": contrast}
        if guessing:  # wrong, and never at an end: there is none
            options["drafts"] = [(5,) * 100] * 4
        with torch.no_grad(), HostReads() as seen:
            generate.__wrapped__(  # type: ignore[attr-defined]  # inference mode would hide the operators
                lm, prompts, replace(sampling, max_new_tokens=limit), keys=list("abcd"), check_every=8, **options
            )
        return len(seen.found)

    looks = 2  # between the 9th and the 25th token
    more = reads(25) - reads(9)
    assert looks <= more <= looks * (2 if guessing else 1), "with guesses, whether they were right is read too"


class Operators(TorchDispatchMode):
    """Names of the operators run inside it, views and new memory left out, while it is `awake`."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.awake = Counter[str](), True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        if self.awake and name.split("::")[1] not in VIEWS | MAKES:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("sampling", "contrast", "most"),
    [
        (SAMPLED, None, 12),
        (SAMPLED, ContrastConfig(plausibility=0.1), 13),
        (replace(SAMPLED, temperature=0.0), None, 12),
    ],
    ids=["plain", "contrastive", "greedy"],
)
def test_a_token_takes_few_operators_beside_the_model(
    sampling: SamplingConfig,
    contrast: ContrastConfig | None,
    most: int,
    captioner: CaptionModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is a launch: the draw, what is noted of it, whether it ended, and the next position."""
    lm, read, seen = endless(captioner), streams.forward, Operators()

    def forward(*args: Any, **options: Any) -> Any:
        seen.awake = False
        try:
            return read(*args, **options)
        finally:
            seen.awake = True

    monkeypatch.setattr(streams, "forward", forward)
    view = torch.zeros(6, 3, 48, 48, dtype=torch.uint8)
    prompts, weak = [lm.prompt("Describe.", view)] * 3, [lm.prompt("Describe.", view[::3])] * 3

    def operators(limit: int) -> Counter[str]:
        options: dict[str, Any] = {} if contrast is None else {"amateurs": weak, "contrast": contrast}
        seen.names.clear()
        with torch.no_grad(), seen:
            generate.__wrapped__(  # type: ignore[attr-defined]  # inference mode would hide the operators
                lm, prompts, replace(sampling, max_new_tokens=limit), keys=list("abc"), check_every=100, **options
            )
        return seen.names.copy()

    short, long = operators(9), operators(25)
    more = {name: (count - short[name]) / 16 for name, count in long.items() if count != short[name]}
    assert 8 <= sum(more.values()) <= most, more


def test_the_best_token_is_found_without_sorting() -> None:
    for top_p, sorts in ((0.9, True), (1.0, False)):
        with Operators() as seen:
            contrastive_sample(torch.randn(3, 50), None, temperature=0.0, top_p=top_p, backend="torch")
        assert ("aten::sort" in seen.names) is sorts
        assert not {"aten::_local_scalar_dense", "aten::nonzero"} & seen.names.keys()
