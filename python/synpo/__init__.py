"""SynPO: from videos to a preference-tuned captioner. The loss kernels live in `synpo_kernels`.

    from synpo import SynPOConfig, SynPOTrainer
    trainer = SynPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", args=SynPOConfig("run"), train_dataset=rows)
    trainer.train()

Importing it loads nothing; a name is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synpo.train.arguments import SynPOConfig
    from synpo.train.trainer import SynPOTrainer
    from synpo.video import FrameSampling

__version__ = "0.1.0"

_HOMES = {
    "FrameSampling": "synpo.video",
    "SynPOConfig": "synpo.train.arguments",
    "SynPOTrainer": "synpo.train.trainer",
}
__all__ = ["FrameSampling", "SynPOConfig", "SynPOTrainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
