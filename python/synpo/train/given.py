"""What SynPOTrainer is given, as people have it: any model and any rows → a CaptionModel and encoded pairs.

model       folder or hub id │ transformers model │ PeftModel │ CaptionModel
rows        datasets.Dataset │ sequence of mappings │ of records.Pair │ of EncodedPair
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, ProcessorMixin, set_seed

from synpo import terminal
from synpo.config import ConfigError, ModelConfig
from synpo.data.features import VisionCache
from synpo.data.pairs import hold_out, pairs_of
from synpo.data.reading import TokenCache
from synpo.data.tokenize import EncodedPair, PairDataset, PairEncoder
from synpo.model.adapter import CaptionModel, load, tokenizer_of
from synpo.model.peft_kinds import check_adapters
from synpo.model.vision import vision_for, vision_of
from synpo.records import Pair
from synpo.train.choices import half
from synpo.video import FrameSampling
from synpo_kernels.model import base_of

if TYPE_CHECKING:
    from synpo.train.arguments import SynPOConfig

WORKERS = 4  # processes that decode videos beside a GPU


def model_of(
    model: Any, processing_class: Any = None, peft_config: Any = None, *, cpu: bool, seed: int
) -> CaptionModel:
    """A CaptionModel of whatever was given, with a fresh adapter where `peft_config` says which.

    Args:
        model: a folder or hub id (loaded in the dtype it is stored in), a causal or image-text-to-text model of transformers,
            wrapped by PEFT or not, or a CaptionModel, which is returned as it is.
        processing_class: tokenizer or processor; None: those the model was loaded with.
        cpu: whether a folder or hub id is loaded to the CPU. seed: what a fresh adapter is drawn with.

    Raises:
        ConfigError: the model cannot be loaded, or an adapter is of a kind that is not supported here.
        ValueError: no model with an output head; a second adapter; no tokenizer.
    """
    lm = _model_of(model, processing_class, cpu)
    if hasattr(lm.model, "peft_config"):
        check_adapters(lm.model.peft_config.values())
    if peft_config is None:
        return lm
    check_adapters([peft_config])
    if hasattr(lm.model, "peft_config"):
        raise ValueError(
            "peft_config: the model has an adapter already; leave peft_config out to train it further, or merge it"
        )
    from peft import get_peft_model

    set_seed(seed)
    lm.model = get_peft_model(lm.model, copy.deepcopy(peft_config))  # PEFT writes the modules it found into it
    return lm


def name_of(model: Any) -> str:
    """The last part of a model's folder or hub id; of one that has none, its class."""
    base = (
        model
        if isinstance(model, str | os.PathLike)
        else base_of(model.model if isinstance(model, CaptionModel) else model)
    )
    path = os.fspath(base) if isinstance(base, str | os.PathLike) else base.config._name_or_path or type(base).__name__
    return os.path.basename(os.path.normpath(path))


def _model_of(model: Any, processing_class: Any, cpu: bool) -> CaptionModel:
    if isinstance(model, CaptionModel):
        return model
    if isinstance(model, str | os.PathLike):
        lm = load(ModelConfig(path=os.fspath(model), device="cpu" if cpu else "auto"))
        return lm if processing_class is None else _wrapped(lm.model, processing_class)
    base = base_of(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"expected a model of transformers, its folder or its hub id, got {type(model).__name__}")
    path = base.config._name_or_path
    if processing_class is None:
        if not path:
            raise ValueError(
                "processing_class: give the tokenizer or processor; the model does not say where it comes from"
            )
        processing_class = tokenizer_of(ModelConfig(path=path), base.config)
    return _wrapped(model, processing_class)


def _wrapped(model: Any, processing_class: Any) -> CaptionModel:
    base, tokenizer = base_of(model), processing_class
    if isinstance(processing_class, ProcessorMixin):
        tokenizer = processing_class.tokenizer
        tokenizer.chat_template = processing_class.chat_template or tokenizer.chat_template
        return CaptionModel(model, tokenizer, vision_of(base, processing_class))
    path = base.config._name_or_path
    if not path and getattr(base.config, "vision_config", None) is not None:
        raise ValueError("processing_class: give the processor; the model does not say where it comes from")
    return CaptionModel(model, tokenizer, vision_for(base, tokenizer, path))


