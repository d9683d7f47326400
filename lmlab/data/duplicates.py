"""Near-duplicates among documents: pairs that are too alike, and which of them stay.

Without their removal a path runs along copies, and the model learns to copy: in the paper's ablation the method is then
no better than a random order (arXiv 2310.10638, table 6).
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np

from lmlab.data.graph import build_graph, components, edges

_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"\w+")
_PRIME = np.uint64((1 << 31) - 1)
"""As large as the codes of shingles: a larger one would not mix them, and all hashes would find the same minimum."""


def representatives(low: np.ndarray, high: np.ndarray, rank_N: np.ndarray, *, complete: bool = False) -> np.ndarray:
    """[N] int64 the document that stays for each: itself, or the one that it is a duplicate of.

    Args:
        low: one end of each pair of duplicates.
        high: the other.
        rank_N: a permutation; of a group the document of lowest rank stays.
        complete: a document goes only if it is a duplicate of one that stays, not by way of one that goes.
    """
    by_rank = np.argsort(rank_N)
    if not complete:
        return by_rank[components(rank_N[low], rank_N[high], len(rank_N))][rank_N]
    # In the numbering by rank: the duplicates of each document.
    beside: dict[int, list[int]] = {}
    for i, j in zip(rank_N[low].tolist(), rank_N[high].tolist(), strict=True):
        beside.setdefault(i, []).append(j)
        beside.setdefault(j, []).append(i)
    stays = np.arange(len(rank_N))
    for i in sorted(beside):
        if stays[i] == i:
            for j in beside[i]:
                if j > i and stays[j] == j:
                    stays[j] = i
    return by_rank[stays][rank_N]


def alike_pairs(ids_NK: np.ndarray, sims_NK: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of documents of which a search found one near the other with at least this similarity."""
    low, high, _ = edges(build_graph(ids_NK, sims_NK, min_sim=threshold))
    return low, high


def equal_pairs(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of documents with the same text, case and white space aside; each with the first of its kind."""
    first: dict[bytes, int] = {}
    low, high = [], []
    for number, text in enumerate(texts):
        normal = _SPACE.sub(" ", text).strip().casefold()
        digest = hashlib.blake2b(normal.encode(errors="surrogatepass"), digest_size=16).digest()
        if (known := first.setdefault(digest, number)) != number:
            low.append(known)
            high.append(number)
    return np.asarray(low, np.int64), np.asarray(high, np.int64)


def minhash_pairs(
    texts: Iterable[str], threshold: float, *, hashes: int = 128, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Pairs whose sets of 5 words in a row overlap by at least `threshold` (Jaccard), as MinHash estimates it.

    Candidates agree in all hashes of a band (locality-sensitive hashing), which pairs at the threshold do with a
    probability of at least 0.95. Pairs are compared with the first of their bucket, so that a thousand copies give a
    thousand pairs and not a million; two that are like each other but not like the first can be missed.
    """
    bands = next(bands for bands in (4, 8, 16, 32, 64, 128) if bands == 128 or _found(threshold, bands, hashes) >= 0.95)
    rng = np.random.default_rng(seed)
    a_H = rng.integers(1, 1 << 31, hashes).astype(np.uint64)
    b_H = rng.integers(0, 1 << 31, hashes).astype(np.uint64)
    signatures_NH = np.asarray([_signature(text, a_H, b_H) for text in texts], np.uint64).reshape(-1, hashes)
    pairs: set[tuple[int, int]] = set()
    for band_NR in np.split(signatures_NH, bands, axis=1):
        _, first, group = np.unique(band_NR, axis=0, return_index=True, return_inverse=True)
        leader = first[group.ravel()]
        other = np.flatnonzero(leader != np.arange(len(leader)))
        pairs.update(zip(leader[other].tolist(), other.tolist(), strict=True))
    found = [(i, j) for i, j in sorted(pairs) if np.mean(signatures_NH[i] == signatures_NH[j]) >= threshold]
    low, high = np.asarray(found, np.int64).reshape(-1, 2).T
    return low, high


def _found(similarity: float, bands: int, hashes: int) -> float:
    """The probability that two sets agree in all hashes of a band."""
    return 1 - (1 - min(similarity, 1.0) ** (hashes // bands)) ** bands


def _signature(text: str, a_H: np.ndarray, b_H: np.ndarray) -> np.ndarray:
    words = _WORD.findall(text.casefold())
    grams = {" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}
    codes = np.asarray([zlib.crc32(gram.encode(errors="surrogatepass")) >> 1 for gram in grams], np.uint64)
    return np.min((codes[:, None] * a_H[None] + b_H[None]) % _PRIME, axis=0)


def prefix_jaccard(one: str, other: str) -> float:
    """Overlap of the sets of three letters in a row in the first 100; of two empty sets 1 (the released code)."""
    a, b = ({text[i : i + 3] for i in range(min(len(text), 100) - 2)} for text in (one, other))
    return len(a & b) / len(a | b) if a | b else 1.0


def drop_followers(path: np.ndarray, text: Callable[[int], str], threshold: float = 0.85) -> Iterator[int]:
    """The path without documents that begin as the one before them does, which itself may be one that is dropped."""
    if len(path):
        yield int(path[0])
    for before, here in pairwise(path.tolist()):
        if prefix_jaccard(text(before), text(here)) <= threshold:
            yield here
