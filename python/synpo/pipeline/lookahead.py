"""Guesses at the next tokens of an answer, taken from an earlier answer to nearly the same question.

A second look often repeats stretches of the draft. Tokens that are guessed right cost no pass of their own: the model reads
the guesses beside the last token, every place draws with the random number that is its own, and what was drawn counts up to
the first token after a wrong guess. So the answer is the one that would have been written token by token, up to rounding:
speculative decoding (Leviathan et al. 2023, arXiv 2211.17192) in its exact form, with the draft for the guesses.

Shape legend: R rows, H tokens of a draft, K guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS_A_PASS = {"cpu": 32, "cuda": 256}  # up to about here a pass costs its weights, not its tokens
MOST = 6  # guesses a pass
TRIAL = 8  # answers a trial of guessing watches: two passes of four rows, say
PAUSE = 16  # passes without guesses after a trial that was not worth its while; each next pause is twice as long


def tokens_a_pass(device: torch.device) -> int:
    """Tokens a pass reads at about the price of one."""
    return TOKENS_A_PASS.get(device.type, 256)


def guesses(rows: int, device: torch.device) -> int:
    """How many guesses a row may add to a pass over `rows` rows, all streams counted, on this device: 0 to MOST."""
    return max(0, min(MOST, tokens_a_pass(device) // max(1, rows) - 1))


class Drafts:
    """Where every row stands in its draft. Works on the device, without waiting for it."""

    def __init__(self, drafts: Sequence[Sequence[int]], end: int, device: torch.device, streams: int = 1) -> None:
        """`drafts`: R rows of token ids; `end`: the token that ends an answer; `streams`: how many read every answer."""
        width = max(len(d) for d in drafts) + 1
        rows = [[*d, *[end] * (width - len(d))] for d in drafts]
        self.tokens = F.pad(torch.tensor(rows, device=device), (0, MOST), value=end)  # (R, H + MOST)
        self.next = torch.zeros(len(rows), dtype=torch.long, device=device)  # (R,) place of the next token
        self.before = F.pad(self.tokens[:, : width - 1], (1, 0), value=-1)  # (R, H) the token in front of each
        self.last = self.tokens.new_full((len(rows), 1), -1)  # the last token written
        self.places = torch.arange(width, device=device)
        self.streams = streams
        self._tried, self._right = 0, torch.zeros((), dtype=torch.long, device=device)
        self._wait, self._pause = 0, PAUSE

    def guess(self) -> Tensor | None:
        """The next K tokens, should the answer go on like the draft: (R, K) int64; None where guessing is not worth its while."""
        rows, device = self.tokens.shape[0], self.tokens.device
        count = guesses(rows * self.streams, device)
        self._wait -= 1
        if count < 1 or self._wait >= 0:
            return None
        self._tried += rows
        return self.tokens.gather(1, self.next[:, None] + torch.arange(count, device=device))

    def follow(self, token: Tensor, taken: Tensor, guessed: bool) -> None:
        """Find the place again after the first `taken`, (R,), of the tokens (R, S) were written; `guessed`: by a pass of guesses.

        It is the nearest to where it should be at which the draft has the last two tokens, else the last one; else the answer is
        taken to have put other words in the place of as many.
        """
        if guessed:
            self._right = self._right + (taken - 1).sum()
        width = len(self.places)
        both_known = torch.cat([self.last, token], dim=1)  # (R, 1 + S)
        previous, self.last = (both_known.gather(1, taken[:, None] + back) for back in (-1, 0))
        expected = (self.next + taken)[:, None]
        found = self.tokens[:, :width] == self.last  # (R, H)
        both = found & (self.before == previous)
        distance = (self.places + 1 - expected).abs()
        cost = torch.where(both, distance, torch.where(found, distance + width, 4 * width))
        best, place = cost.min(1)
        self.next = torch.where(best < 4 * width, place + 1, expected[:, 0]).clamp_(max=width - 1)

    def judge(self) -> None:
        """Look back at the guesses of the last trial (a wait for the device): with less than one in two passes right, pause."""
        if self._tried < TRIAL:
            return
        if int(self._right) * 2 < self._tried:
            self._wait = self._pause
            self._pause *= 2
        self._tried, self._right = 0, torch.zeros_like(self._right)

    def keep(self, rows: Tensor) -> None:
        self.tokens, self.before = self.tokens[rows], self.before[rows]
        self.last, self.next = self.last[rows], self.next[rows]