class Data:
    """Turns rows into datasets of encoded pairs for one model and run.

    Args:
        lm: the model. args: the settings, their choices settled. videos, frames: as SynPOTrainer.
    """

    def __init__(self, lm: CaptionModel, args: SynPOConfig, videos: Path | None, frames: FrameSampling | None) -> None:
        self.lm, self.args, self.videos, self.frames = lm, args, videos, frames
        self.first = args.process_index == 0
        if args.cache_vision and not lm.vision_frozen:
            raise ConfigError(
                "train.cache_vision keeps what a frozen vision tower saw, and this one is trained: freeze it, or set "
                "train.cache_vision = false"
            )

    @cached_property
    def encoder(self) -> PairEncoder:
        args, features = self.args, None
        if args.cache_vision:
            features = VisionCache(Path(str(args.output_dir)) / "vision", self.lm, half(args))
        return PairEncoder(self.lm, self.videos, self.frames, args.max_length, args.max_completion_length, features)

    def both(self, taught: Any, held: Any) -> tuple[Any, Any]:
        """Datasets to train on and to evaluate on; where none is given for that, `args.held_out` of the first's pairs.

        Raises:
            ValueError: no rows, or rows whose number is not known; RecordError: a row that is no pair; as PairDataset.
        """
        if isinstance(taught, Mapping):
            raise ValueError(f"train_dataset: expected rows, got several sets of them: {', '.join(taught)}; pick one")
        taught = self._rows(taught, "train_dataset")
        if held is None and self.args.held_out and isinstance(taught, list) and isinstance(taught[0], Pair):
            taught, held = hold_out(taught, self.args.held_out)
        if isinstance(held, Mapping):
            return self._encoded(taught, True), {
                name: self._encoded(self._rows(rows, f"eval_dataset[{name!r}]"), False) for name, rows in held.items()
            }
        return self._encoded(taught, True), self._encoded(self._rows(held, "eval_dataset"), False)

    def _rows(self, data: Any, name: str) -> Any:
        """Pairs of rows; what is encoded already, or None, as it is."""
        if data is None or isinstance(data, PairDataset):
            return data
        if not hasattr(data, "__len__") or len(data) == 0:
            found = "none" if hasattr(data, "__len__") else f"a {type(data).__name__}, which does not know their number"
            more = "" if hasattr(data, "__len__") else "; a list of what it gives will do"
            raise ValueError(f"{name}: expected rows of pairs (prompt, chosen, rejected), got {found}{more}")
        return data if isinstance(data[0], EncodedPair) else pairs_of(data, name)

    def _encoded(self, data: Any, show: bool) -> Any:
        if not (isinstance(data, list) and isinstance(data[0], Pair)):
            return data
        if self.videos is None and (seen := next((pair for pair in data if pair.video), None)):
            raise ConfigError(
                f"videos: a row has the video {seen.video}; give the folder that its path is relative to, videos=…"
            )
        shown = show and self.first and not self.args.disable_tqdm
        room = int(self.args.cache_gigabytes * 2**30)
        cache = TokenCache() if self.args.cache_tokens else None
        dataset = PairDataset(
            self.encoder, data, cache_bytes=room, cache=cache, processes=self.args.world_size, progress=shown
        )
        if self.first and (shown or dataset.dropped):
            terminal.console(stderr=True).print(dataset.table())
        return dataset


def workers(dataset: Any, processes: int = 1) -> int:
    """How many processes read pairs for each training process: none where all are in memory, else what the cores allow."""
    if not isinstance(dataset, PairDataset) or dataset.in_memory:
        return 0
    return max(0, min(WORKERS, (os.cpu_count() or 1) // processes - 1))
