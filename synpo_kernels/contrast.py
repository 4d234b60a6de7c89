"""Contrastive decoding: from the logits of an expert and an amateur straight to the next token.

What: `contrastive_sample` mixes, filters and samples in one op; `contrastive_mix` gives the mixed logits alone, for
      frameworks that want to do the rest themselves.
Why:  the usual chain of torch ops reads and writes the full vocabulary a dozen times a token. The C++ op reads each input
      once and writes nothing; with a plausibility cut-off it reads the amateur only where the expert finds a token plausible.
How:  `cpp` (csrc/, CPU tensors), `triton` (kernels/, CUDA tensors with a small top-k) and `torch` (any device, also where
      neither serves) follow one definition and agree token for token: logits are mixed in fp32 without fused multiply-add,
      everything after top-k is done in float64, and candidates are ordered by value, descending, ties by token id. Both are
      in `_sample_torch` below, which is the definition to read.

Shape legend: B rows (sequences), V tokens, L past tokens, K tokens left after top-k.
Sources: contrastive decoding with a cut-off, Leng et al. 2023 (arXiv 2311.16922), eq. 3 to 6; nucleus sampling, Holtzman et al.
2019 (arXiv 1904.09751); min-p, Nguyen et al. 2024 (arXiv 2407.01082); repetition penalty, Keskar et al. 2019 (arXiv 1909.05858).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import _ext
from .backends.choice import triton_takes

BACKENDS = ("auto", "cpp", "triton", "torch")
BLOCK_LOGITS = 2**19  # the torch path's slice of (B, V) on a CPU
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def contrastive_sample(
    expert: Tensor,
    amateur: Tensor | None,
    *,
    alpha: float = 0.5,
    plausibility: float = 0.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    history: Tensor | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw the next token of every row from the contrast of two sets of logits.

    In this order: mix `(1 + alpha) * expert - alpha * amateur`; drop tokens with
    `expert < max(expert) + log(plausibility)`; repetition penalty; divide by the temperature; keep the `top_k` largest; of
    those, renormalised, the fewest that reach mass `top_p`; drop tokens below `min_p` times the largest probability; draw by
    inverse CDF in descending order of probability, ties by token id. Not differentiable.

    Args:
        expert: (B, V) fp32, bf16 or fp16 logits. Rows may be strided, as in `logits[:, -1]`; nothing is copied.
        amateur: (B, V), dtype and device of `expert`; None samples from `expert` alone.
        alpha: strength of the contrast, >= 0. At 0 the amateur is not read.
        plausibility: 0 (off) to 1.
        temperature: 0 is greedy: the largest logit, ties to the lower id, and every other setting as at temperature 1.
        top_k: 0 is off; more than V is the same as V.
        top_p: in (0, 1]; 1 is off.
        min_p: 0 (off) to 1.
        repetition_penalty: > 0; logits of tokens in `history` are divided by it where positive, multiplied where not.
        history: (B, L) int64 ids; ids outside [0, V), such as -1, are padding.
        uniform: (B,) numbers in [0, 1), one a row: the same numbers give the same tokens on every backend.
            None draws them in float64 from `generator` (or torch's default one); greedy draws none.
        backend: "auto", "cpp" (CPU tensors), "triton" (CUDA tensors, with top_k from 1 to 64) or "torch".

    Returns:
        tokens (B,) int64, and logps (B,) fp32: log-probability of each token under the distribution it was drawn from
        (filtered, renormalised, tempered); for greedy at temperature 1.

    Special values: a token with expert logit -inf is never drawn, whatever the amateur says. Tokens mixed to +inf share all
    the mass. NaN is never drawn. A row is no distribution if it holds a NaN or if no token is left: then its logp is NaN and
    its token is drawn from what is left, or 0. With a cut-off the amateur's values at implausible tokens do not matter.

    Raises:
        ValueError: shapes, dtypes, devices or settings outside the above, or a backend that cannot take these tensors.
        RuntimeError: torch ops on a CUDA device under `torch.use_deterministic_algorithms(True)`, for which torch has no
            cumulative sum; a top_k that the kernels take, or warn_only=True, is the way out.
    """
    _check_logits(expert, amateur, alpha, plausibility)
    rows = expert.size(0)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and >= 0 (0 is greedy), got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 is off), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1] (1 is off), got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1] (0 is off), got {min_p}")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(f"repetition_penalty must be finite and > 0 (1 is off), got {repetition_penalty}")
    if repetition_penalty == 1:
        history = None
    elif history is None:
        raise ValueError("repetition_penalty needs history=, the (B, L) ids it applies to")
    else:
        if history.dim() != 2 or history.size(0) != rows:
            raise ValueError(f"history must be (B, L) with B = {rows}, got {tuple(history.shape)}")
        _check_like("history", history, torch.int64, expert)
        history = history.contiguous()
    if uniform is None:
        if temperature > 0:
            uniform = torch.rand(rows, dtype=torch.float64, device=expert.device, generator=generator)
    else:
        if generator is not None:
            raise ValueError("give uniform= or generator=, not both: uniform replaces the random numbers")
        if uniform.shape != (rows,) or not uniform.is_floating_point():
            raise ValueError(f"uniform must be ({rows},) floating point, got {tuple(uniform.shape)} {uniform.dtype}")
        _check_like("uniform", uniform, uniform.dtype, expert)
        if uniform.dtype != torch.float64 or not uniform.is_contiguous():
            uniform = uniform.to(torch.float64).contiguous()
    expert = _plain(expert)
    amateur = None if amateur is None or alpha == 0 else _plain(amateur)
    settings = (alpha, plausibility, temperature, top_k, top_p, min_p, history, repetition_penalty)
    cpp = _use_cpp(expert, backend)
    if backend == "triton" or (backend == "auto" and expert.is_cuda):
        reason = _why_not_triton(expert.dtype, expert.device, expert.size(1), top_k, temperature)
        if reason is None:
            seen = None if history is None else _seen(history, expert.size(1))
            with torch.cuda.device_of(expert):  # Triton launches on the current device
                return _kernels().launch(expert, amateur, uniform, *settings[:6], seen, repetition_penalty)
        if backend == "triton":
            raise ValueError(f"backend 'triton': {reason}")
    if uniform is None:  # nobody reads it
        uniform = torch.zeros(rows, dtype=torch.float64, device=expert.device)
    sample = torch.ops.synpo_kernels.contrastive_sample.default if cpp else _sample_torch
    return sample(expert, amateur, uniform, *settings)


