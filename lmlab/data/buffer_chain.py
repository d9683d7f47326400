"""A chain through a buffer of documents: related neighbours of an unbounded stream (arXiv 2402.13991, BM25Chunk).

The chain itself needs no index of the corpus, and no more memory than the buffer.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import numpy as np

Score: TypeAlias = Callable[[int, Sequence[int]], np.ndarray]
"""`score(last, buffered) -> how alike each is to the last`; 0: not at all."""
_WORD = re.compile(r"[a-z0-9]+")
_K1, _B = 1.2, 0.75


def buffer_chain(
    documents: Iterator[int], score: Score, sizes_N: np.ndarray, buffer: int, length: int
) -> Iterator[int]:  # fmt: skip
    """Every document once. Each is followed by the buffered one most like it, or by the oldest if none is like it.

    Args:
        documents: numbers, in the order of the stream.
        score: compares.
        sizes_N: tokens of each.
        buffer: documents to choose among.
        length: tokens of a row; where one ends, in the middle of a document or not, the chain begins anew with the
            oldest. 0: it never does.
    """
    waiting = list(islice(documents, buffer))
    last, room = None, length
    while waiting:
        place = 0
        if last is not None and (room > 0 or not length):
            scores = score(last, waiting)
            best = int(np.argmax(scores))
            place = best if scores[best] > 0 else 0
        elif last is not None:
            # What a row had no room for is at the beginning of the next one, or of a later one.
            room = length - (-room % length)
        last = waiting.pop(place)
        room -= int(sizes_N[last])
        yield last
        waiting.extend(islice(documents, 1))


def vector_scorer(vectors_ND: np.ndarray) -> Score:
    """By the inner product of their vectors."""
    return lambda last, buffered: vectors_ND[np.asarray(buffered)] @ vectors_ND[last]


def bm25_scorer(text: Callable[[int], str]) -> Score:
    """By BM25 among the buffered documents, with all words of the last as the query (k1 1.2, b 0.75).

    Words are runs of letters and digits in lower case, unstemmed. idf = ln(1 + (N - df + 0.5) / (df + 0.5)).
    """
    counts: dict[int, Counter[str]] = {}
    sizes: dict[int, int] = {}
    holders: dict[str, set[int]] = defaultdict(set)

    def words(number: int) -> Counter[str]:
        return Counter(_WORD.findall(text(number).lower()))

    def score(last: int, buffered: Sequence[int]) -> np.ndarray:
        place = {number: i for i, number in enumerate(buffered)}
        query = counts.get(last) or words(last)
        for number in [known for known in counts if known not in place]:
            del sizes[number]
            for word in counts.pop(number):
                holders[word].discard(number)
                if not holders[word]:
                    del holders[word]
        for number in buffered:
            if number not in counts:
                counts[number] = words(number)
                sizes[number] = counts[number].total()
                for word in counts[number]:
                    holders[word].add(number)
        mean = max(sum(sizes.values()) / len(buffered), 1)
        scores = np.zeros(len(buffered))
        for word in query:
            found = holders.get(word, ())
            idf = math.log(1 + (len(buffered) - len(found) + 0.5) / (len(found) + 0.5))
            for number in found:
                frequency, size = counts[number][word], sizes[number]
                weight = frequency * (_K1 + 1) / (frequency + _K1 * (1 - _B + _B * size / mean))
                scores[place[number]] += idf * weight
        return scores

    return score
