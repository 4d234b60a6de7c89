"""What a conversation reads like to one model: its chat template, asked where an answer begins and how it ends.

    chat = Chat(tokenizer)
    text = chat.prompt([{"role": "user", "content": "Describe the video."}])     # up to where the model goes on
    ids = chat.answer([{"role": "user", "content": "…"}], "A cat sits.")          # from there to the end of the turn

The template is rendered with the answer in it, and what follows the prompt is taken, up to and with the token that closes the
turn. So an answer is trained on as the model writes one: with the blank after `Assistant:`, the closed thought of a template
that opens one, `<end_of_turn>` and not `<eos>`. Tokens are those of the whole text, not of the answer by itself.

A base model without a template is given the prompt as it is, and goes on from there.

Where a template writes something else before a given answer than where it asks for one, the prompt ends where the two part, if
only white space or a mark (`<think>`) is left out; anything else is refused with the setting that helps. Where they differ in
white space alone (LLaVA-OneVision writes "assistant" with a blank then), the prompt stays what the model is asked with. So it
does where they differ in what comes before (Mistral shows a system turn while the last question is unanswered, and no longer).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from synpo.text import clean

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}"""

QUESTION, ANSWER, NEXT = "Quuxquestion", "Quuxanswer", "Quuxnext"  # words that no template writes itself
MARK = re.compile(r"\s*(?:[<\[]|$)")
HELP = "set model.chat_template, model.template_variables (enable_thinking: false, say) or model.answer_prefix"


