"""What goes wrong in the middle of a run: it ends in words that name the setting, or it goes on and says so."""

import json
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import data_loader
from torch.utils._python_dispatch import TorchDispatchMode

from made_videos import write_video
from synpo.config import Config, ConfigError, ModelConfig, build
from synpo.data import tokenize
from synpo.data.tokenize import PairDataset, PairEncoder
from synpo.model.adapter import CaptionModel, load
from synpo.model.tiny import byte_tokenizer, tiny_text_model
from synpo.records import Pair, write_records
from synpo.train.checkpoint import fault
from synpo.train.given import WORKERS, workers
from synpo.train.run import settings as settings_of
from synpo.train.run import train
from synpo.train.trainer import DivergenceError, MemoryLimitError
from synpo.video import VideoError


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_spoils_anything(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    trainer = trainer_for(text_lm, pairs_for(text_lm), num_train_epochs=3, save_strategy="steps", save_steps=1)
    parameter = next(p for p in text_lm.model.parameters() if p.requires_grad)
    before: list[torch.Tensor] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step < 3:
            return gradient
        before.append(parameter.detach().clone())
        return gradient / 0.0

    parameter.register_hook(spoil)
    with pytest.raises(
        DivergenceError, match=r"step 3: the loss is finite, but its gradient is not; .*checkpoint-3, is"
    ):
        trainer.train()
    assert torch.equal(parameter, before[0]) and bool(torch.isfinite(parameter).all())
    folder = Path(trainer.args.output_dir)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert fault(folder / "checkpoint-3") is None


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_norm_that_is_logged_is_that_before_clipping(
    clip: float, text_lm: CaptionModel, pairs_for: Any, trainer_for: Any
) -> None:
    trainer = trainer_for(text_lm, pairs_for(text_lm), loss_type="sft", max_grad_norm=clip, num_train_epochs=1)
    squares: list[float] = []
    for parameter in text_lm.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: squares.append(float(g.square().sum())))
    trainer.train()
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    half = len(squares) // 2
    assert logged == pytest.approx([sum(squares[:half]) ** 0.5, sum(squares[half:]) ** 0.5], rel=1e-4)
    assert logged[0] > 1


def test_a_step_that_does_not_fit_names_what_to_lower(text_lm: CaptionModel, pairs_for: Any, trainer_for: Any) -> None:
    pairs = pairs_for(text_lm)
    trainer = trainer_for(text_lm, pairs, per_device_train_batch_size=4)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    trainer.pair_objective._forward = full
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    words = rf"step 0: 4 pairs, {tokens} tokens, do not fit in .*cpu \(CUDA out of memory.*20.00 GiB\.\); lower .*batch_size"
    with pytest.raises(MemoryLimitError, match=words):
        trainer.train()


def test_batches_wait_on_the_host_until_their_turn(
    text_lm: CaptionModel, pairs_for: Any, trainer_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate would move the pixels of all micro-batches of a step to the GPU at once."""
    moved: list[int] = []
    real = data_loader.send_to_device
    monkeypatch.setattr(data_loader, "send_to_device", lambda batch, *a, **k: moved.append(1) or real(batch, *a, **k))
    trainer = trainer_for(text_lm, pairs_for(text_lm), gradient_accumulation_steps=2)
    trainer.eval_dataset = pairs_for(text_lm)
    trainer.train()
    assert not moved
    trainer.evaluate()
    assert moved  # the patch is where batches are moved


def test_a_metric_that_is_not_there_is_named_before_training(
    videos: Path, tmp_path: Path, tiny_captioner_path: Path
) -> None:
    extra = {"held_out": 2, "samples": 0, "save_strategy": "epoch", "load_best_model_at_end": True}
    settings = config_of(tiny_captioner_path, **extra, metric_for_best_model="rewards/margin")
    words = r"metric_for_best_model: evaluation gives no 'rewards/margin'; did you mean 'rewards/margins'"
    with pytest.raises(ConfigError, match=words):
        train(settings, videos / "videos", videos / "pairs.jsonl", tmp_path)
    assert not (tmp_path / "train_log.jsonl").exists()


def test_evaluation_takes_the_batches_of_training(tmp_path: Path) -> None:
    assert settings_of(config_of(tmp_path, held_out=2), tmp_path).per_device_eval_batch_size == 2
    assert settings_of(config_of(tmp_path, per_device_eval_batch_size=3), tmp_path).per_device_eval_batch_size == 3


def test_a_deepspeed_file_that_would_clip_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zero2.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    monkeypatch.setattr("accelerate.utils.DeepSpeedPlugin.set_deepspeed_weakref", lambda self: None)  # needs DeepSpeed
    given = Config(model=ModelConfig(device="cpu"), train={"max_grad_norm": 0.3})
    for clipping in ("auto", 0.3):
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": clipping}))
        assert settings_of(given, tmp_path).max_grad_norm == 0.3
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    with pytest.raises(ConfigError, match=r'max_grad_norm = 0\.3 would not count.*"gradient_clipping": "auto"'):
        settings_of(given, tmp_path)


def test_float16_weights_are_not_trained_themselves(pairs_for: Any, trainer_for: Any) -> None:
    tokenizer = byte_tokenizer()
    lm = CaptionModel(tiny_text_model(tokenizer).half(), tokenizer, None)
    with pytest.raises(ConfigError, match=r"those that are trained here are float16: .*model\.dtype = float32"):
        trainer_for(lm, pairs_for(lm), fp16=True)


class Looks(TorchDispatchMode):
    """Counts the values read from a device, each of which waits for it; but for those on the host also where there is a GPU:
    of the batch while it is put together, and of checks that the kernels make on a CPU alone."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            files = {Path(frame.filename) for frame in traceback.extract_stack()}
            self.count += not any(f.name == "collate.py" or f.parent.name == "synpo_kernels" for f in files)
        return function(*args, **(kwargs or {}))


def test_a_micro_batch_waits_for_the_device_but_once(text_lm: CaptionModel, pairs_for: Any, trainer_for: Any) -> None:
    """Counted as the difference that more micro-batches make, whatever a step and a log cost."""
    counts = []
    for accumulation in (2, 4):
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "logging_steps": 100}
        trainer = trainer_for(text_lm, pairs_for(text_lm, 8), f"run-{accumulation}", **settings, max_steps=2)
        with Looks() as looks:
            trainer.train()
        counts.append(looks.count)
    assert (counts[1] - counts[0]) / 4 <= 1


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """videos/ with four clips, and pairs.jsonl with two pairs about each."""
    root = tmp_path_factory.mktemp("failures")
    (root / "videos").mkdir()
    for k in range(4):
        write_video(root / "videos" / f"{k}.mp4", shade=50 * k)
    write_records(root / "pairs.jsonl", [Pair(f"p{i}", f"{i % 4}.mp4", "What?", f"Yes {i}.", "No.") for i in range(8)])
    return root


