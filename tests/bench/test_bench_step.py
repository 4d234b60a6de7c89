"""The step benchmark: right providers get times and memory, wrong ones a reason, absent ones are listed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kinds, measure, step, steps

SIZE = {"hidden": 64, "layers": 1, "vocab": 512, "prompt": 24, "answer": 5, "pairs": 2}
TINY = [*(f"--{name}={value}" for name, value in SIZE.items()), "--device=cpu", "--time-budget=0.1"]


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}


def test_everyone_is_checked_timed_and_weighed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*TINY, "--out", str(tmp_path / "step")]) == 0
    rows = rows_of(tmp_path / "step")
    assert set(rows) == {"synpo shared", "synpo padded", "synpo usual", "dpo shared", "dpo trl", "dpo trl rows"}
    for name, row in rows.items():
        if "trl" in name and row["status"] == "absent":
            assert "trl" in row["reason"] or "No module" in row["reason"]
            continue
        assert row["status"] == "ok", row
        assert row["gradient_error"] < 1e-4
        assert row["runs"] >= 3
        assert row["pairs_per_second"] == pytest.approx(2000 / row["p50_ms"])
        assert row["peak_mib"] > 0 and 0 < row["chip_share"] < 1 and row["kinds"] is None
        assert row["plan_mib"] is None or 0.6 < row["peak_mib"] / row["plan_mib"] < 1.2
    assert all(rows[name]["plan_mib"] for name in ("synpo shared", "synpo padded"))
    printed = capsys.readouterr().out
    assert "synpo shared" in printed and "x trl" in printed
    assert (tmp_path / "step.csv").read_text().count("\n") == 7


def test_a_provider_with_another_loss_shows_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(size: Any, model: Any, device: torch.device) -> steps.Step:
        built = steps._ours("synpo", True, size, model, device)
        loss = built.loss
        built.loss = lambda: 1.01 * loss()
        return built

    monkeypatch.setattr(steps, "providers", lambda device: iter([steps.Provider("synpo other", "synpo", other, "")]))
    assert step.main([*TINY, "--out", str(tmp_path / "step")]) == 1
    (row,) = rows_of(tmp_path / "step").values()
    assert row["status"] == "wrong"
    assert "loss off by 1.0e-02" in row["reason"]
    assert row["p50_ms"] is None


def test_a_peer_that_fails_at_full_size_is_listed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(size: Any, model: Any, device: torch.device) -> steps.Step:
        if size.prompt == SIZE["prompt"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n28 GiB")
        return steps._usual("synpo", size, model, device)

    def odd(size: Any, model: Any, device: torch.device) -> steps.Step:
        raise AssertionError  # without a word

    ours = next(steps.providers())
    peers = [steps.Provider("peer greedy", "synpo", greedy, ""), steps.Provider("peer odd", "synpo", odd, ""), ours]
    monkeypatch.setattr(steps, "providers", lambda device: iter(peers))
    assert step.main([*TINY, "--out", str(tmp_path / "step")]) == 0
    rows = rows_of(tmp_path / "step")
    assert rows["peer greedy"]["status"] == "failed" and "out of memory" in rows["peer greedy"]["reason"]
    assert rows["peer odd"]["status"] == "absent" and rows["peer odd"]["reason"].startswith("AssertionError")
    assert rows[ours.name]["status"] == "ok" and rows[ours.name]["runs"] >= 3
    assert "peer greedy        failed: OutOfMemoryError" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["synpo", "dpo"])
def test_arithmetic_is_what_torch_counts(objective: str) -> None:
    """Products, that is; of attention torch counts what a mask hides, and the head's are in an op of its own."""
    from torch.utils.flop_counter import FlopCounterMode

    size, device = steps.Size(64, 2, 512, 24, 5, 2, "float32"), torch.device("cpu")
    built = steps._ours(objective, True, size, steps.adapted(size, device), device)
    built.loss()  # the first of a model asks it about its head
    with FlopCounterMode(display=False) as counter:
        built.loss().backward()
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")
    passes = 3 if objective == "dpo" else 2
    head = passes * 2 * (2 * 2 * 5) * 64 * 512
    attention = 4 * 2 * 2 * 64 * (29 * 30 // 2 + 5 * 24 + 5 * 6 // 2) * (4 if objective == "dpo" else 3)
    assert steps.arithmetic(size, objective) - head - attention == pytest.approx(products, rel=1e-3)
    nothing = steps.Size(64, 0, 512, 24, 5, 2, "float32")
    assert steps.arithmetic(nothing, objective) == head


def test_on_a_gpu_everyone_has_a_row_on_equal_settings() -> None:
    rows = {provider.name: provider for provider in steps.providers("cuda")}
    for name, provider in rows.items():
        if provider.own_layers:
            assert provider.equal in rows and provider.equal.endswith(", kept") == name.endswith(", kept")
    assert {"synpo shared", "synpo shared, kept", "dpo trl", "dpo trl, kept", "dpo trl, liger"} <= rows.keys()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_256x160_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x32x8", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("exp_tile_kernel", "loss"),
        (
            "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
            "casts and copies",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>>",
            "elementwise",
        ),
        ("_rms_norm_forward_kernel", "elementwise"),
        ("_swiglu_backward_kernel", "elementwise"),
        ("ncclDevKernel_AllReduce", "other"),
        ("aten::addmm", "products"),
    ],
)
def test_kernels_are_of_a_kind(kernel: str, kind: str) -> None:
    assert kinds.kind_of(kernel) == kind


def test_a_profile_is_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main([*TINY, "--providers", "synpo shared", "--profile", "--out", str(tmp_path / "step")]) == 0
    (row,) = rows_of(tmp_path / "step").values()
    assert row["kinds"]["products"][0] > 0 and row["kinds"]["attention"][1] > 0
    assert "synpo shared, one step by kind" in capsys.readouterr().out


def test_a_run_that_is_cut_off_leaves_the_rows_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, *_ = steps.providers()

    def killed(size: Any, model: Any, device: torch.device) -> steps.Step:
        raise KeyboardInterrupt

    after = steps.Provider("synpo other", "synpo", killed, "")
    monkeypatch.setattr(steps, "providers", lambda device: iter([ours, after]))
    with pytest.raises(KeyboardInterrupt):
        step.main([*TINY, "--out", str(tmp_path / "step")])
    (row,) = rows_of(tmp_path / "step").values()
    assert row["provider"] == ours.name and row["status"] == "ok" and row["gradient_error"] < 1e-4


def test_tensors_alive_are_added_up() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(1 << 20)  # 4 MiB
        second = first + first
        del first
        return second.double()[:1].clone()

    peak = measure.peak_tensor_bytes(run, torch.device("cpu"))
    assert abs(peak - 12 * 2**20) < 2**12, "two of 4 MiB, or one and its double of 8"
