"""Prefix sharing against separate sequences: the same loss and the same gradients, or a stated reason not to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import varlen

from host_reads import HostReads
from runs_of_torch import Runs, attend
from synpo.config import ConfigError
from synpo.data.collate import PairCollator
from synpo.data.features import VisionCache
from synpo.data.tokenize import EncodedPair
from synpo.model import packing
from synpo.model.adapter import CaptionModel
from synpo.model.meant import meant_for
from synpo.model.tiny import byte_tokenizer
from synpo.model.vision import MODALITIES
from synpo.train.objective import PairObjective
from synpo.train.sharing import collator_for, why_not

TEXT_FAMILIES = ("llama", "qwen2", "qwen3")
VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
ANSWERS = [
    ("A red circle moves.", "No."),
    ("It turns blue, then green.", "A dog and a cat, one of each."),
    ("B.", "A."),
]


def pairs_of(lm: CaptionModel) -> list[EncodedPair]:
    """Three pairs of unequal prompts and answers; with two videos of unequal length where the model sees."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for i, answers in enumerate(ANSWERS):
        frames = None
        if lm.sees_video and i < 2:
            frames = torch.randint(0, 256, (2 + 2 * i, 3, 48, 48), dtype=torch.uint8, generator=generator)
        prompt = lm.prompt("Describe the video. " * (i + 1), frames)
        pairs.append(EncodedPair(f"pair-{i}", prompt.input_ids, *map(lm.completion, answers), prompt.vision))
    return pairs


def losses_and_gradients(
    lm: CaptionModel, pairs: list[EncodedPair], prefix_sharing: bool, loss_type: str = "synpo"
) -> tuple[Tensor, dict[str, Tensor]]:
    lm.model.zero_grad()
    batch = PairCollator(lm.pad_token_id, prefix_sharing)(pairs)
    outcome = PairObjective(lm, loss_type, {})(lm.model, batch)
    outcome.loss.backward()
    found = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    return outcome.loss.detach(), found


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert float((found[0] - expected[0]).abs() / expected[0].abs()) <= 1e-5
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.norm()) for g in expected[1].values())
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm())
        # gradients that cancel to nothing (a key's bias) have no digits of their own
        assert error <= 1e-5 * max(float(gradient.norm()), 1e-2 * largest), f"{name}: {error / float(gradient.norm())}"


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *VIDEO_FAMILIES])
def test_loss_and_every_gradient_are_those_of_separate_sequences(family: str, family_lm: Any) -> None:
    lm = family_lm(family)
    pairs = pairs_of(lm)
    packed = losses_and_gradients(lm, pairs, True)
    separate = losses_and_gradients(lm, pairs, False)
    assert_same(packed, separate)
    assert len(separate[1]) > 15
    alone = [losses_and_gradients(lm, [pair], False) for pair in pairs]  # nor do pairs see one another
    mean = {name: sum(g[name] for _, g in alone) / len(alone) for name in alone[0][1]}
    assert_same(packed, (torch.stack([loss for loss, _ in alone]).mean(), mean))


@pytest.mark.parametrize("family", [*TEXT_FAMILIES, *VIDEO_FAMILIES])
def test_the_check_lets_them_pass(family: str, family_lm: Any) -> None:
    assert why_not(family_lm(family)) is None


@pytest.mark.parametrize("loss_type", ["dpo", "simpo"])
def test_with_an_adapter_and_its_reference(loss_type: str, captioner: CaptionModel) -> None:
    pairs = pairs_of(captioner)
    packed = losses_and_gradients(captioner, pairs, True, loss_type)
    assert_same(packed, losses_and_gradients(captioner, pairs, False, loss_type))
    assert all("lora" in name for name in packed[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, family_lm: Any) -> None:
    lm = family_lm("qwen2_vl")
    pairs = pairs_of(lm)
    expected = losses_and_gradients(lm, pairs, False)
    attended = []
    lm.base.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_: attended.append(1))
    lm.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        lm.model.enable_input_require_grads()
    lm.model.train()
    assert_same(losses_and_gradients(lm, pairs, True), expected)
    assert len(attended) == 2  # forward, and again in backward


