"""Caption → words, the way the COCO caption evaluation counts them, without Java.

Published CIDEr, BLEU, ROUGE-L and METEOR are computed on the output of Stanford's PTBTokenizer 3.4.1 in lower case, less
punctuation. That program needs a Java runtime and its Python wrapper writes into site-packages; the rules below are the
Penn Treebank conventions that occur in captions:

    "A man's dog can't sit, (really)."  →  a man 's dog ca n't sit -lrb- really -rrb-

Brackets stay because the reference evaluation removes their upper-case names, which its tokenizer writes in lower case.
Left out is what captions do not hold: currency names (£ becomes # there), HTML entities, file names, missing spaces after
a full stop. Control and formatting codes, private characters and U+FFFD part words and are none.
tests/evaluate/test_ptb.py compares the two on real captions wherever Java is installed.
"""

from __future__ import annotations

import re

from synpo.text import clean

_SAME = str.maketrans({"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "\xad": ""})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_NOTHING = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2064\ue000-\uf8ff\ufeff\ufffd]"
)
_DROPPED = re.compile(r"[.,:;'\"-]+|[?!]")

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b-?", re.IGNORECASE)
_FUSED = re.compile(r"\b(can(?=not\b)|(?:gon|wan)(?=na\b)|got(?=ta\b)|(?:lem|gim)(?=me\b))", re.IGNORECASE)
_TOKEN = re.compile(
    r"""
    (?:https?://|www\.)[^\s"<>|()]*[^\s"<>|().,!?{}-] | [^\s"<>|()]+@[^\s"<>|()]+\.\w+   # addresses
  | '(?:s|m|d|re|ve|ll|em|n|\d0s)\b | n't\b                               # clitics, 'em, '90s
  | (?:[a-z]\.){2,} | (?<!\w)[b-hj-z]\.(?![\w.])                           # u.s., p.m., vitamin c.
  | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|ltd|co|corp|dept|prof|gen|col|capt|sgt|lt|gov|sen|rev|ave|blvd|ft
      |jan|feb|aug|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|no(?=\.\s*\d))\.(?!\w)
  | (?<!\w)[-+]?\d+(?:[.,:/]\d+)+ | (?<!\w)[-+]\d+(?!\w)            # 1,000  10:30  3/4  -5
  | (?-i:[A-Z]+&[A-Z]+)                                                   # AT&T, but a & b
  | [#@]?[^\W\d_][^\W_]*(?:(?:[-./'_])[^\W_]+)* | [^\W_]+(?:[-./][^\W_]+)* # well-dressed, and/or, o'clock, 6ft
  | \.{2,} | -{2,} | [!?]{2,} | \*{2,} | [^\w\s\U00010000-\U0010ffff] | _
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> list[str]:
    """Lower-case Penn Treebank words of a caption, punctuation removed; [] for a blank one."""
    text = _NOTHING.sub(" ", clean(caption)).translate(_SAME)
    text = _FUSED.sub(r"\1 ", _CLITIC.sub(r" \1 ", text))
    tokens = (_BRACKETS.get(token, token.lower()) for token in _TOKEN.findall(text))
    return [token for token in tokens if not _DROPPED.fullmatch(token)]
