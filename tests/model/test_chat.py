"""What is trained is what the chat template writes: an answer begins and ends as it does there, for every template there is."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from synpo.model.chat import Chat
from synpo.model.tiny import END, byte_tokenizer

TURNS = "{% for m in messages %}"
ASKED = [{"role": "user", "content": "Say."}]
WORDS = "A cat sits."

CHATML = (
    TURNS
    + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    TURNS + "<start>{{ 'model' if m.role != 'user' else 'user' }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
PHI = (
    TURNS + "<|{{ m.role }}|>\n{{ m.content }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
COLON = (
    TURNS + "{{ m.role | capitalize }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAMA2 = (
    TURNS
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CLOSED = (  # the prompt opens a thought, which stands closed before a given answer
    TURNS + "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)
FORGOTTEN = (  # … which is left out before a given answer, with all that was thought
    TURNS + "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TIGHT = (  # … and closed at once
    TURNS
    + "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
)
OPTIONAL = (  # Qwen3: a given answer has an empty thought, which the prompt has only where thinking is switched off
    TURNS + "<|{{ m.role }}|>\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GLM = TURNS + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CHANNELS = (
    TURNS + "<start>{{ m.role }}{% if m.role == 'assistant' %}<channel>final{% endif %}<message>{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<stop>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant{% endif %}"
)
TWO_MARKS = (
    TURNS + "<start>{% if m.role == 'assistant' %}<message>{% endif %}{{ m.content }}<stop><end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}<start><message>{% endif %}"
)
LAST = (  # Phi-4-mini: the end of sequence stands behind the last turn alone, and at once
    TURNS + "<|{{ m.role }}|>{{ m.content }}<stop>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
UNANSWERED = (  # Mistral: the system turn is shown before the last question, while that has no answer
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    + TURNS
    + "{% if m.role == 'user' %}[INST] {{ system if loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
HINT = (
    TURNS
    + "<|{{ m.role }}|>{% if m.role == 'user' and loop.last %}(Be brief.) {% endif %}{{ m.content }}<stop>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKS = ["<think>", "</think>", "<start>", "<end_of_turn>", "<stop>", "<channel>", "<message>"]

CASES = {  # template: prompt, answer as trained
    "plain": (CHATML, "<|assistant|>\n", "A cat sits.<|end|>"),
    "own end": (GEMMA, "<start>model\n", "A cat sits.<end_of_turn>"),
    "end of sequence behind the end": (PHI, "<|assistant|>\n", "A cat sits.<stop>"),
    "blank": (COLON, "Assistant:", " A cat sits.<|end|>"),
    "blanks": (LLAMA2, "[/INST]", " A cat sits. <|end|>"),
    "closed thought": (CLOSED, "<think>\n", "\n</think>\n\nA cat sits.<|end|>"),
    "forgotten thought": (FORGOTTEN, "<|assistant|>", "A cat sits.<|end|>"),
    "tight thought": (TIGHT, "<|assistant|>\n<think>", "</think>A cat sits.<|end|>"),
    "optional thought": (OPTIONAL, "<|assistant|>\n", "<think>\n\n</think>\n\nA cat sits.<|end|>"),
    "no end": (GLM, "<|assistant|>\n", "A cat sits.<|end|>"),
    "channels": (CHANNELS, "<start>assistant", "<channel>final<message>A cat sits.<stop>"),
    "end of sequence at the very end": (LAST, "<stop><|assistant|>", "A cat sits.<stop>"),
    "two marks": (TWO_MARKS, "<start><message>", "A cat sits.<stop><end_of_turn>"),
}


def made(template: str | None, special: list[str] = MARKS, **settings: Any) -> Chat:
    tokenizer = byte_tokenizer(["A cat sits. Assistant: A cat"] * 9)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return Chat(tokenizer, **settings)


def trained(chat: Chat, words: str = WORDS, asked: list[dict[str, str]] = ASKED) -> str:
    return chat.tokenizer.decode(chat.answer(asked, words))


@pytest.mark.parametrize("case", CASES)
def test_an_answer_reads_as_the_template_writes_it(case: str) -> None:
    template, before, answer = CASES[case]
    chat = made(template)
    assert chat.prompt(ASKED).endswith(before) and trained(chat) == answer
    told = [*ASKED, {"role": "assistant", "content": WORDS}]
    own = chat.tokenizer.apply_chat_template(told, tokenize=False)
    assert own.startswith((chat.prompt(ASKED) + answer).removesuffix(END if case == "no end" else ""))
    last = chat.answer(ASKED, WORDS)[-1]
    assert last == chat.ends[0] and chat.tokenizer.eos_token_id in chat.ends, "generation stops where answers end"
    assert chat.text(chat.answer(ASKED, WORDS)) == WORDS, "and what it writes reads as the words alone"
    for piece in (before, answer[-5:]):
        assert repr(piece)[1:-1] in chat.describe()


@pytest.mark.parametrize("case", CASES)
def test_an_end_is_never_written_twice(case: str) -> None:
    chat = made(CASES[case][0])
    ends = chat.tokenizer.convert_ids_to_tokens(list(chat.ends))
    for end in ends:
        assert chat.answer(ASKED, f" {WORDS}{end}\n{end} ") == chat.answer(ASKED, WORDS)
        with pytest.raises(ValueError, match=f"holds {re.escape(end)}, which ends a turn"):
            chat.answer(ASKED, f"A cat{end} sits.")
        with pytest.raises(ValueError, match="has no token"):
            chat.answer(ASKED, f" {end}")


def test_a_conversation_comes_before_the_answer() -> None:
    chat = made(OPTIONAL)
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say."},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "A cat."},
    ]
    assert chat.prompt(asked).startswith("<|system|>\nBe brief.<|end|>\n<|user|>\nSay.<|end|>\n<|assistant|>\n")
    assert trained(chat, asked=asked) == "<think>\n\n</think>\n\nA cat sits.<|end|>"


@pytest.mark.parametrize("words", [WORDS, "Say.", "Say.[/INST] A cat.", "A cat\n\n  sits."])
@pytest.mark.parametrize("earlier", [[], [{"role": "user", "content": WORDS}, {"role": "assistant", "content": WORDS}]])
def test_a_prompt_that_an_answer_changes_is_the_one_that_is_asked(words: str, earlier: list[dict[str, str]]) -> None:
    """What comes before the last question may be written otherwise once that is answered; the answer is the same."""
    asked = [{"role": "system", "content": "Be brief."}, *earlier, *ASKED]
    chat = made(UNANSWERED)
    assert chat.prompt(asked).endswith("[INST] Be brief.\n\nSay.[/INST]")
    assert trained(chat, words, asked) == f" {words}{END}"
    hinted = made(HINT)
    assert hinted.prompt(asked).endswith("<|user|>(Be brief.) Say.<stop><|assistant|>")
    assert trained(hinted, words, asked) == f"{words}<stop>"
    with pytest.raises(ValueError, match="does not write the answer"):
        trained(made(UNANSWERED.replace(" {{ m.content }}", " {{ m.content | replace('.', '!') }}")), words, asked)


def test_words_that_are_in_the_end_of_a_turn_are_an_answer_behind_a_prefix() -> None:
    chat = made(CHATML, answer_prefix="I see ")
    for words in ("end", "|", WORDS):
        assert trained(chat, words) == f"{words}<|end|>"


def test_a_template_is_told_what_the_configuration_says() -> None:
    chat = made(OPTIONAL, variables={"enable_thinking": False})
    assert chat.prompt(ASKED).endswith("</think>\n\n") and trained(chat) == "A cat sits.<|end|>"
    chat = made(FORGOTTEN, answer_prefix="\n</think>\n\n")
    assert chat.prompt(ASKED).endswith("<think>\n\n</think>\n\n") and trained(chat) == "A cat sits.<|end|>"


def test_the_model_stops_where_the_next_turn_begins() -> None:
    """GLM closes no turn; its generation config names the mark of the user's."""
    user = byte_tokenizer().convert_tokens_to_ids("<|user|>")
    chat = made(GLM, stops=[user])
    assert trained(chat) == "A cat sits.<|user|>" and chat.ends[0] == user


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        (FORGOTTEN, "<think>It sits?</think>A cat sits.", "does not write the answer .* as it stands"),
        (COLON.replace("Assistant:", "ANSWER "), WORDS, "asks for an answer with .* and writes a given one behind"),
        (TURNS + "{{ m.role }}{% endfor %}", WORDS, "makes 'userassistant' of a question and an answer"),
        (
            TURNS + "{{ raise_exception('no roles here') }}{% endfor %}",
            WORDS,
            "refuses the conversation: no roles here",
        ),
        (TURNS + "{{ 1 + 'a' }}{% endfor %}", WORDS, "refuses the conversation: unsupported operand"),
        (TURNS + "{{ 1 / 0 }}{% endfor %}", WORDS, "refuses the conversation: division by zero"),
        (TURNS + "{{ range(10 ** 9) }}{% endfor %}", WORDS, "refuses the conversation: Range too big"),
        (
            "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            WORDS,
            "refuses the conversation: maximum recursion",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(template: str, words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made(template).answer(ASKED, words)
    if "refuses" not in message:
        assert "model.template_variables (enable_thinking: false, say) or model.answer_prefix" in str(caught.value)


def test_white_space_is_that_of_the_question() -> None:
    """LLaVA-OneVision's template has a blank before a given answer; its model was taught, and is asked, without."""
    chat = made(CHATML.replace("<|{{ m.role }}|>\n", "<|{{ m.role }}|> \n"))
    assert chat.prompt(ASKED) == "<|user|> \nSay.<|end|>\n<|assistant|>\n" and trained(chat) == "A cat sits.<|end|>"
    assert "the template writes ' \\n' before a given answer where it asks for one with '\\n'" in chat.describe()


def test_a_thought_that_the_template_keeps_is_trained() -> None:
    chat = made(CLOSED.replace("<think>\n\n</think>\n\n{% endif %}", "{% endif %}"))
    thought = "<think>\nIt sits?\n</think>\n\nA cat sits."
    assert chat.prompt(ASKED).endswith("<|assistant|>\n") and trained(chat, thought) == f"{thought}<|end|>"


def test_contents_are_parts_where_the_template_wants_them() -> None:
    parts = (
        TURNS
        + "<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'video' %}<video>{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for prefer in (True, False):
        chat = made(parts, parts=prefer)
        assert chat.prompt(ASKED, video=True) == "<|user|><video>Say.<|end|><|assistant|>"
        assert trained(chat) == "A cat sits.<|end|>"
        assert trained(made(CHATML, parts=prefer)) == "A cat sits.<|end|>"


def metaspace_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """One that puts a blank before every text, and merges line feeds."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    inner.train_from_iterator(["<|user|>\nSay.</s>\n<|assistant|>\nA cat sits.</s>\n<think>\n\n</think>"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", chat_template=template.replace("<|end|>", "</s>")
    )


@pytest.mark.parametrize(("template", "merged"), [(CHATML, False), (CLOSED, True)])
def test_an_answer_has_the_tokens_it_has_behind_its_prompt(template: str, merged: bool) -> None:
    """Not those it has alone, before which some tokenizers put a blank; and a merge may reach over the prompt's end."""
    tokenizer = metaspace_tokenizer(template)
    chat = Chat(tokenizer)
    told = [*ASKED, {"role": "assistant", "content": WORDS}]
    whole = tokenizer.apply_chat_template(told, tokenize=False).removesuffix("\n")
    own, given = (tokenizer(text, add_special_tokens=False).input_ids for text in (whole, chat.prompt(ASKED)))
    answer = chat.answer(ASKED, WORDS)
    assert (own[: len(given)] != given) == merged, "a token of the whole reaches over the place"
    assert tokenizer.decode(given + answer) == tokenizer.decode(own)
    words = tokenizer(WORDS, add_special_tokens=False).input_ids
    assert answer[-len(words) :] == own[-len(words) :] and answer[-len(words) - 1 : -1] != words, (
        "alone there is a blank"
    )


def test_without_a_template_the_model_goes_on_from_the_prompt() -> None:
    chat = made(None)
    assert chat.prompt([{"role": "user", "content": "Once upon"}]) == "Once upon"
    answer = chat.answer([{"role": "user", "content": "Once upon"}], " a time. ")
    assert chat.tokenizer.decode(answer) == " a time.<|end|>"
    with pytest.raises(ValueError, match="no chat template, so prompts can be plain texts alone"):
        chat.prompt([{"role": "system", "content": "Be brief."}, *ASKED])
    begun = byte_tokenizer()
    begun.add_special_tokens({"bos_token": "<s>"})
    begun.chat_template = None
    assert Chat(begun).prompt(ASKED) == "Say.", "nothing is put in front that the tokenizer does not put there itself"


TRL = importlib.util.find_spec("trl")
SHIPPED = sorted(Path(TRL.origin).parent.glob("chat_templates/*.jinja")) if TRL and TRL.origin else []


@pytest.mark.skipif(not SHIPPED, reason="TRL is not installed (pip install trl)")
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_template_that_trl_ships(path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(["A cat sits."] * 9)
    marks = sorted(set(re.findall(r"<[|｜]?[\w/▁ ]+[|｜]?>|\[/?[A-Z]+\]", template)))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [m for m in marks if "tool" not in m and "func" not in m]}
    )
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    for parts in (False, True):
        chat = Chat(tokenizer, parts=parts)
        kind: Any = [{"type": "text", "text": "Say."}] if chat.turn.parts else "Say."
        answer: Any = [{"type": "text", "text": WORDS}] if chat.turn.parts else WORDS
        told = [{"role": "user", "content": kind}, {"role": "assistant", "content": answer}]
        own = tokenizer.apply_chat_template(told, tokenize=False)
        given = tokenizer(chat.prompt(ASKED), add_special_tokens=False).input_ids
        text = tokenizer.decode(given + chat.answer(ASKED, WORDS))
        assert own.startswith(text if chat.turn.end else text.removesuffix(END))
        assert WORDS in text and chat.text(chat.answer(ASKED, WORDS)) == WORDS