def test_where_memory_is_scarce_the_prompt_is_held_once(
    text_lm: CaptionModel, family_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "AGAIN", {"cpu"})
    seeing = family_lm("qwen2_vl")
    pairs = pairs_of(seeing)
    assert_same(losses_and_gradients(seeing, pairs, True), losses_and_gradients(seeing, pairs, False))
    lm = text_lm
    pair = EncodedPair("pair", torch.arange(5, 128), torch.arange(5, 34), torch.arange(5, 46), None)
    held = []
    batch = PairCollator(lm.pad_token_id, True)([pair])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(tuple(x.shape)) or x, lambda x: x):
        PairObjective(lm, "synpo", {})(lm.model, batch)
    assert any(123 + 29 in shape for shape in held)  # prompt and chosen attend to themselves
    assert not any(123 + 41 in shape for shape in held)  # prompt and rejected: put together again in the backward pass


def test_bf16_is_as_close_to_fp32_packed_as_separate(family_lm: Any) -> None:
    lm = family_lm("llama")
    pairs = pairs_of(lm)
    exact = losses_and_gradients(lm, pairs, False)[0]
    lm.model.bfloat16()
    assert why_not(lm) is None
    packed, separate = (losses_and_gradients(lm, pairs, sharing)[0] for sharing in (True, False))
    assert abs(packed - exact) <= 2 * abs(separate - exact) + 2e-3


def test_other_masks_are_attended_to_as_before(family_lm: Any) -> None:
    lm = family_lm("llama")
    ids, mask = torch.randint(5, 200, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    packing.install("sdpa")
    causal = torch.ones(9, 9).tril().bool() & mask[:, None, None].bool() | torch.eye(9).bool()
    results = []
    for name, given in (("sdpa", mask), ("sdpa", causal), ("eager", mask)):
        lm.model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(lm.model(input_ids=ids, attention_mask=given).logits[mask.bool()])
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], results[2], rtol=1e-4, atol=1e-5)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """torch's kernel for runs of unequal length, made of torch, where packed rows take it for their own."""
    kernel = Runs()
    monkeypatch.setattr(packing, "one_call", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    return kernel


@pytest.mark.parametrize("family", ["llama", "qwen3", "llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_one_call_a_layer_for_all_pairs(family: str, family_lm: Any, runs: Runs) -> None:
    lm = family_lm(family)
    pairs = pairs_of(lm)
    separate = losses_and_gradients(lm, pairs, False)
    assert runs.calls == 0
    packed = losses_and_gradients(lm, pairs, True)
    layers = lm.base.config.get_text_config().num_hidden_layers
    assert runs.calls == layers
    assert_same(packed, separate)
    assert why_not(lm) is None
    lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    lm.model.train()
    assert_same(losses_and_gradients(lm, pairs, True), packed)


def test_runs_begin_and_end_where_they_should() -> None:
    row = packing._Row([[5, 3, 4], [2, 1, 6]])
    found = row.runs(torch.tensor([[[[5, 3, 4], [2, 1, 6]]]]), torch.device("cpu"))
    assert found.queries.tolist() == [0, 8, 12, 15, 21] and found.keys.tolist() == [0, 8, 17, 20, 28]
    first, second = [*range(8), *range(5), *range(8, 12)], [12, 13, 14, 12, 13, *range(15, 21)]
    assert found.places.tolist() == [*first, *second] and found.longest == (8, 9)
    assert row.runs(torch.zeros(1), torch.device("cpu")) is found  # once a row


def test_runs_are_made_without_a_look_at_the_device() -> None:
    lengths = torch.tensor([[[[5, 3, 4], [2, 1, 6]]]])
    with HostReads() as reads:
        packing._Row(lengths.flatten(0, -2).tolist()).runs(lengths, torch.device("cpu"))
    assert not reads.found


def test_when_one_call_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    half, options = torch.empty(1, 4, 9, 64, dtype=torch.bfloat16, device="meta"), {"dropout": 0.0, "scaling": 0.1}

    def serves(query: Tensor = half, value: Tensor | None = None, **other: Any) -> bool:
        return packing.one_call(query, query if value is None else value, options | other)

    assert not serves()
    with meant_for("cpu"):
        assert not serves()
    with meant_for("cuda"):
        assert serves() and serves(half.half()) and serves(softcap=None)
        assert not serves(half.float()) and not serves(dropout=0.1) and not serves(softcap=30.0)
        assert not serves(half[..., :60]) and not serves(half, half[..., :32])
        assert not serves(half.new_empty(1, 4, 9, 512)) and serves(half.new_empty(1, 4, 9, 256))
        monkeypatch.setattr(packing, "TAKES", {"is_causal"})  # of torch 2.10
        assert not serves()
    assert not serves(torch.empty(1, 4, 9, 64, dtype=torch.bfloat16))


def test_autocast_says_what_attention_computes_in(family_lm: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary angles of float32 weights leave queries and keys in float32."""
    lm = family_lm("qwen2")
    seen: list[torch.dtype] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.extend({query.dtype, key.dtype, value.dtype})
        return runs(query, key, value, *args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    exact = losses_and_gradients(lm, pairs_of(lm), False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses_and_gradients(lm, pairs_of(lm), True)[0]
    assert set(seen) == {torch.bfloat16}
    assert float((loss - exact).abs() / exact.abs()) < 2e-2


def test_flash_attention_is_given_runs() -> None:
    """transformers' names for them, and a kernel of that kind made of torch."""
    calls: list[int] = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **given: Any) -> tuple[Tensor, None]:
        assert mask is None
        bounds = [given[f"cu_seq_lens_{side}"].tolist() for side in "qk"]
        for found, longest in zip(bounds, (given["max_length_q"], given["max_length_k"])):
            assert max(b - a for a, b in zip(found, found[1:])) == longest
        calls.append(1)
        return attend(*(x[0].transpose(0, 1) for x in (query, key, value)), *bounds)[None], None

    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 21, 8, generator=generator)
    lengths = torch.tensor([[[[5, 3, 4], [2, 1, 6]]]])
    packing.install("sdpa")
    masked = packing._attend(packing._installed["sdpa"], True, None, query, key, value, lengths, {})
    assert masked.shape == (1, 21, 4, 8)
    torch.testing.assert_close(packing._attend(flash, False, None, query, key, value, lengths, {}), masked)
    assert calls == [1]


SETTINGS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def text_lm_of(family: str, **settings: Any) -> CaptionModel:
    tokenizer = byte_tokenizer()
    config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **settings)
    torch.manual_seed(0)
    return CaptionModel(getattr(transformers, f"{family}ForCausalLM")(config).eval(), tokenizer, None)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Llama", SETTINGS | {"attn_implementation": "eager"}, r"its attention is eager, which takes no packed rows"),
        ("Lfm2", SETTINGS | {"layer_types": ["conv", "full_attention"]}, r"it has conv layers, which read a row"),
        ("Mistral", SETTINGS | {"sliding_window": 8}, r"has layers that see 8 tokens, fewer than a short pair has"),
        (
            "Falcon",
            {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "alibi": True},
            r"FalconForCausalLM: too many values to unpack",
        ),
    ],
)
def test_models_that_cannot_share_say_why_and_train_on_padded_rows(
    family: str, settings: dict[str, Any], reason: str
) -> None:
    lm = text_lm_of(family, **settings)
    with pytest.warns(UserWarning, match=f"every prompt is computed twice: .*{reason}"):
        collate = collator_for(lm)
    pairs = pairs_of(lm)
    assert collate(pairs)["lengths"] is None
    assert PairObjective(lm, "synpo", {})(lm.model, collate(pairs)).loss.isfinite()


