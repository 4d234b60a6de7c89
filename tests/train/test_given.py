"""SynPOTrainer from Python, as people know it from TRL: any model, any rows, one constructor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from made_videos import write_video
from synpo import FrameSampling, SynPOConfig, SynPOTrainer
from synpo.config import Config, ModelConfig, build
from synpo.model.adapter import load
from synpo.model.tiny import byte_tokenizer, save, tiny_text_model
from synpo.records import RecordError
from synpo.train.log import LOG_NAME
from synpo.train.run import train

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": f"No{'.' * i}"} for i in range(8)]
ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(q|v)_proj", task_type="CAUSAL_LM")


def conversational(row: dict[str, str]) -> dict[str, Any]:
    asked = [{"role": "user", "content": row["prompt"]}]
    said = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return {"prompt": asked, **said}


def settings(folder: Path, **more: Any) -> SynPOConfig:
    quiet = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "warmup_steps": 0, "num_train_epochs": 1}
    quiet |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    return SynPOConfig(str(folder), **quiet | more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model on the disk, as a hub id is one."""
    path = tmp_path_factory.mktemp("given") / "tiny-llm"
    tokenizer = byte_tokenizer()
    save(tiny_text_model(tokenizer), tokenizer, path)
    return path


def losses(trainer: SynPOTrainer) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def forms(name: str) -> Any:
    if name == "rows":
        return ROWS
    if name == "conversations":
        return [conversational(row) for row in ROWS]
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install datasets)")
    rows = ROWS if name == "datasets" else [conversational(row) for row in ROWS]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["rows", "conversations", "datasets", "datasets of conversations"])
def test_rows_of_every_kind_train_a_model_from_its_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    found = losses(SynPOTrainer(str(folder), settings(tmp_path), train_dataset=forms(kind), peft_config=ADAPTER))
    model = load(ModelConfig(path=str(folder), device="cpu")).model  # as people load it, with what they load beside it
    trainer = SynPOTrainer(
        model, settings(tmp_path / "b"), ROWS, processing_class=byte_tokenizer(), peft_config=ADAPTER
    )
    assert losses(trainer) == found and len(found) == 2 and found[1] < found[0]


