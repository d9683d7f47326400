"""Texts of a few topics, for orders of related documents."""

import numpy as np

from lmlab.data.config import InContextOrder
from lmlab.data.vectors import Corpus
from lmlab.retrieval.config import HashTfidf

SMALL = InContextOrder(encoder=HashTfidf(dimensions=64, bits=12), neighbours=6)


def topics(count=120, topic_count=12, seed=0) -> list[str]:
    """Texts of a few words of one topic each, in a random order."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"t{topic}w{w}" for w in rng.integers(0, 12, 20)) for topic in rng.integers(0, topic_count, count)]


def corpus(texts, name="train") -> Corpus:
    sizes_N = np.asarray([len(text) + 2 for text in texts])
    return Corpus(len(texts), texts.__getitem__, sizes_N, f"{name} {hash(tuple(texts))}", name)