def test_a_window_is_no_obstacle_to_sequences_within_it() -> None:
    lm = text_lm_of("Mistral", **SETTINGS, sliding_window=100)
    assert why_not(lm) is None
    assert packing.window(lm) == 100
    pairs = pairs_of(lm)
    sizes = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs]
    assert max(sizes) <= 100 < sum(sizes)  # the row is longer than the window, no sequence is
    assert_same(losses_and_gradients(lm, pairs, True), losses_and_gradients(lm, pairs, False))
    longer = text_lm_of("Mistral", **SETTINGS, sliding_window=60)
    with pytest.warns(UserWarning, match="beyond the 60 tokens"):
        assert collator_for(longer)(pairs)["lengths"] is None
    unlimited = text_lm_of("Qwen2", **SETTINGS, sliding_window=60, use_sliding_window=False)
    assert packing.window(unlimited) is None


def as_one_sequence(inner: Any, masked: bool, module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Attention that knows nothing of pairs."""
    return inner(module, q, k, v, None)[0]


def off_by_one(
    inner: Any, masked: bool, module: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *_: Any
) -> Tensor:
    """Attention that takes the last token of each prompt for an answer's."""
    return right(inner, masked, module, q, k, v, lengths + torch.tensor([-1, 1, 0]), {})


right = packing._attend


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [(as_one_sequence, torch.float32), (as_one_sequence, torch.bfloat16), (off_by_one, torch.float32)],
)
def test_the_check_sees_wrong_attention(
    wrong: Callable[..., Tensor], dtype: torch.dtype, family_lm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = family_lm("qwen2")
    lm.model.to(dtype)
    monkeypatch.setattr(packing, "_attend", wrong)
    assert "gives other states for packed rows" in str(why_not(lm))


def test_the_check_sees_a_leak_too_small_for_its_tolerance(family_lm: Any) -> None:
    lm = family_lm("qwen2")
    lm.model.bfloat16()

    def leak(module: Any, inputs: Any, output: Tensor) -> Tensor:  # a tenth of the row's mean in every state
        return output + 0.1 * output.mean(1, keepdim=True)

    lm.base.model.norm.register_forward_hook(leak)
    assert "lets packed answers see one another" in str(why_not(lm))


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_features_made_beforehand_give_the_logits_of_pixels(family: str, family_lm: Any) -> None:
    lm = family_lm(family)
    pair = pairs_of(lm)[1]
    ids = torch.cat([pair.prompt, pair.chosen])[None]
    (encoded,) = lm.encode_vision([pair.vision])
    pixels = {k: v[None] if family == "llava_onevision" else v for k, v in pair.vision.items()}
    if "pixels" in pixels:
        pixels = {"pixel_values_videos": pixels["pixels"]}
    types = lm.inputs(ids, [pair.vision]) if "qwen" in family else {}
    with torch.no_grad():
        own = lm.model(input_ids=ids, **pixels, **{k: v for k, v in types.items() if "types" in k or "type_ids" in k})
        ours = lm.model(**lm.forward_kwargs(ids, torch.ones_like(ids), [encoded]))
    torch.testing.assert_close(ours.logits, own.logits, rtol=1e-4, atol=1e-5)


def tower_of(lm: CaptionModel) -> Any:
    core = lm.base.model
    return next(getattr(core, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(core, name))


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_the_tower_sees_every_video_once(family: str, prefix_sharing: bool, family_lm: Any) -> None:
    lm = family_lm(family)
    if not getattr(lm.vision, "takes_features", True) and not prefix_sharing:
        pytest.skip("this release of transformers takes no features: padded rows send every video through twice")
    pairs = pairs_of(lm)
    losses_and_gradients(lm, pairs, prefix_sharing)  # the first time, the model runs once more to be looked at
    patches: list[int] = []
    tower_of(lm).register_forward_pre_hook(
        lambda module, args, kwargs: patches.append((args[0] if args else kwargs["pixel_values"]).numel()),
        with_kwargs=True,
    )
    losses_and_gradients(lm, pairs, prefix_sharing)
    assert sum(patches) == sum(v.numel() for p in pairs for k, v in p.vision.items() if k in ("pixels", *MODALITIES))


def test_a_tower_that_is_trained_sees_pixels_and_gets_gradients(family_lm: Any) -> None:
    lm = family_lm("qwen2_vl")
    lm.model.requires_grad_(True)
    pairs = pairs_of(lm)
    packed, separate = losses_and_gradients(lm, pairs, True), losses_and_gradients(lm, pairs, False)
    assert any("visual" in name for name in packed[1])
    assert_same(packed, separate)


def test_only_what_a_frozen_tower_saw_is_kept(captioner: CaptionModel, trainer_for: Any) -> None:
    trainer_for(captioner, None, cache_vision=True)
    captioner.base.model.multi_modal_projector.requires_grad_(True)
    trainer_for(captioner, None)
    with pytest.raises(ConfigError, match="this one is trained: freeze it, or set train.cache_vision = false"):
        trainer_for(captioner, None, cache_vision=True)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_kept_features_train_like_pixels(family: str, family_lm: Any, tmp_path: Path) -> None:
    lm = family_lm(family)
    if not lm.vision.takes_features:
        pytest.skip("this release of transformers takes no features")
    pairs = pairs_of(lm)
    cache = VisionCache(tmp_path, lm)
    for i, vision in enumerate(lm.encode_vision([p.vision for p in pairs])):
        cache.write(str(i), vision)
    kept = [replace(pair, vision=VisionCache(tmp_path, lm).read(str(i))) for i, pair in enumerate(pairs)]
    assert "pixel" not in " ".join(key for pair in kept for key in pair.vision)
    assert_same(losses_and_gradients(lm, kept, True), losses_and_gradients(lm, pairs, False))


def test_the_trainer_shares_prefixes_unless_told_not_to(text_lm: CaptionModel, trainer_for: Any) -> None:
    pairs = pairs_of(text_lm)
    for settings, rows in (({}, 1), ({"prefix_sharing": False}, 6)):
        trainer = trainer_for(text_lm, pairs, per_device_train_batch_size=3, **settings)
        assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == rows
