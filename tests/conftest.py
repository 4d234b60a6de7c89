"""Fixtures every test may use; environment that must be set before torch loads."""

import os
from pathlib import Path

import not_run
from synpo import onednn

onednn.settle()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Where there is no GPU the Triton kernels run in Triton's interpreter. The switch counts when triton is first imported, by
# whichever test comes first; tests that need it unset (ahead-of-time compilation) start a process of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.backends.cudnn.allow_tf32 = False  # convolutions of a vision tower too are compared in full fp32

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What runs keep for the next one does not end up in the cache of whoever runs the tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real clips, captions and weights beside the checkout (or $SYNPO_TEST_DATA); skips where it is absent."""
    folder = Path(os.environ.get("SYNPO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data not found at {folder} (set SYNPO_TEST_DATA to use another folder)")
    return folder


@pytest.fixture(scope="session")
def tiny_captioner_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a random video captioner (LLaVA-OneVision, byte-level tokenizer): read it, never write to it."""
    from synpo.model.tiny import byte_tokenizer, save, tiny_captioner

    tokenizer = byte_tokenizer(["A small red circle moves from left to right.", "Describe the video in detail."])
    return save(tiny_captioner(tokenizer), tokenizer, tmp_path_factory.mktemp("tiny") / "captioner")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """At the end: how many tests did not run, and what would make them."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} tests or modules did not run; why, and what would make them")
        for line in not_run.lines(skipped):
            terminalreporter.write_line(line)
