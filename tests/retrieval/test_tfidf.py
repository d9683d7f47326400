"""Hashed tf-idf: the same numbers in every process, alike texts near, and inner products kept by the projection."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from lmlab.retrieval.config import HashTfidf
from lmlab.retrieval.tfidf import hash_tfidf

TEXTS = ["the cat sat on the mat", "a cat sat on a mat", "stocks fell on monday", "", "?!", "the cat sat on the mat"]


def vectors(texts, **settings):
    return hash_tfidf(HashTfidf(**settings)).fit([texts])(texts)


def test_alike_texts_are_near_and_texts_without_words_are_zero():
    found = vectors(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(found[0], found[5])
    assert found[0] @ found[1] > 0.2 > abs(found[0] @ found[2])


def test_batches_make_no_difference():
    encode = hash_tfidf(HashTfidf()).fit([TEXTS[:2], TEXTS[2:]])
    np.testing.assert_array_equal(np.concatenate([encode(TEXTS[:1]), encode(TEXTS[1:])]), vectors(TEXTS))


def test_every_process_finds_the_same_and_seeds_differ():
    program = (
        "import sys, numpy as np; from tests.retrieval.test_tfidf import *; "
        "print(vectors(TEXTS).tobytes().hex())"
    )  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": root}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert bytes.fromhex(out.stdout.strip()) == vectors(TEXTS).tobytes()
    assert vectors(TEXTS, seed=1).tobytes() != vectors(TEXTS).tobytes()


def test_the_projection_keeps_inner_products():
    """Without collisions cosine is that of the weights; the noise falls as 1 / sqrt(D)."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 300, 40)) for _ in range(30)]
    exact = vectors(texts, dimensions=60_000, spread=64)
    near = vectors(texts, dimensions=2048)
    np.testing.assert_allclose(near @ near.T, exact @ exact.T, atol=5 / 2048**0.5)
