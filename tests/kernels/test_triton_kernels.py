"""What the Triton kernels promise beyond the results tested elsewhere: 64-bit addresses, whole coverage, two ways to read,
the right GPU of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from synpo_kernels import FusedLinearSynPOLoss, contrastive_sample, linear_logprobs
from synpo_kernels.backends import gpu
from synpo_kernels.head import Head
from synpo_kernels.kernels import exact_rows, exp_tile, launch, product
from synpo_kernels.kernels.configs import CHIPS, INTERPRETER, TileConfig, exact_config, product_config, tile_config
from synpo_kernels.kernels.rows import Rows, scale_rows
from synpo_kernels.kernels.tiles import describable

STRIDE = (1 << 30) + 64  # elements between rows: row 2 lies past 2³¹


@pytest.fixture
def far_apart(tmp_path, device) -> torch.Tensor:
    """(3, 16) bf16 rows 2³⁰ elements apart, in a sparse file that takes a few pages of disk."""
    if device.type == "cuda":
        whole = torch.empty(2 * STRIDE + 16, dtype=torch.bfloat16, device=device)
    else:
        whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * STRIDE + 16, dtype=torch.bfloat16)
    rows = whole.as_strided((3, 16), (STRIDE, 1))
    rows.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    return rows


def exponentials(x, head, labels, anchor, at_target, out, sums, *, first_row=0, add=0, **options) -> None:
    """One launch over all of x and the head, by three programs."""
    run = exp_tile.bind(x, head, labels, anchor, at_target, out, sums, write=True, precision="ieee", **options)
    run((3,), N=len(x), V=len(head.weight), first_x=0, first_row=first_row, first_column=0, add=add)


@pytest.mark.parametrize("which", ["x", "w", "out"])
def test_addresses_past_two_to_the_31(which, far_apart, device) -> None:
    near = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    x, w = (far_apart, near) if which == "x" else (near, far_apart)
    labels = torch.tensor([0, 1, 2], device=device)
    anchor = torch.zeros(3, device=device)
    out = torch.empty(3, 3, dtype=torch.bfloat16, device=device)
    if which == "out":
        x, w, out = near, near.flip(0), far_apart[:, :3]
    sums = torch.empty(1, 3, device=device)
    expected = (x.float() @ w.float().T).exp().fill_diagonal_(0)
    config = TileConfig(16, 16, 16, 1, 1, 1)
    exponentials(x, Head(w), labels, anchor, None, out, sums, config=config)
    torch.testing.assert_close(sums[0], expected.sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("which", ["x", "w"])
def test_exact_addresses_past_two_to_the_31(which, far_apart, device) -> None:
    near = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    x, w = (far_apart, near) if which == "x" else (near, far_apart)
    labels, flags = torch.tensor([0, 1, 2], device=device), torch.ones(3, dtype=torch.int8, device=device)
    z = x.float() @ w.float().T
    logps, direction = torch.empty(3, device=device), torch.empty(3, 16, dtype=torch.bfloat16, device=device)
    normalizer, target = torch.empty(3, dtype=torch.float64, device=device), z.diagonal().contiguous()
    rows = Rows(labels, target, None, logps, normalizer, flags, direction)
    exact_rows.launch(x, Head(w), rows, precision="ieee", config=exact_config(None))
    torch.testing.assert_close(logps, z.log_softmax(1).diagonal(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizer.float(), z.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(direction.float(), w.float() - z.softmax(1) @ w.float(), rtol=2e-2, atol=2e-2)


def test_only_flagged_rows_are_touched(device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 20, generator=generator).to(device) for n in (40, 33))
    labels = torch.arange(40, device=device) % 33
    flags = torch.zeros(40, dtype=torch.int8, device=device)
    flags[[3, 37]] = 1  # two blocks of rows, one block between without a flag
    logps, normalizer = torch.full((40,), 7.0, device=device), torch.full((40,), 7.0, device=device).double()
    direction = torch.full((40, 20), 7.0, device=device)
    z = x @ w.T
    target = z.gather(1, labels[:, None])[:, 0].contiguous()
    rows = Rows(labels, target, None, logps, normalizer, flags, direction)
    exact_rows.launch(x, Head(w), rows, precision="ieee", config=INTERPRETER)
    kept = flags == 0
    assert (logps[kept] == 7.0).all() and (normalizer[kept] == 7.0).all() and (direction[kept] == 7.0).all()
    expected = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logps[~kept], expected[~kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizer[~kept].float(), z.logsumexp(1)[~kept], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(direction[~kept], (w[labels] - z.softmax(1) @ w)[~kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_every_tile_is_visited_once(group, device) -> None:
    """Counts instead of values: each element of out and sums is written, whatever the grouping; the rest is not."""
    n, v = 50, 70
    x, w = torch.zeros(n, 16, device=device), torch.zeros(v, 16, device=device)
    out = torch.full((n, v + 5), torch.nan, device=device)
    sums = torch.full((3, n), torch.nan, device=device)
    labels = torch.full((n,), -1, device=device)  # not in this chunk
    config = TileConfig(16, 32, 16, group, 1, 1)
    exponentials(x, Head(w), labels, torch.zeros(n, device=device), None, out[:, :v], sums, config=config)
    assert (out[:, :v] == 1).all() and out[:, v:].isnan().all()
    assert sums.T.tolist() == [[32.0, 32.0, 6.0]] * n
    exponentials(x, Head(w), labels, torch.zeros(n, device=device), None, out[:, :v], sums, config=config, add=1)
    assert sums.T.tolist() == [[64.0, 64.0, 12.0]] * n and (out[:, :v] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_times_their_factors(dtype, device) -> None:
    """In place, into another format, and each row where an order says; what lies between the rows is left alone."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(21, 1030, generator=generator).to(device, dtype)
    factor, order = (
        torch.randn(21, generator=generator).to(device),
        torch.randperm(40, generator=generator)[:21].to(device),
    )
    expected = (values.float() * factor[:, None]).bfloat16()
    out = torch.full((40, 1032), 7.0, dtype=torch.bfloat16, device=device)
    scale_rows(values, factor, out[:, :1030], order)
    assert torch.equal(out[order, :1030], expected) and (out[:, 1030:] == 7.0).all() and (out == 7.0).all(1).sum() == 19
    wide = values.float()
    scale_rows(wide, factor, wide)
    assert torch.equal(wide.bfloat16(), expected)


