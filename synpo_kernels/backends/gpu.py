"""The Triton backend: the frozen head's pass in kernels, and kernel tiles for the passes of `passes.py`.

The frozen pass takes R rows × Vc columns of the logits at a time (`slices`), two launches a slice:

    begin        rows gathered, z_y                                           kernels/rows.py
      exp_tile   P̂ (R, Vc) and its row sums                                   kernels/exp_tile.py
      product    E' (R, D) += P̂ W                                             the library's, or kernels/product.py past a count
    finish       logp, U straight into what becomes ∂L/∂x                     kernels/rows.py
    exact_rows   rows that overflowed, once at the end                        kernels/exact_rows.py

bf16 and fp32 take one pass, P̂ in the input's own format (bf16 has the exponent range of fp32). fp16 cannot hold P̂: its
sums come from a first pass that writes nothing, and a second one, around the log-sum-exp, holds 2¹⁴ · p. The host reads
nothing back: of ignored rows it never learns how many there are. They are moved behind the others, the kernels read the
count where it is, and their loops end there. The rows of a block lie, in order, where U's first ones come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..head import Head, add_matmul
from ..kernels import exact_rows, exp_tile, product, rows
from ..kernels.configs import TileConfig, exact_config, product_config, tile_config
from ..kernels.launch import Bound
from ..kernels.tiles import describable
from . import passes
from .passes import Forward, cut, target_logits

FP16_MAGNIFY = 2.0**14
partition = rows.partition


@lru_cache
def _major(device: torch.device) -> int | None:
    """Major compute capability; None in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the chip; three programs share the tiles in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _grid(device: torch.device, config: TileConfig, rows: int, columns: int) -> tuple[int]:
    """Of a launch over rows × columns: one program a multiprocessor where the loop over tiles is flattened, else one a tile."""
    tiles = -(-rows // config.block_n) * -(-columns // config.block_v)
    return (min(tiles, _processors(device)) if config.flatten or device.type == "cpu" else tiles,)


def _precision() -> str:
    """How the kernels multiply fp32, following torch.set_float32_matmul_precision."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@lru_cache(1024)
def slices(
    blocks: int, dim: int, vocabulary: int, itemsize: int, workspace: int, processors: int, block_n: int, block_v: int
) -> tuple[int, int]:
    """Rows and columns (R, Vc) of a slice of so many blocks of block_n rows: the least time that a workspace in bytes allows.

    A row holds E' in fp32, Vc numbers and a partial sum for each tile of them. Time is counted in that of a multiprocessor for a
    step of a tile's product (12 ns on an H200): both products, half of them in whole waves of `processors` tiles (a chip that
    waits runs the faster afterwards, within its power), the second with shared or half tiles where whole ones leave the chip
    idle (`product_config`), two launches a slice, and E' read and written once a slice where it does not stay in the cache.
    """
    launches, cached, traffic, of_half, of_sharing = 600, 24 << 20, 3e-4, 1.15, 0.12
    columns = -(-vocabulary // block_v)

    def waves(tiles: int) -> float:
        return (tiles / processors + -(-tiles // processors)) / 2

    best, choice = math.inf, (1, 1)
    for high in dict.fromkeys(-(-blocks // parts) for parts in range(1, 1 + blocks)):
        rows = high * block_n
        room = (workspace - rows * 4 * dim) // (rows * (4 + itemsize * block_v))
        if room < 1:
            continue
        tiles = high * -(-dim // block_v)
        product = min(waves(tiles), tiles / processors + of_sharing)
        if tiles < processors // 2:
            product = waves(2 * tiles) / 2 * of_half
        every = launches + (rows * dim * traffic if 4 * rows * dim > cached else 0.0)
        even = -(-columns // -(-columns // min(room, columns)))
        for wide in {even, max(1, high * even // processors * processors // high)}:  # or in whole waves
            whole, rest = divmod(columns, wide)
            cost = sum(
                n * (every + waves(high * w) * dim + product * block_v * w) for n, w in ((whole, wide), (1, rest)) if w
            )
            cost *= -(-blocks // high)
            if cost < best:
                best, choice = cost, (high, wide)
    return choice[0] * block_n, choice[1] * block_v


class TritonTiles:
    """A slice of exponentials by one kernel; see `passes.Tiles`.

    Products with the slice are the library's where every row counts; past a `count` they are a kernel's that stops there.
    """

    def __init__(self, count: Tensor | None) -> None:
        self.count = count  # () int32, the first rows that are wanted; None: all
        self._turn: Tensor | None = None  # of its products, which come one after the other

    def operand(self, matrix: Tensor) -> Tensor:
        return matrix

    def slice_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def __call__(
        self,
        x: Tensor,
        part: Head,
        labels: Tensor,
        anchor: Tensor,
        at_target: Tensor | None,
        keep: bool,
        out: Tensor,
    ) -> Tensor:
        described = describable(x) and describable(part.weight) and describable(out)
        capped, vocabulary = part.softcap is not None, len(part.weight)
        config = tile_config(_major(x.device), x.element_size(), softcap=capped, describable=described)
        sums = torch.empty(-(-vocabulary // config.block_v), len(x), dtype=torch.float32, device=x.device)
        if len(x):
            how: dict[str, Any] = {"count": self.count, "precision": _precision(), "config": config}
            run = exp_tile.bind(x, part, labels, anchor, at_target, out, sums, write=keep, **how)
            grid = _grid(x.device, config, len(x), vocabulary)
            run(grid, N=len(x), V=vocabulary, first_x=0, first_row=0, first_column=0, add=0)
        return sums.sum(0)

    def add_product(self, total: Tensor, slice_: Tensor, b: Tensor) -> None:
        if self.count is None:
            add_matmul(total, slice_, b)
        elif slice_.numel():
            self._counted_product(total, slice_, b, sum_counted=False)

    def add_transposed_product(self, total: Tensor, slice_: Tensor, b: Tensor, *, fresh: bool = False) -> None:
        if self.count is None:
            add_matmul(total, slice_.T, b, fresh=fresh)
        elif slice_.numel():
            self._counted_product(total, slice_, b, sum_counted=True, fresh=fresh)
        elif fresh:
            total.zero_()

    def _counted_product(
        self, total: Tensor, slice_: Tensor, b: Tensor, *, sum_counted: bool, fresh: bool = False
    ) -> None:
        """total (+)= slice_ (n, w) @ b, or with sum_counted sliceᵀ @ b, as far as rows count."""
        assert self.count is not None
        if self._turn is None:
            self._turn = _turns(b.device)
        run, grid_of = _product(total, slice_, b, self.count, self._turn, sum_counted=sum_counted)
        m, k = slice_.T.shape if sum_counted else slice_.shape
        run(grid_of(m), M=m, K=k, first_row=0, first_k=0, add=int(not fresh))


def _turns(device: torch.device) -> Tensor:
    """What programs that share the tiles of a product take turns by."""
    return torch.zeros(2 * _processors(device), dtype=torch.int32, device=device)


def _product(
    total: Tensor, slice_: Tensor, b: Tensor, count: Tensor, turn: Tensor, *, sum_counted: bool
) -> tuple[Bound, Callable[[int], tuple[int]]]:
    """The kernel and its grid for so many rows of the result: all multiprocessors where they share tiles."""
    (m, d), processors = total.shape, _processors(b.device)
    described = describable(slice_) and describable(b)
    config = product_config(_major(b.device), b.element_size(), m, d, processors, describable=described)
    how: dict[str, Any] = {"sum_counted": sum_counted, "precision": _precision(), "config": config}
    run = product.bind(slice_, b, total, count, turn, **how)
    return run, lambda rows: (processors,) if config.share else _grid(b.device, config, rows, d)


def forward(
    x: Tensor, head: Head, labels: Tensor, ignore_index: int | None, *, want_direction: bool, workspace: int
) -> Forward:
    """Log-probabilities (N,) of `labels` and, if wanted, U (N, D) = ∂logp/∂x, 0 where ignored."""
    (n, dim), vocabulary, device = x.shape, len(head.weight), x.device
    logps = torch.empty(n, dtype=torch.float32, device=device)
    target, normalizer = torch.empty_like(logps), torch.empty_like(logps, dtype=torch.float64)
    direction = torch.empty_like(x, memory_format=torch.contiguous_format) if want_direction else None
    if n == 0:
        return Forward(logps, normalizer, direction)
    order, count = (None, None) if ignore_index is None else partition(labels, ignore_index)
    softcap, twice = head.softcap is not None, want_direction and x.dtype == torch.float16
    slope, flags = torch.empty_like(target) if softcap else None, torch.empty(n, dtype=torch.int8, device=device)
    every = rows.Rows(labels, target, slope, logps, normalizer, flags, direction, order, count)

    readable = describable(head.weight) and (describable(x) if order is None else dim * x.element_size() % 16 == 0)
    config = tile_config(_major(device), x.element_size(), softcap=softcap, describable=readable)
    tile = (config.block_n, config.block_v)
    if want_direction:
        shape = (-(-n // config.block_n), dim, vocabulary, x.element_size())
        most, width = slices(*shape, workspace, _processors(device), *tile)
        most = min(n, most)
    else:  # nothing but partial sums is held
        fitting = workspace // (4 * -(-vocabulary // config.block_v) + x.element_size() * dim)
        most, width = min(n, max(1, fitting // config.block_n) * config.block_n), vocabulary
    gathered = x
    if order is not None:  # where U comes last: the last block is the first, and a row's place is never before its turn
        gathered = torch.empty(most, dim, dtype=x.dtype, device=device) if direction is None else direction[:most]
    slice_ = torch.empty(most if want_direction else 1, -(-width // 16) * 16, dtype=x.dtype, device=device)
    pull = torch.empty(most, dim, dtype=torch.float32, device=device) if want_direction else None
    near, anchor = torch.empty(most, dtype=torch.int64, device=device), torch.empty(most, device=device)
    sums = torch.empty(-(-width // config.block_v), most, device=device)

    begin = rows.bind_begin(x, head, every, gathered, near, anchor)
    divisor = FP16_MAGNIFY if twice else None
    finish = rows.bind_finish(pull, sums, head, every, divisor=divisor, overflow=passes.OVERFLOW)
    tensors = (gathered, head, near, anchor, None, slice_, sums)
    how: dict[str, Any] = {"count": count, "precision": _precision(), "config": config}
    write = exp_tile.bind(*tensors, write=True, **how) if want_direction else None
    add_up = exp_tile.bind(*tensors, write=False, **how) if twice or not want_direction else write
    multiply: tuple[Bound, Callable[[int], tuple[int]]] | None = None
    if pull is not None and count is not None:
        multiply = _product(pull, slice_, head.weight, count, _turns(device), sum_counted=False)

    def sweep(run: Bound | None, m: int, first: int) -> None:
        """Partial sums of a block's rows around their anchors, and where its slices are written its E' in pull."""
        assert run is not None
        first_x = first if order is None else 0
        for columns in cut(vocabulary, width):
            w, start = columns.stop - columns.start, columns.start
            run(
                _grid(device, config, m, w),
                N=m,
                V=w,
                first_x=first_x,
                first_row=first,
                first_column=start,
                add=int(start > 0),
            )
            if run is not write or pull is None:
                continue
            if multiply is None:
                add_matmul(pull[:m], slice_[:m, :w], head.weight[columns], fresh=start == 0)
            else:
                product_of, grid_of = multiply
                product_of(grid_of(m), M=m, K=w, first_row=first, first_k=start, add=int(start > 0))

    for at in reversed(cut(n, most)):
        m, first = at.stop - at.start, at.start
        begin(m, first)
        sweep(add_up, m, first)
        if twice:  # the second pass leaves other sums
            first_sums = sums.clone()
            anchor += torch.log1p(sums.sum(0)) - math.log(FP16_MAGNIFY)
            sweep(write, m, first)
            sums.copy_(first_sums)
        finish(m, first)
    if ignore_index is not None and direction is not None and most < n:  # one block alone is finished whole
        gathered.masked_fill_(labels[:most].eq(ignore_index)[:, None], 0.0)
    exact_rows.launch(x, head, every, precision=_precision(), config=exact_config(_major(device)))
    return Forward(logps, normalizer, direction)


def whole_rows(
    x: Tensor, head: Head, labels: Tensor, out: Tensor, *, workspace: int, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `choice.WholeRows`. Where a row overflows all are written again around the log-sum-exp, by kernels that return at
    once where none does."""
    target, slope = target_logits(x, head, labels)
    target, slope = _counted(target, count), None if slope is None else _counted(slope, count)
    total = _counted(passes.fill(x, head, labels, target, TritonTiles(count), workspace, out), count)
    logps = (target - target) - torch.log1p(total)
    flags = (total > passes.OVERFLOW).to(torch.int8)
    normalizer = passes.log_sum_exp(target, total)
    every = rows.Rows(labels, target, slope, logps, normalizer, flags, None)
    exact_rows.launch(x, head, every, precision=_precision(), config=exact_config(_major(x.device)))
    anchor, share = passes.rounded(normalizer, logps.dtype)
    overflowed = flags.any()
    again = overflowed * (len(x) if count is None else count)
    passes.fill(x, head, labels, anchor, TritonTiles(again.to(torch.int32)), workspace, out)
    return logps, torch.where(overflowed, share, logps.exp())


def _counted(values: Tensor, count: Tensor | None) -> Tensor:
    """(N,) values with 0 past the count."""
    if count is None:
        return values
    return values.where(torch.arange(len(values), device=values.device) < count, 0)
