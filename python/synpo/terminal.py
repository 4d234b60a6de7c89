"""What is printed for people. Captions, ids, paths and messages are data: no markup and no control code in them has a meaning."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from synpo.text import printable, tolerant


class _Plain(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on standard output or standard error that prints texts as they are, in full lines, on any terminal."""
    tolerant(sys.stderr if stderr else sys.stdout)
    return _Plain(stderr=stderr, quiet=quiet, soft_wrap=True, markup=False, emoji=False, highlight=False)