@pytest.mark.parametrize("first_row", [0, 20])
@pytest.mark.parametrize("counted", [0, 1, 16, 33, 50])
@pytest.mark.parametrize("shape", [(50, 70, 40), (50, 33, 1)], ids=str)
def test_counted_product(shape, counted, first_row, device) -> None:
    """Rows past the count hold NaN; they enter no sum and their result is left alone. Rows of b before `first_k` neither."""
    n, v, d = shape
    generator = torch.Generator().manual_seed(0)
    slice_, w, x = (torch.randn(*size, generator=generator).to(device) for size in ((n, v), (v + 3, d), (n, d)))
    slice_[counted:], x[counted:], w[:3] = torch.nan, torch.nan, torch.nan
    count = torch.tensor(first_row + counted, dtype=torch.int32, device=device)
    options = {"precision": "ieee", "config": INTERPRETER}
    for add in (1, 0):
        rows, columns = torch.full((n, d), 7.0, device=device), torch.full((v, d), 7.0, device=device)
        run = product.bind(slice_, w, rows, count, sum_counted=False, **options)
        run((3,), M=n, K=v, first_row=first_row, first_k=3, add=add)
        torch.testing.assert_close(rows[:counted], 7 * add + slice_[:counted] @ w[3:], rtol=1e-5, atol=1e-5)
        assert (rows[-(-counted // 16) * 16 :] == 7).all()
        run = product.bind(slice_, x, columns, count, sum_counted=True, **options)
        run((3,), M=v, K=n, first_row=first_row, first_k=0, add=add)
        torch.testing.assert_close(columns, 7 * add + slice_[:counted].T @ x[:counted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("programs", "n", "counted", "depth"),
    [
        (1, 45, 45, 300),
        (5, 45, 45, 1000),
        (5, 100, 90, 300),
        (13, 30, 30, 900),
        (40, 3, 3, 700),
        (50, 100, 90, 300),
        (3, 45, 0, 50),
    ],
)
def test_programs_share_the_steps_of_a_product(programs, n, counted, depth, device) -> None:
    """Fewer tiles than programs and more; parts that begin and end anywhere; the turns are 0 for the next launch."""
    generator = torch.Generator().manual_seed(0)
    slice_, w, x = (torch.randn(*size, generator=generator).to(device) for size in ((n, depth), (depth, 40), (n, 40)))
    turn = torch.zeros(2 * programs, dtype=torch.int32, device=device)
    count = torch.tensor(counted, dtype=torch.int32, device=device)
    options = {"precision": "ieee", "config": replace(INTERPRETER, share=True)}
    for sum_counted, b, expected in (
        (False, w, slice_[:counted].double() @ w.double()),
        (True, x, slice_[:counted].T.double() @ x[:counted].double()),
    ):
        m, k = slice_.T.shape if sum_counted else slice_.shape
        found = torch.full((m, 40), 7.0, device=device)
        run = product.bind(slice_, b, found, count, turn, sum_counted=sum_counted, **options)
        for add in (0, 1):
            run((programs,), M=m, K=k, first_row=0, first_k=0, add=add)
            torch.testing.assert_close(found[: len(expected)].double(), (1 + add) * expected, rtol=1e-4, atol=1e-4)
            assert not turn.any()


@pytest.mark.parametrize(("counted", "written"), [(0, 0), (1, 16), (16, 16), (17, 32), (40, 40)])
def test_rows_past_the_count_are_not_computed(counted, written, device) -> None:
    """Tiles of 16 rows: one that holds no counted row writes nothing; in the last that does, the others are 0."""
    n, v, first_row = 40, 50, 100
    x, w = torch.zeros(n, 16, device=device), torch.zeros(v, 16, device=device)
    labels, anchor = torch.full((n,), -1, device=device), torch.zeros(n, device=device)
    out, sums = torch.full((n, v), torch.nan, device=device), torch.full((2, n), torch.nan, device=device)
    count = torch.tensor(first_row + counted, dtype=torch.int32, device=device)
    options = {"config": INTERPRETER, "count": count, "first_row": first_row}
    exponentials(x, Head(w), labels, anchor, None, out, sums, **options)
    assert (out[:counted] == 1).all() and (out[counted:written] == 0).all() and out[written:].isnan().all()
    assert (sums.sum(0)[:counted] == v).all() and sums[:, written:].isnan().all()


def test_partition_keeps_the_order(device) -> None:
    rows, count = gpu.partition(torch.tensor([-100, 5, -100, 0, 2, -100], device=device), -100)
    assert rows.tolist() == [1, 3, 4, 5, 2, 0] and count.item() == 3 and count.dtype == torch.int32


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [0, 1, 2048, 5000])
def test_partition_of_many_rows(n, ignored, device) -> None:
    labels = torch.where(torch.rand(n, generator=torch.Generator().manual_seed(0)) < ignored, -(2**40), 7)
    rows, count = gpu.partition(labels.to(device), -(2**40))
    counted = (labels == 7).nonzero()[:, 0]
    assert count.item() == len(counted) and rows.dtype == torch.int64
    assert rows[: len(counted)].tolist() == counted.tolist() and rows.sort().values.tolist() == list(range(n))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(33, 70, 48), (16, 32, 8), (5, 33, 24), (1, 1, 16)], ids=str)
def test_descriptors_and_pointers_agree_bitwise(shape, dtype, device) -> None:
    """Ragged in N, V and D; x a slice of wider rows. Past the edges descriptors read 0, pointers a real row."""
    n, v, d = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d + 8, generator=generator).to(device, dtype)[:, :d]
    w, bias = (torch.randn(*size, generator=generator).to(device, dtype) for size in ((v, d), (v,)))
    labels = torch.randint(0, 2 * v, (n,), generator=generator).to(device)
    anchor, at_target = (torch.randn(n, generator=generator).to(device) for _ in range(2))
    count = torch.tensor(max(1, n - 20), dtype=torch.int32, device=device)
    if device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("needs a GPU with a copy engine (compute capability 9.0 or newer)")
    found = []
    for descriptors in (False, True):
        config = replace(INTERPRETER, descriptors=descriptors)
        out = torch.zeros(n, -(-v // 16) * 16, dtype=dtype, device=device)[:, :v]  # rows that descriptors can write
        sums = torch.zeros(-(-v // 32), n, device=device)
        head = Head(w, bias, softcap=3.0, logit_scale=0.5)
        exponentials(x, head, labels, anchor, at_target, out, sums, config=config, count=count)
        found.append((out, sums))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    z = 3 * torch.tanh((x.double() @ w.double().T + bias.double()) / 6)
    expected = (z - anchor.double()[:, None]).exp()
    expected = expected.masked_fill(torch.arange(v, device=device) == labels[:, None], 0)[: count.item()]
    torch.testing.assert_close(found[1][1].sum(0)[: count.item()].double(), expected.sum(1), rtol=1e-5, atol=1e-6)


def test_what_the_copy_engine_can_read(device) -> None:
    whole = torch.zeros(40, 64, dtype=torch.bfloat16, device=device)
    assert describable(whole) and describable(whole[3:, 8:40]) and describable(whole[::2])
    assert not describable(whole.T)  # rows not contiguous
    assert not describable(whole[:, 1:])  # base off by 2 bytes
    assert not describable(torch.zeros(40, 60, dtype=torch.bfloat16, device=device))  # rows of 120 bytes
    assert not describable(whole[:1].expand(40, -1)) and not describable(whole[:0])
    assert not describable(whole.as_strided((40, 64), (8, 1)))  # rows that overlap


@pytest.mark.parametrize(("major", "known"), [(7, 8), (8, 8), (9, 9), (10, 10), (11, 10), (12, 12), (13, 12)])
def test_a_chip_without_an_entry_takes_an_older_one(major, known) -> None:
    chip = CHIPS[known]
    assert tile_config(major, 2, softcap=False) is chip.half
    assert tile_config(major, 2, softcap=True) is product_config(major, 2, 8192, 3584, 132) is chip.half_small
    assert tile_config(major, 4, softcap=False, describable=True) is chip.full
    assert tile_config(major, 4, softcap=True) is chip.full_small
    assert product_config(major, 4, 8192, 3584, 132) is chip.full_product
    for softcap, described, pointers in (
        (False, chip.described, chip.half),
        (True, chip.described_small, chip.half_small),
    ):
        expected = described if known in (9, 10) else pointers
        assert tile_config(major, 2, softcap=softcap, describable=True) is expected


def test_a_product_takes_tiles_that_fill_the_chip() -> None:
    assert product_config(9, 2, 8192, 3584, 132, describable=True) == replace(CHIPS[9].described, share=True)
    assert product_config(9, 2, 512, 3584, 132, describable=True) is CHIPS[9].described_small
    assert product_config(9, 2, 8192, 1, 132).block_v == 32, "a bias has one column"


def test_without_a_tensor_copy_engine_nothing_is_described() -> None:
    for major, chip in CHIPS.items():
        assert (chip.described is not None) == (chip.described_small is not None) == (major in (9, 10))
    assert CHIPS[12] is CHIPS[8]  # its 99 KiB of shared memory hold no tile of CHIPS[10]


def every_path(device: torch.device) -> list[torch.Tensor]:
    """The results of every op that launches kernels, forward and backward, on `device`."""
    generator = torch.Generator().manual_seed(0)
    x, w, u, b = (torch.randn(*size, generator=generator).to(device) for size in ((12, 8), (30, 8), (12, 2), (30, 2)))
    labels = torch.randint(0, 30, (12,), generator=generator).to(device)
    labels[5] = -100
    found = []
    for weight, more in ((w, {}), (w.clone().requires_grad_(), {}), (w, {"low_rank": (u, b.requires_grad_())})):
        hidden = x.clone().requires_grad_()
        logps = linear_logprobs(hidden, weight, labels, backend="triton", **more)
        found += [logps.detach(), *torch.autograd.grad(logps.sum(), hidden)]
        module = FusedLinearSynPOLoss(backend="triton")
        loss = module(hidden.view(4, 3, 8), weight, labels.view(4, 3)).loss
        found += [loss.detach(), *torch.autograd.grad(loss, hidden)]
    uniform = torch.full((12,), 0.4, dtype=torch.float64, device=device)
    return [*found, *contrastive_sample(x @ w.T, None, uniform=uniform, top_k=4, backend="triton")]


def test_kernels_are_launched_on_the_device_of_their_tensors(device, monkeypatch) -> None:
    """Triton takes the current device, which need not be that of the head: a model may be spread over several."""
    inside: list[int] = []

    class Watched(torch.cuda.device_of):
        def __enter__(self) -> None:
            inside.append(self.idx)
            super().__enter__()

        def __exit__(self, *error) -> None:
            inside.pop()
            super().__exit__(*error)

    monkeypatch.setattr(torch.cuda, "device_of", Watched)
    launched: set[str] = set()
    real = launch.Bound.__call__

    def watched(self, *arguments, **numbers) -> None:
        assert inside, f"{self.name} was launched on whatever device is current"
        launched.add(self.name)
        real(self, *arguments, **numbers)

    monkeypatch.setattr(launch.Bound, "__call__", watched)
    monkeypatch.setattr("synpo_kernels.ops.logprobs._used", lambda labels, ignore_index: ignore_index)  # as on a GPU
    every_path(device)
    assert launched == {
        "partition_kernel",
        "begin_rows_kernel",
        "exp_tile_kernel",
        "counted_product_kernel",
        "finish_rows_kernel",
        "exact_rows_kernel",
        "sequence_sums_kernel",
        "pair_loss_kernel",
        "group_bests_kernel",
        "draw_kernel",
        "scale_kernel",
        "scale_rows_kernel",
    }


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_while_the_first_is_current() -> None:
    for a, b in zip(every_path(torch.device("cuda:0")), every_path(torch.device("cuda:1"))):
        assert torch.equal(a, b.to(a.device))