def config_of(path: Path, **train: Any) -> Config:
    values = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    values |= {"cache_gigabytes": 0.0, "disable_tqdm": True, "save_strategy": "no"}
    model = {"path": str(path), "device": "cpu"}
    frames = {"fps": 1, "minimum": 2, "maximum": 2}
    return build(Config, {"model": model, "frames": frames, "lora": {"r": 2}, "train": values | train})


def breaks(patch: pytest.MonkeyPatch, *names: str) -> None:
    """These videos can be opened, and not decoded."""
    real = tokenize.read_frames

    def read_frames(path: Any, times: Any) -> Any:
        if Path(path).name in names:
            raise VideoError(f"{path} cannot be decoded: broken further on")
        return real(path, times)

    patch.setattr(tokenize, "read_frames", read_frames)


@pytest.mark.parametrize(
    "extra", [{}, {"dataloader_num_workers": 2}, {"loss_type": "dpo", "precompute_reference": True}]
)
def test_a_video_that_breaks_in_the_middle_costs_its_pairs_and_not_the_run(
    extra: dict[str, Any], videos: Path, tmp_path: Path, tiny_captioner_path: Path, monkeypatch: Any, capfd: Any
) -> None:
    breaks(monkeypatch, "1.mp4")
    result = train(config_of(tiny_captioner_path, **extra), videos / "videos", videos / "pairs.jsonl", tmp_path)
    assert (result.metrics["steps"], result.metrics["pairs"]) == (8, 8)
    said = capfd.readouterr().err
    for name, other in (("p1", "p2"), ("p5", "p6")):
        (told,) = [text for text in result.metrics["unreadable"] if text.startswith(f"pair {name}: video unreadable")]
        assert told.endswith(f"broken further on; pair {other} stands in for it")
        assert said.count(f"warning: {told}") == 1
    assert len(result.metrics["unreadable"]) == 2
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))


def test_a_disk_that_is_gone_ends_the_run(
    videos: Path, tmp_path: Path, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch, *(f"{k}.mp4" for k in range(4)))
    with pytest.raises(
        VideoError, match=r"8 pairs in a row cannot be read any more, the first: pair p\d: video unreadable"
    ):
        train(config_of(tiny_captioner_path), videos / "videos", videos / "pairs.jsonl", tmp_path)


def test_a_video_is_opened_once_to_be_looked_at(
    videos: Path, tiny_captioner_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config_of(tiny_captioner_path)
    lm = load(settings.model)
    pairs = [Pair(f"p{i}", f"{i}.mp4", "What?", "Yes.", "No.") for i in range(4)]
    opened: list[Any] = []
    real = tokenize.probe
    monkeypatch.setattr(tokenize, "probe", lambda path: opened.append(path) or real(path))
    far = PairDataset(PairEncoder(lm, videos / "videos", settings.frames), pairs, cache_bytes=0, progress=False)
    assert len(opened) == 4
    near = PairDataset(PairEncoder(lm, videos / "videos", settings.frames), pairs, progress=False)
    assert far[2].prompt.tolist() == near[2].prompt.tolist()
    assert (workers(near), near.in_memory, far.in_memory) == (0, True, False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert (workers(far), workers(far, 8), workers(far, 16), workers(far, 32)) == (WORKERS, 1, 0, 0)


def test_settings_of_reading_may_change_when_a_run_goes_on(
    videos: Path, tmp_path: Path, tiny_captioner_path: Path
) -> None:
    settings = config_of(tiny_captioner_path, num_train_epochs=1)
    arguments = (videos / "videos", videos / "pairs.jsonl", tmp_path)
    result = train(settings, *arguments)
    assert train(replace(settings, train=settings.train | {"dataloader_num_workers": 1}), *arguments) == result