def contrastive_mix(
    expert: Tensor, amateur: Tensor | None, *, alpha: float = 0.5, plausibility: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Mixed logits `(1 + alpha) * expert - alpha * amateur`, -inf at tokens the expert finds implausible. Not differentiable.

    Args: as for `contrastive_sample`.

    Returns:
        (B, V) fp32. -inf where `expert` is -inf or below `max(expert) + log(plausibility)`; a NaN stays a NaN.

    Raises:
        ValueError: shapes, dtypes, devices or settings out of range, or a backend that cannot take these tensors.
    """
    _check_logits(expert, amateur, alpha, plausibility)
    expert = _plain(expert)
    amateur = None if amateur is None or alpha == 0 else _plain(amateur)
    mix = torch.ops.synpo_kernels.contrastive_mix.default if _use_cpp(expert, backend) else _mix_torch
    return mix(expert, amateur, alpha, plausibility)


def _check_logits(expert: Tensor, amateur: Tensor | None, alpha: float, plausibility: float) -> None:
    if expert.dim() != 2 or not 0 < expert.size(1) < 2**31:
        raise ValueError(f"expert must be (B, V) logits with 0 < V < 2^31, got {tuple(expert.shape)}")
    if expert.dtype not in LOGIT_DTYPES:
        raise ValueError(f"expert must be float32, bfloat16 or float16, got {expert.dtype}")
    if amateur is not None:
        if amateur.shape != expert.shape:
            raise ValueError(f"amateur must have expert's shape {tuple(expert.shape)}, got {tuple(amateur.shape)}")
        _check_like("amateur", amateur, expert.dtype, expert)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be finite and >= 0 (0 is plain sampling), got {alpha}")
    if not 0 <= plausibility <= 1:
        raise ValueError(f"plausibility must be in [0, 1] (0 is off), got {plausibility}")


def _check_like(name: str, tensor: Tensor, dtype: torch.dtype, expert: Tensor) -> None:
    if tensor.dtype != dtype or tensor.device != expert.device:
        raise ValueError(f"{name} must be {dtype} on {expert.device}, got {tensor.dtype} on {tensor.device}")


def _use_cpp(expert: Tensor, backend: str) -> bool:
    """Whether the C++ op takes this call: by wish, or because the tensors are on the CPU and the extension is there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("triton", "torch") or (backend == "auto" and not expert.is_cpu):
        return False
    if backend == "cpp" and not expert.is_cpu:
        raise ValueError(f"backend 'cpp' takes CPU tensors, got {expert.device}; use backend='auto'")
    if _ext.available():
        return True
    if backend == "cpp":
        raise ValueError(f"backend 'cpp': {_ext.reason}")
    _ext.say_once()
    return False


@cache
def _kernels() -> ModuleType:
    from .kernels import contrast_sample  # imports triton

    return contrast_sample


@lru_cache(256)
def _why_not_triton(dtype: torch.dtype, device: torch.device, vocab: int, top_k: int, temperature: float) -> str | None:
    """None where the kernels take these tensors and settings, else the reason why not. Asked once, not at every token."""
    served, reason = triton_takes(dtype, device)
    if not served:
        return reason
    most, least = _kernels().MOST, _kernels().LEAST_TEMPERATURE
    if min(top_k or vocab, vocab) > most:
        return f"the kernels sort at most {most} candidates in registers, got top_k={top_k}; use backend='torch'"
    if 0 < temperature < least:
        return f"the kernels take a temperature of 0 or from {least}, got {temperature}; use backend='torch'"
    return None


def _seen(history: Tensor, vocab: int) -> Tensor:
    """(B, V) int8, 1 at tokens among a row's past ids (B, L); ids outside [0, V) are padding. Rows begin at 16 bytes."""
    edge = 16  # in front of token 0: ids that come before it
    seen = torch.zeros(history.size(0), edge + vocab // 16 * 16 + 16, dtype=torch.int8, device=history.device)
    return seen.scatter_(1, history.clamp(-1, vocab) + edge, 1)[:, edge : edge + vocab]


def _plain(logits: Tensor) -> Tensor:
    """The logits without a graph, each row in one piece. (torch.no_grad() costs more than all checks together.)"""
    if logits.requires_grad:
        logits = logits.detach()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _mix_torch(expert: Tensor, amateur: Tensor | None, alpha: float, plausibility: float) -> Tensor:
    """`contrastive_mix` in torch ops, (B, V) fp32; a NaN in the expert does not move the cut-off and stays visible."""
    e = expert.float()
    x = e
    if amateur is not None:
        # -inf - -inf is NaN, but a token masked out of both streams is simply masked out.
        x = torch.where(e == -math.inf, -math.inf, e * (1 + alpha) - amateur.float() * alpha)
    if plausibility > 0:
        peak = torch.where(e.isnan(), -math.inf, e).amax(-1, keepdim=True)  # (B, 1)
        x = torch.where(e < peak + math.log(plausibility), -math.inf, x)
    return x


def _sample_torch(
    expert: Tensor,
    amateur: Tensor | None,
    uniform: Tensor,
    alpha: float,
    plausibility: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    history: Tensor | None,
    repetition_penalty: float,
) -> tuple[Tensor, Tensor]:
    """The op in torch: the definition the C++ op is tested against. No host synchronisation, on any device."""
    block = max(1, BLOCK_LOGITS // expert.size(1))
    if expert.device.type == "cpu" and expert.size(0) > block:  # temporaries that fit the cache: five times as fast
        settings = (alpha, plausibility, temperature, top_k, top_p, min_p)
        parts = []
        for start in range(0, expert.size(0), block):
            e, m, u, h = (None if t is None else t[start : start + block] for t in (expert, amateur, uniform, history))
            parts.append(_sample_torch(e, m, u, *settings, h, repetition_penalty))  # type: ignore[arg-type]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([logps for _, logps in parts])

    x = _mix_torch(expert, amateur, alpha, plausibility)
    if history is not None:
        penalised = torch.where(x > 0, x * (1 / repetition_penalty), x * repetition_penalty)
        x = torch.where(_seen(history, x.size(1)).view(torch.bool), penalised, x)
    broken = x.isnan().any(-1)  # (B,)
    x = torch.where(x.isnan(), -math.inf, x) + 0.0  # + 0.0 makes -0 and 0 a tie
    if temperature == 0 and top_p == 1 and not 0 < top_k < x.size(1):
        return _greedy(x, broken, min_p)
    x, ids = _largest(x, top_k)  # (B, K), descending

    x = x.double()
    scale = 1.0 if temperature == 0 else min(1 / temperature, 1e300)
    log_weight = torch.where(x == x[:, :1], 0.0, (x - x[:, :1]) * scale)  # a largest logit of +inf takes all
    weight = torch.where(x == -math.inf, 0.0, log_weight.exp())
    position = torch.arange(x.size(1), device=x.device)
    if top_p < 1:
        mass = weight.cumsum(-1)
        last = (mass >= top_p * mass[:, -1:]).int().argmax(-1, keepdim=True)
        weight = torch.where(position <= last, weight, 0.0)
    if min_p > 0:
        weight = torch.where(weight >= min_p, weight, 0.0)

    mass = weight.cumsum(-1)
    total = mass[:, -1]
    u = torch.where(uniform > 0, uniform, 0.0) * (temperature != 0)
    passed = mass > (u * total)[:, None]
    last = torch.where(weight > 0, position, 0).amax(-1)  # rounding may leave u * total out of reach
    drawn = torch.where(passed.any(-1), passed.int().argmax(-1), last)[:, None]  # (B, 1)
    logps = log_weight.gather(1, drawn)[:, 0] - total.log()
    empty = total == 0
    tokens = torch.where(empty, 0, ids.gather(1, drawn)[:, 0])
    return tokens, torch.where(broken | empty, math.nan, logps).float()


def _greedy(x: Tensor, broken: Tensor, min_p: float) -> tuple[Tensor, Tensor]:
    """`_sample_torch` where only the largest of x (B, V) has to be found: no sort, and nothing of x's size in float64."""
    token = x.argmax(-1, keepdim=True)  # the first of those that tie
    peak = x.gather(1, token)  # (B, 1)
    weight = torch.where(x == peak, 1.0, (x - peak).exp())  # a largest logit of +inf takes all
    if min_p > 0:
        weight = torch.where(weight >= min_p, weight, 0.0)
    broken = broken | (peak[:, 0] == -math.inf)  # no token is left
    logps = -weight.sum(-1, dtype=torch.float64).log()
    return token[:, 0], torch.where(broken, math.nan, logps).float()


def _largest(x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values (B, K) and ids of the `top_k` largest (0: all) in descending order, ties by lower id, which `topk` leaves open."""
    vocab = x.size(1)
    if not 0 < top_k < vocab:
        return torch.sort(x, dim=-1, descending=True, stable=True)
    bits = x.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floats
    key = (ordered << 32) + torch.arange(vocab - 1, -1, -1, device=x.device)
    ids = vocab - 1 - (key.topk(top_k, dim=-1).values & 0xFFFFFFFF)
    return x.gather(1, ids), ids


if _ext.available():

    @torch.library.register_fake("synpo_kernels::contrastive_sample")
    def _sample_fake(expert: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return expert.new_empty(expert.size(0), dtype=torch.int64), expert.new_empty(
            expert.size(0), dtype=torch.float32
        )

    @torch.library.register_fake("synpo_kernels::contrastive_mix")
    def _mix_fake(expert: Tensor, *_: object) -> Tensor:
        return expert.new_empty(expert.shape, dtype=torch.float32)
