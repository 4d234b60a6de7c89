"""Word statistics of captions: claims, n-gram vectors and a bigram model. Counting only; what it means is in `offline.py`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

REACH = 2  # content words between the two of a claim, plus one
_STOP = """
a an the and or but of to in on at by for with from as into onto over is are was were be been being am has have had do does did
it its he his she her they their them this that these those there here who which while when also very
"""
STOP_WORDS = frozenset(_STOP.split())

Claim = tuple[str, str]
Gram = tuple[str, ...]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)?", text.lower())


def stem(word: str) -> str:
    """Take a common English ending off: moves, moving, moved → mov. Crude, and the same on both sides."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


def claims_of(text: str) -> set[Claim]:
    """Ordered pairs of content words of one sentence, at most REACH apart; a word alone in its sentence pairs with itself."""
    claims = set()
    for sentence in re.split(r"[.!?;\n]", text):
        words = [stem(w) for w in words_of(sentence) if w not in STOP_WORDS]
        claims |= {(a, b) for i, a in enumerate(words) for b in words[i + 1 : i + 1 + REACH]}
        if len(words) == 1:
            claims.add((words[0], words[0]))
    return claims


def grams_of(text: str, longest: int = 4) -> Counter[Gram]:
    """How often every n-gram of words occurs, n = 1 … longest."""
    words = words_of(text)
    return Counter(tuple(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1))


def document_frequency(documents: Iterable[set]) -> Counter:
    """In how many documents each item occurs."""
    found: Counter = Counter()
    for document in documents:
        found.update(document)
    return found


def mean_similarity(texts: Sequence[str], idf: Mapping[Gram, float], longest: int = 4) -> np.ndarray:
    """For each of T texts the mean over the others of the tf-idf cosine, itself a mean over n = 1 … longest: (T,)."""
    if len(texts) < 2:
        return np.zeros(len(texts))
    result = np.zeros(len(texts))
    counts = [grams_of(t, longest) for t in texts]
    for n in range(1, longest + 1):
        vectors = [{g: k * idf.get(g, 0.0) for g, k in c.items() if len(g) == n} for c in counts]
        total: Counter[Gram] = Counter()
        for i, vector in enumerate(vectors):
            norm = math.sqrt(sum(x * x for x in vector.values())) or 1.0
            vectors[i] = {g: x / norm for g, x in vector.items()}
            total.update(vectors[i])
        for i, vector in enumerate(vectors):
            with_all = sum(x * total[g] for g, x in vector.items())
            with_itself = sum(x * x for x in vector.values())
            result[i] += (with_all - with_itself) / (len(texts) - 1) / longest
    return result


class Bigrams:
    """An interpolated bigram model of a pool of texts: p(b | a) = ¾ count(a b) / count(a) + ¼ (count(b) + 1) / (N + V)."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.words: Counter[str] = Counter()
        for text in texts:
            words = ["", *words_of(text)]
            self.words.update(words)
            self.pairs.update(zip(words, words[1:]))

    def logps(self, texts: Sequence[str], without: Bigrams) -> list[float]:
        """Mean log-probability a word of each text, with the counts of `without` (its own video's) taken out; −inf if empty."""
        size = sum(self.words.values()) - sum(without.words.values()) + len(self.words)

        def logp(a: str, b: str) -> float:
            followed = self.words[a] - without.words[a]
            both = (self.pairs[a, b] - without.pairs[a, b]) / followed if followed else 0.0
            return math.log(0.75 * both + 0.25 * (self.words[b] - without.words[b] + 1) / size)

        means = []
        for text in texts:
            words = ["", *words_of(text)]
            steps = [logp(a, b) for a, b in zip(words, words[1:])]
            means.append(sum(steps) / len(steps) if steps else -math.inf)
        return means