def test_what_it_trains_is_what_the_command_line_trains(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {"learning_rate": 1e-2, "warmup_steps": 0, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    given |= {
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "held_out": 2,
        "samples": 0,
    }
    model, lora = (
        {"path": str(folder), "device": "cpu"},
        {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": r".*\.(q|v)_proj"},
    )
    config = build(Config, {"seed": 42, "model": model, "lora": lora, "train": given})
    result = train(config, None, tmp_path / "pairs.jsonl", tmp_path / "cli")
    trainer = SynPOTrainer(
        str(folder), settings(tmp_path / "api", held_out=2, samples=0), train_dataset=ROWS, peft_config=ADAPTER
    )
    trainer.train()
    ours, theirs = ((path).read_text() for path in (tmp_path / "api" / LOG_NAME, result.log))
    assert [json.loads(row).get("loss") for row in ours.splitlines()] == [
        json.loads(row).get("loss") for row in theirs.splitlines()
    ]
    assert len(trainer.eval_dataset) == 2 and "eval_loss" in ours  # type: ignore[arg-type]
    assert (tmp_path / "api" / "rewards.png").exists()


def test_it_is_a_trainer_of_transformers(folder: Path, tmp_path: Path) -> None:
    """Callbacks, evaluation by name, checkpoints with the tokenizer, resuming, saving, and a model trained whole."""
    seen: list[int] = []

    class Count(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    def trainer(epochs: int) -> SynPOTrainer:
        return SynPOTrainer(
            model=load(ModelConfig(path=str(folder), device="cpu")).model,
            args=settings(tmp_path, num_train_epochs=epochs, save_strategy="epoch", eval_strategy="epoch", samples=0),
            train_dataset=ROWS[:6],
            eval_dataset={"even": ROWS[6:], "odd": ROWS[7:]},
            processing_class=byte_tokenizer(),
            callbacks=[Count()],
        )

    trainer(1).train()
    assert seen == [1, 2] and (tmp_path / "checkpoint-2" / "tokenizer.json").exists()
    second = trainer(2)
    second.train(resume_from_checkpoint=True)
    assert seen == [1, 2, 3, 4]
    names = {name for row in second.state.log_history for name in row}
    assert {"eval_even_loss", "eval_odd_rewards/margins", "rewards/chosen"} <= names
    assert second.evaluate(second.eval_dataset["even"])["eval_loss"] < 0  # type: ignore[index,call-overload]
    second.save_model(str(tmp_path / "saved"))
    assert {p.name for p in (tmp_path / "saved").iterdir()} >= {"model.safetensors", "tokenizer.json"}


def test_videos_come_from_their_folder(tiny_captioner_path: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 90)
    rows = [{**row, "video": "a.mp4"} for row in ROWS[:4]]
    trainer = SynPOTrainer(
        str(tiny_captioner_path),
        settings(tmp_path / "run"),
        rows,
        peft_config=ADAPTER,
        videos=tmp_path,
        frames=FrameSampling(minimum=2, maximum=2),
    )
    assert trainer.train_dataset[0].vision["pixels"].shape[0] == 2  # type: ignore[index]
    assert all(torch.isfinite(torch.tensor(losses(trainer))))


def test_pairs_that_are_left_out_are_shown(folder: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [*ROWS, {"prompt": "Say", "chosen": "same", "rejected": "same"}]
    trainer = SynPOTrainer(str(folder), settings(tmp_path), rows)
    assert len(trainer.train_dataset) == 8  # type: ignore[arg-type]
    assert "dropped: chosen equals rejected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_dataset": []}, r"train_dataset: expected rows of pairs \(prompt, chosen, rejected\), got none"),
        (
            {"train_dataset": iter(ROWS)},
            "train_dataset: expected rows .*, got a list_iterator, which does not know their number; a list of what",
        ),
        ({"train_dataset": {"train": ROWS}}, "train_dataset: expected rows, got several sets of them: train; pick one"),
        ({"train_dataset": [*ROWS, {"prompt": "a"}]}, "train_dataset, row 8: no chosen and no rejected; found prompt"),
        ({"train_dataset": [{**ROWS[0], "video": "a.mp4"}]}, r"videos: a row has the video a\.mp4; give .*, videos=…"),
        ({"args": TrainingArguments("x")}, "args: expected a SynPOConfig, got TrainingArguments"),
        ({"model": torch.nn.Linear(2, 2)}, "expected a Hugging Face model with an output head, got Linear"),
        ({"model": tiny_text_model(byte_tokenizer())}, "processing_class: give the tokenizer or processor"),
    ],
)
def test_what_cannot_be_used_is_said(change: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    given = {"model": str(folder), "args": settings(tmp_path), "train_dataset": ROWS, "peft_config": None}
    with pytest.raises((ValueError, RecordError), match=message):
        SynPOTrainer(**given | change)


def test_one_configuration_serves_several_models(folder: Path, tmp_path: Path) -> None:
    """PEFT writes the modules of the first model into it."""
    every = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    SynPOTrainer(str(folder), settings(tmp_path), ROWS, peft_config=every)
    assert every.target_modules == "all-linear"


def test_a_second_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(load(ModelConfig(path=str(folder), device="cpu")).model, ADAPTER)
    with pytest.raises(ValueError, match="peft_config: the model has an adapter already"):
        SynPOTrainer(model, settings(tmp_path), ROWS, peft_config=ADAPTER)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda m: m.merge_adapter(), r"its adapter is merged into the weights, .*unmerge_adapter"),
        (lambda m: m.base_model.disable_adapter_layers(), r"nothing of it requires gradients.* is_trainable=True"),
        (lambda m: m.requires_grad_(False), "nothing of it requires gradients"),
    ],
    ids=["merged", "off", "loaded to be used"],
)
@pytest.mark.parametrize("loss_type", ["synpo", "dpo"])
def test_a_model_of_which_nothing_would_be_trained_is_refused(
    how: Any, message: str, loss_type: str, folder: Path, tmp_path: Path
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    how(model)
    args = SynPOConfig(str(tmp_path), loss_type=loss_type, use_cpu=True, disable_tqdm=True)
    trainer = SynPOTrainer(model, args, ROWS, processing_class=AutoTokenizer.from_pretrained(folder))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_importing_the_package_loads_nothing() -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'python'), str(ROOT)]}\n"
        "import synpo\n"
        "assert 'SynPOTrainer' in dir(synpo) and not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "try: synpo.SynpoTrainer\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "has no attribute 'SynpoTrainer'" in done.stdout, done.stderr
