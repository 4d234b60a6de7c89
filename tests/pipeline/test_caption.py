from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from synpo.config import ContrastConfig, SamplingConfig
from synpo.model.adapter import CaptionModel, Prompt
from synpo.model.tiny import byte_tokenizer
from synpo.pipeline import caption, lookahead, reader
from synpo.pipeline.caption import describe
from synpo.pipeline.decode import generate
from synpo.pipeline.retrospect import INSTRUCTION, retrospective_prompt, second_looks, without_specials
from synpo.video import amateur_frames

SAMPLING = SamplingConfig(max_new_tokens=8)


def frames(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 48, 48), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_the_second_question_begins_like_the_first_and_carries_the_draft() -> None:
    text = retrospective_prompt("Describe the video.", "  a red circle moves.\n")
    assert text == f"Describe the video.\n{INSTRUCTION}\nEarlier description: a red circle moves."


def test_second_look_shares_the_video_and_takes_special_tokens_for_data(captioner: CaptionModel) -> None:
    view = frames(8, 0)
    shown = captioner.prompt("Describe.", view)
    (look,) = second_looks(captioner, [shown], [view], "Describe.", ["a <video> of <|end|><|assistant|> a circle"])
    assert look.vision is shown.vision
    video, end = captioner.tokenizer.convert_tokens_to_ids(["<video>", "<|end|>"])
    for token in (video, end):
        assert (look.input_ids == token).sum() == (shown.input_ids == token).sum()
    assert "a   of    a circle" in captioner.text(look.input_ids)


def test_words_that_were_added_to_a_vocabulary_stay_in_a_draft() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["circle", "<tool_call>", "\n\n"])
    tokenizer.add_tokens(["TURN"], special_tokens=True)
    assert without_specials(tokenizer, "a circle\n\nTURN <tool_call>moves<|end|>") == "a circle\n\n   moves "


def test_second_questions_need_no_pixels_and_are_those_of_the_chat_template(
    captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = [frames(8, 0), frames(11, 1)]
    shown = [captioner.prompt("Describe.", v) for v in views]
    drafts = ["a red circle", "  something: else,\nentirely "]
    expected = [captioner.prompt(retrospective_prompt("Describe.", d), v) for d, v in zip(drafts, views)]
    looks = second_looks(captioner, shown, views, "Describe.", drafts)
    assert [look.input_ids.tolist() for look in looks] == [p.input_ids.tolist() for p in expected]

    hidden = [Prompt(p.input_ids + 0, p.vision) for p in shown]
    hidden[0].input_ids[-1] += 1  # a first question that the template does not give: ask in full
    assert [look.input_ids.tolist() for look in second_looks(captioner, hidden, views, "Describe.", drafts)] == [
        p.input_ids.tolist() for p in expected
    ]
    assert second_looks(captioner, [], [], "Describe.", []) == []
    monkeypatch.setattr(captioner.vision, "prepare", None)
    second_looks(captioner, shown, views, "Describe.", drafts)


def test_what_is_kept_of_videos_goes_with_the_batch(captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    remember = reader._remember

    def watched(*args: Any) -> Any:
        kept = remember(*args)
        alive.append(weakref.ref(kept))
        return kept

    monkeypatch.setattr(reader, "_remember", watched)
    monkeypatch.setitem(lookahead.TOKENS_A_PASS, "cuda", 32)  # a GPU would not bother for two rows
    describe(captioner, [frames(8, 1)], [["a", "b"]], "Describe.", SAMPLING, contrast=ContrastConfig())
    assert len(alive) == 4, "expert and amateur: the question, then the question with the instruction"
    assert all(ref() is None for ref in alive)
    held: list[bool] = []
    generate = caption.generate
    monkeypatch.setattr(
        caption,
        "generate",
        lambda *a, **k: (generate(*a, **k), held.append(k["readers"][0]._prefixes is not None))[0],
    )
    describe(captioner, [frames(8, 1)], [["a", "b"]], "Describe.", SAMPLING, refinements=2)
    assert held == [True, True, False], "what no later look needs is let go while the last is written"


@pytest.mark.parametrize("contrast", [None, ContrastConfig(plausibility=0.1)])
def test_describe_is_a_draft_and_a_second_look(captioner: CaptionModel, contrast: ContrastConfig | None) -> None:
    views = [frames(8, 1), frames(12, 2)]
    keys = [["a", "b", "c"], ["d"]]
    rows = describe(captioner, views, keys, "Describe.", SAMPLING, contrast=contrast)
    assert [len(r) for r in rows] == [3, 1]

    # the same by hand, one sample at a time
    for view, names, row in zip(views, keys, rows):
        for name, got in zip(names, row):
            expert, weak = captioner.prompt("Describe.", view), captioner.prompt("Describe.", amateur_frames(view))
            amateurs = [weak] if contrast else None
            (draft,) = generate(captioner, [expert], SAMPLING, keys=[name], amateurs=amateurs, contrast=contrast)
            looks = [
                captioner.prompt(retrospective_prompt("Describe.", draft.text), v) for v in (view, amateur_frames(view))
            ]
            (final,) = generate(
                captioner, looks[:1], SAMPLING, keys=[f"{name} look 1"],
                amateurs=looks[1:] if contrast else None, contrast=contrast,
            )  # fmt: skip
            assert (got.draft, got.text, got.finished) == (draft.text, final.text, final.finished)
            assert got.logp == pytest.approx(final.logp, abs=1e-4)


def test_the_vision_tower_runs_once_for_drafts_and_second_looks(captioner: CaptionModel) -> None:
    calls: list[torch.Size] = []
    hook = captioner.model.model.vision_tower.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append((args[0] if args else kwargs["pixel_values"]).shape),
        with_kwargs=True,
    )
    describe(captioner, [frames(8, 1), frames(8, 2)], [["a", "b"], ["c", "d"]], "Describe.", SAMPLING, refinements=2)
    hook.remove()
    assert [c[0] for c in calls] == [16], "both videos of eight frames, once"


def test_without_refinement_the_draft_is_the_text(captioner: CaptionModel) -> None:
    ((row,),) = describe(captioner, [frames(8, 1)], [["a"]], "Describe.", SAMPLING, refinements=0)
    assert row.text == row.draft
