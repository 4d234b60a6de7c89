"""Attention to prompts that rows share, against the same keys and values written out for every row."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from devices import DEVICE
from synpo.config import SamplingConfig
from synpo.model.adapter import CaptionModel
from synpo.pipeline import attention
from synpo.pipeline.attention import Shared, additive, reading
from synpo.pipeline.decode import generate
from synpo.pipeline.reader import Reader

GROUPS = {"even": [0, 0, 0, 1, 1, 1], "uneven": [1, 0, 1, 2, 1], "alone": [0, 1, 2], "one": [0, 0, 0, 0]}
HEADS, QUERIES, SIZE = 2, 3, 8


def problem(group: list[int], new: int, own: int, dtype: torch.dtype) -> tuple[Shared, Tensor, Tensor, Tensor, Tensor]:
    """What rows share, queries (R, H·n, S, D), keys and values (R, H, L, D), and the mask (R, 1, S, L) bool."""
    generator = torch.Generator().manual_seed(len(group) + new)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    count, prompt = max(group) + 1, 11
    there = torch.ones(count, prompt, dtype=torch.bool, device=DEVICE)
    there[0, :4] = False
    keys, values = ([draw(count, HEADS, prompt, SIZE) for _ in range(2)] for _ in range(2))
    shared = Shared(keys, values, there, torch.tensor(group, device=DEVICE))
    mask = torch.ones(len(group), 1, new, own + new, dtype=torch.bool, device=DEVICE).tril(own)
    mask[1:, :, :, 0] = False
    query = draw(len(group), HEADS * QUERIES, new, SIZE)
    return shared, query, draw(len(group), HEADS, own + new, SIZE), draw(len(group), HEADS, own + new, SIZE), mask


def written_out(shared: Shared, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(R, S, heads, D) by sdpa in float64, every row with keys of its own."""
    keys = torch.cat([shared.keys[layer][shared.group], key], dim=2)
    values = torch.cat([shared.values[layer][shared.group], value], dim=2)
    seen = torch.cat([shared.mask[shared.group][:, None, None].expand(-1, 1, mask.shape[2], -1), mask], dim=3)
    return F.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=seen, enable_gqa=True, scale=0.3
    ).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("new", "own"), [(1, 0), (1, 5), (4, 3)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("at_a_time", [1 << 26, 200])
def test_shared_prompts_are_attended_to_like_copies(
    group: str, new: int, own: int, dtype: torch.dtype, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.SCORES, DEVICE, at_a_time)
    shared, query, key, value, mask = problem(GROUPS[group], new, own, dtype)
    mask[..., -new:] |= torch.eye(new, dtype=torch.bool, device=DEVICE)
    bias = additive(mask)
    with reading(bias, shared, 2):
        for layer in range(2):
            module = SimpleNamespace(layer_idx=layer, num_key_value_groups=QUERIES)
            found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, bias, scaling=0.3)
            expected = written_out(shared, layer, query, key, value, mask)
            tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
            assert found.dtype == dtype and found.shape == expected.shape
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_rows_leave_and_repeat_and_batches_merge() -> None:
    shared, query, key, value, mask = problem(GROUPS["uneven"], 1, 2, torch.float32)
    for rows in ([4, 0], [3], [2, 2, 1, 1, 0]):
        kept = shared.keep(torch.tensor(rows, device=DEVICE))
        assert len(kept.mask) == len({GROUPS["uneven"][r] for r in rows}), "prompts nobody has read are let go"
        parts = [x[rows] for x in (query, key, value, mask)]
        together = Shared.merge([kept, shared])
        for shares, at in ((kept, rows), (together, [*rows, *range(5)])):
            few = [x[at] for x in (query, key, value, mask)] if shares is together else parts
            with reading(additive(few[3]), shares, 1):
                module = SimpleNamespace(layer_idx=1)
                found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *few[:3], None, scaling=0.3)
            expected = written_out(shared, 1, query, key, value, mask)[at]
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_model_that_does_not_ask_for_its_attention_is_reported() -> None:
    shared, *_ = problem(GROUPS["even"], 1, 0, torch.float32)
    with pytest.raises(RuntimeError, match=r"0 of 3 layers .* model\.attention = eager"), reading(None, shared, 3):
        pass
    query = torch.randn(6, 6, 1, 8)
    with pytest.raises(RuntimeError, match="softcap is not written here"), reading(None, shared, 1):
        ALL_ATTENTION_FUNCTIONS["sdpa"](SimpleNamespace(layer_idx=0), query, query, query, None, softcap=30.0)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    plain, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        SimpleNamespace(num_key_value_groups=2, is_causal=True), query, key, key, None
    )
    expected = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(plain, expected, atol=1e-6, rtol=1e-6)  # outside of a pass all is as it was


def test_flash_attention_is_stood_in_for_too(captioner: CaptionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model uses flash-attn, candidates still hold their prompt once, and say the same."""
    calls = []

    def flash(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """What transformers' flash attention computes: causal, with a mask (R, L) of what is no padding."""
        assert mask is None or mask.dim() == 2
        calls.append(query.shape[2])
        seen = query.new_ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        seen = seen if mask is None else seen & mask[:, None, None].bool()
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
        return out.nan_to_num(0.0).transpose(1, 2).contiguous(), None

    sampling = SamplingConfig(temperature=0.8, top_k=16, max_new_tokens=12)
    views = [torch.randint(0, 256, (n, 3, 48, 48), generator=torch.Generator().manual_seed(n)).byte() for n in (4, 6)]
    prompts = [prompt for view in views for prompt in [captioner.prompt("Describe.", view)] * 3]
    keys = [str(i) for i in range(6)]
    expected = generate(captioner, prompts, sampling, keys=keys)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr(attention, "_installed", attention._installed - {"flash_attention_2"})
    monkeypatch.setattr(captioner.base.config.get_text_config(), "_attn_implementation_internal", "flash_attention_2")
    held, _ = Reader(captioner).read(prompts, room=4)
    assert held.shared is not None and len(held.shared.mask) == 2 and held.cache.get_seq_length() == 0
    assert generate(captioner, prompts, sampling, keys=keys) == expected
    assert calls and min(calls) > 1, "prompts by flash-attn, tokens by what shares them"
