"""Guesses from an earlier answer: where it is found again, and when guessing pauses."""

import torch

from synpo.pipeline.lookahead import MOST, Drafts


def test_the_place_in_a_draft_is_found_again() -> None:
    drafts = Drafts([[1, 2, 3, 4, 5], [1, 2, 3, 1, 9]], 0, torch.device("cpu"))

    def guess(count: int) -> list[list[int]]:
        guessed = drafts.guess()
        assert guessed is not None
        return guessed[:, :count].tolist()

    assert guess(2) == [[1, 2], [1, 2]]
    drafts.follow(
        torch.tensor([[1, 2, 7], [8, 0, 0]]), torch.tensor([3, 1]), True
    )  # a wrong third, a wrong first token
    assert guess(2) == [[4, 5], [2, 3]], "one word in the place of one"
    drafts.follow(torch.tensor([[3], [1]]), torch.tensor([1, 1]), False)
    assert guess(2) == [[4, 5], [2, 3]], "the words that follow the last one written"
    drafts.follow(torch.tensor([[4, 5, 0], [9, 0, 0]]), torch.tensor([2, 1]), True)
    assert guess(3) == [[0, 0, 0], [0, 0, 0]], "the end follows a draft"
    drafts.keep(torch.tensor([1]))
    assert guess(1) == [[0]]


def test_guesses_stop_where_they_do_not_pay() -> None:
    cpu = torch.device("cpu")
    assert Drafts([[1]] * 32, 0, cpu).guess() is None, "so many rows fill a pass"
    for rows, streams, count in ((1, 1, MOST), (1, 2, MOST), (8, 1, 3), (4, 2, 3), (8, 2, 1)):
        guessed = Drafts([[1]] * rows, 0, cpu, streams=streams).guess()
        assert guessed is not None and guessed.shape == (rows, count)

    def passes(right: int, count: int) -> str:
        """Which of `count` passes guess, of four rows that each take `right` guesses: G or a dot."""
        drafts, shown = Drafts([[1] * 50] * 4, 0, cpu), ""
        for _ in range(count):
            guessed = drafts.guess()
            taken = torch.full((4,), 1 if guessed is None else 1 + right)
            drafts.follow(torch.ones(4, 1 + MOST, dtype=torch.long), taken, guessed is not None)
            drafts.judge()
            shown += "." if guessed is None else "G"
        return shown

    assert passes(1, 40) == "G" * 40
    assert passes(0, 40) == "GG" + "." * 16 + "GG" + "." * 20