def conversation(prompt: str | Sequence[Message]) -> Sequence[Message]:
    """The messages of a prompt; a plain text is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


@dataclass(frozen=True)
class Turn:
    """How the template writes a given answer.

    Attributes:
        parts: whether a message's content is a list of parts, as video models have it, or a plain string.
        dropped: what ends the template's own prompt and is left out, since it does not stand before a given answer.
        spaces: white space at the end of the prompt, and what stands there before a given answer.
        lead: what stands between the prompt and the words of an answer.
        opening: what stands between the last question and the words of an answer.
        tail: what stands behind them at the end of a conversation.
        end: the beginning of `tail` that closes the turn; "" where no token does, then `ids` are written behind the answer.
        ids: the tokens of `end`, the last of which ends an answer.
    """

    parts: bool
    dropped: str
    spaces: tuple[str, str]
    lead: str
    opening: str
    tail: str
    end: str
    ids: tuple[int, ...]


class Chat:
    """Prompts and answers as one tokenizer's chat template writes them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stops: token ids that the model's generation config ends an answer with.
        parts: whether contents are lists of parts (a video model's) rather than strings; the other is tried where that fails.
        variables: variables of the template, `enable_thinking` say; one that it does not know is ignored.
        answer_prefix: text between the template's prompt and an answer: given to the model, not written by it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[int] = (),
        *,
        parts: bool = False,
        variables: Mapping[str, Any] | None = None,
        answer_prefix: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.answer_prefix = answer_prefix
        self._prefer_parts = parts
        eos = tokenizer.eos_token_id
        self._known = tuple(dict.fromkeys([*([] if eos is None else [eos]), *stops]))
        if not self._known:
            raise ValueError("neither the tokenizer nor the generation config names an end-of-sequence token")

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer; the first is the one that the template closes a turn with."""
        return tuple(dict.fromkeys([*self.turn.ids[-1:], *self._known]))

    def prompt(self, messages: Sequence[Message], video: bool = False, **variables: Any) -> str:
        """The text before an answer to `messages`; `video`: the first user turn shows one. Raises ValueError if there is none."""
        text = self._render(messages, self.turn.parts or video, video=video, ask=True, **variables)
        return text.removesuffix(self.turn.dropped) + self.answer_prefix

    def answer(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of an answer to `messages`, from the end of their prompt up to and with the end of the turn.

        An end of turn that `text` brings along is not written twice. Raises ValueError where the answer is empty, holds the
        end of a turn, or comes out of the template as something else.
        """
        words, before = self._words(text), self.prompt(messages)
        whole = self._render([*messages, {"role": "assistant", "content": words}], self.turn.parts)
        ids = self._continue(before, self._written(whole, before, words) + self.turn.end)
        return ids if self.turn.end else [*ids, *self.turn.ids]

    def text(self, ids: Any) -> str:
        """The words of an answer's ids, without special tokens and without what the template puts around them."""
        ids = list(map(int, ids))
        if ids and ids[-1] in self.ends:
            ids.pop()
        return self.without_lead(self.tokenizer.decode(ids, skip_special_tokens=True), ids)

    def without_lead(self, words: str, ids: Sequence[int]) -> str:
        """The words of generated `ids` less those that the template itself puts before an answer."""
        lead, words = self.turn.lead.strip(), clean(words).strip()
        if lead and self.tokenizer.decode(list(ids), skip_special_tokens=False).lstrip().startswith(lead):
            for token in self.tokenizer.added_tokens_decoder.values():
                lead = lead.replace(token.content, "") if token.special else lead
            words = words.removeprefix(lead.strip()).lstrip()
        return words

    def describe(self) -> str:
        """In words, where an answer begins and how it ends."""
        turn = self.turn
        before = self.prompt([{"role": "user", "content": QUESTION}]).rpartition(QUESTION)[2]
        said = f"an answer follows {before!r}" if before else "an answer follows the prompt as it is (no chat template)"
        if turn.lead:
            said += f", begins with {turn.lead!r}"
        said += f" and ends with {' '.join(self._names(turn.ids))}"
        if turn.dropped:
            said += f"; the template's own prompt goes on with {turn.dropped!r}, which it does not write before a given answer"
        if any(turn.spaces):
            asked, told = turn.spaces
            said += f"; the template writes {told!r} before a given answer where it asks for one with {asked!r}"
        if turn.tail and not turn.end:
            said += f"; the template writes {turn.tail!r} there, in which no token ends a turn"
        return said

    @cached_property
    def turn(self) -> Turn:
        """How the template writes an answer, found by asking it. Raises ValueError where that cannot be told."""
        if not self.tokenizer.chat_template:
            return Turn(False, "", ("", ""), "", "", "", "", self._known[:1])
        failed: ValueError | None = None
        for parts in (self._prefer_parts, not self._prefer_parts):
            try:
                return self._look(parts)
            except ValueError as error:
                failed = failed or error
        assert failed is not None
        raise failed

    def _look(self, parts: bool) -> Turn:
        """What the template makes of a question and an answer."""
        asked = [{"role": "user", "content": QUESTION}]
        told = [*asked, {"role": "assistant", "content": ANSWER}]
        own, whole = self._render(asked, parts, ask=True), self._render(told, parts)
        once = own.count(QUESTION) == whole.count(QUESTION) == whole.count(ANSWER) == 1
        if not once or re.search("""['"]type['"]""", whole):  # a list of parts, printed
            raise ValueError(f"the chat template makes {whole!r} of a question and an answer; {HELP}")
        before, _, tail = whole.partition(ANSWER)
        asks, opening = (text.rpartition(QUESTION)[2] for text in (own, before))
        dropped, spaces, lead = "", ("", ""), ""
        if self.answer_prefix:
            pass  # the prefix stands where the template's own lead would
        elif opening.startswith(asks):
            lead = opening[len(asks) :]
        else:
            shared = len(os.path.commonprefix([asks, opening]))
            dropped, lead = asks[shared:], opening[shared:]
            if not (MARK.match(dropped) and MARK.match(lead)):
                raise ValueError(
                    f"the chat template asks for an answer with {own!r} and writes a given one behind {before!r}; {HELP}"
                )
            if not (dropped + lead).strip():
                dropped, spaces, lead = "", (dropped, lead), ""
        between = self._between(told, parts)
        for closing in (os.path.commonprefix([tail, between]), tail):  # what ends a turn ends the others too
            end, ids = self._end(closing)
            if end:
                break
        else:  # the mark of the next turn if the model is known to stop there (GLM), or the end of sequence
            ids = (next((token for token in self._end(between)[1] if token in self._known), self._known[0]),)
        return Turn(parts, dropped, spaces, lead, opening, tail, end, ids)

    def _end(self, tail: str) -> tuple[str, tuple[int, ...]]:
        """Of what follows an answer the part that closes the turn: the first run of tokens of the chat's own."""
        end, ids = "", []
        match = self._marks.match(tail)
        while match:
            end, token = end + match[0], self.tokenizer.convert_tokens_to_ids(match[1])
            ids.append(token)
            match = None if token in self._known else self._marks_alone.match(tail, len(end))
        return end, tuple(ids)

    def _between(self, told: Sequence[Message], parts: bool) -> str:
        """What stands between an answer and a question after it; nothing where a template refuses that."""
        try:
            further = self._render([*told, {"role": "user", "content": NEXT}], parts)
        except ValueError:  # a template of one turn
            return ""
        return further.partition(ANSWER)[2].partition(NEXT)[0]

    def _words(self, text: str) -> str:
        """The words of an answer, without ends of turn behind them."""
        marks = {self.turn.end.strip(), *self._names(self.ends)} - {""}
        words, shorter = "", text.strip() if self.tokenizer.chat_template else text.rstrip()
        while words != shorter:
            words = shorter
            for mark in marks:
                shorter = shorter.removesuffix(mark).rstrip()
        if not words.strip():
            raise ValueError(f"the completion {text!r} has no token")
        if inside := sorted(mark for mark in marks if mark in words):
            raise ValueError(f"the completion {words[:80]!r} holds {inside[0]}, which ends a turn")
        return words

    def _written(self, whole: str, before: str, words: str) -> str:
        """What the template writes for an answer in the whole conversation, behind the prompt and before the end of the turn."""
        asked, told = self.turn.spaces
        written, end = before.removesuffix(asked) + told, len(whole) - len(self.turn.tail)
        if self.answer_prefix:
            start = whole.rfind(words, 0, max(end, 0))
        else:
            start = len(written) if whole.startswith(written) else self._rewritten(whole, words, end)
        body = whole[start:end] if start >= 0 and whole.endswith(self.turn.tail) else ""
        if "".join(words.split()) not in "".join(body.split()):
            raise ValueError(
                f"the chat template does not write the answer {words[:80]!r} as it stands behind the prompt {before[-80:]!r}: "
                f"the conversation ends in {whole[-120:]!r}; change the answer, or {HELP}"
            )
        return body

    def _rewritten(self, whole: str, words: str, end: int) -> int:
        """Where the answer begins in a conversation whose earlier turns the template writes otherwise once there is one: behind
        what opens an answer, with nothing but the words up to `end`; -1 where that is nowhere."""
        opening, lead, place = self.turn.opening, self.turn.lead, max(end, 0)
        while opening.strip() and (place := whole.rfind(opening, 0, place)) >= 0:
            if "".join(whole[place + len(opening) : end].split()) == "".join(words.split()):
                return place + len(opening) - len(lead)
        return -1

    def _continue(self, before: str, after: str) -> list[int]:
        """The tokens of `after` as they stand behind `before`, whose own tokens are what a model is given."""
        given, whole = self._ids(before), self._ids(before + after)
        if whole[: len(given)] == given:
            return whole[len(given) :]
        try:  # a token reaches over the place where the prompt ends: the answer's part of it is read by itself
            spans = self.tokenizer(before + after, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            later = next((i for i, (start, _) in enumerate(spans) if start >= len(before)), len(whole))
            first = spans[later][0] - len(before) if later < len(spans) else len(after)
            ids = self._inside(after[:first]) + whole[later:]
        except NotImplementedError:  # tokenizers in plain Python know no places
            ids = self._inside(after)
        if self.tokenizer.decode(given + ids) != self.tokenizer.decode(whole):
            raise ValueError(f"the tokenizer cannot read {after[:80]!r} apart from {before[-40:]!r} before it; {HELP}")
        return ids

    def _inside(self, text: str) -> list[int]:
        """The tokens of `text` where it does not begin one, before which some tokenizers put a blank."""
        for word in ("a", "."):
            alone, behind = self._ids(word), self._ids(word + text)
            if behind[: len(alone)] == alone:
                return behind[len(alone) :]
        return self._ids(text)

    def _names(self, ids: Sequence[int]) -> list[str]:
        """The tokens of ids, less those that a model's settings name and its tokenizer does not know."""
        return [name for name in self.tokenizer.convert_ids_to_tokens(list(ids)) if name is not None]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _render(
        self, messages: Sequence[Message], parts: bool, *, video: bool = False, ask: bool = False, **variables: Any
    ) -> str:
        """The template's text for messages; ValueError where it refuses them."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            return self._plain(messages, video)
        if parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        if video:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is None:
                raise ValueError("no user turn shows the video")
            first["content"].insert(0, {"type": "video"})
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=False, **(self.variables | variables)
            )
        except (TemplateError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _plain(self, messages: Sequence[Message], video: bool) -> str:
        """Without a template: a text that the answer goes on from, behind the token that begins one."""
        if video or [m["role"] for m in messages] not in (["user"], ["user", "assistant"]):
            raise ValueError(
                "the tokenizer has no chat template, so prompts can be plain texts alone; take an instruction-tuned model, or "
                "set model.chat_template"
            )
        ids = self.tokenizer("a").input_ids
        begun = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        return "".join([self.tokenizer.bos_token if begun else "", *(m["content"] for m in messages)])

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        """A token of the chat's own, white space before it."""
        return re.compile(rf"\s*{self._marks_alone.pattern}")

    @cached_property
    def _marks_alone(self) -> re.Pattern[str]:
        names = {token.content for token in self.tokenizer.added_tokens_decoder.values()} | set(
            self._names(self._known)
        )
        longest = sorted((name for name in names if name.strip()), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest))})")


def read_template(setting: str) -> str:
    """The text of `model.chat_template`: a file's where it names one, else itself. Raises OSError if it cannot be read."""
    return setting if "{" in setting else Path(setting).expanduser().read_text(encoding="utf-8")
