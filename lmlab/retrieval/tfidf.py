"""Hashed tf-idf under a sparse random projection: an encoder without weights, the same on every machine."""

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from lmlab.retrieval.config import HashTfidf
from lmlab.retrieval.encoder import Encode, Encoder, unit_rows

_WORD = re.compile(r"\w+")
_KNOWN_WORDS = 1_000_000


def hash_tfidf(config: HashTfidf) -> Encoder:
    """Words and pairs of neighbouring words; weight (1 + ln tf) (1 + ln((1 + N) / (1 + df))).

    Hashes are CRC-32 and splitmix64, never Python's own, which differs between processes. Each bucket adds its weight
    with a sign to `spread` coordinates (arXiv 1012.1577 keeps inner products so, up to noise of 1 / sqrt(D)).
    """

    def fit(batches: Iterable[Sequence[str]]) -> Encode:
        count, df_V = 0, np.zeros(1 << config.bits, np.int64)
        for texts in batches:
            count += len(texts)
            df_V += np.bincount(_terms(texts, config.bits)[1], minlength=len(df_V))
        idf_V = 1 + np.log((1 + count) / (1 + df_V))
        columns_VS, signs_VS = _projection(config)

        def encode(texts: Sequence[str]) -> np.ndarray:
            document, bucket, frequency = _terms(texts, config.bits)
            weight = (1 + np.log(frequency)) * idf_V[bucket]
            flat = np.zeros(len(texts) * config.dimensions)
            for s in range(config.spread):
                place = document * config.dimensions + columns_VS[bucket, s]
                flat += np.bincount(place, weight * signs_VS[bucket, s], minlength=len(flat))
            return unit_rows(flat.reshape(len(texts), config.dimensions))

        return encode

    return Encoder(config.dimensions, f"{config} 1", fit)


def _terms(texts: Sequence[str], bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, bucket, how often) of every term of every text, sorted."""
    words = [_hashes(_WORD.findall(text.lower())) for text in texts]
    document = np.repeat(np.arange(len(texts)), [len(row) for row in words])
    one = np.concatenate([np.zeros(0, np.uint64), *words])
    pair = _mix(one[:-1] * np.uint64(0x9E3779B97F4A7C15) + one[1:])[document[:-1] == document[1:]]
    both = np.concatenate([_mix(one), pair]) >> np.uint64(64 - bits)
    owner = np.concatenate([document, document[:-1][document[:-1] == document[1:]]])
    term, frequency = np.unique((owner << bits) | both.astype(np.int64), return_counts=True)
    return term >> bits, term & ((1 << bits) - 1), frequency


_known: dict[str, int] = {}


def _hashes(words: list[str]) -> np.ndarray:
    """CRC-32 of each word; words repeat, so they are remembered."""
    if len(_known) > _KNOWN_WORDS:
        _known.clear()
    found = []
    for word in words:
        number = _known.get(word)
        if number is None:
            number = _known[word] = zlib.crc32(word.encode(errors="surrogatepass"))
        found.append(number)
    return np.asarray(found, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _projection(config: HashTfidf) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates and signs [2^bits, spread] that the buckets add to."""
    places = np.arange((1 << config.bits) * config.spread, dtype=np.uint64).reshape(-1, config.spread)
    draws = _mix(places + (np.uint64(config.seed % 2**32) << np.uint64(32)))
    signs = np.where(draws >> np.uint64(63), 1.0, -1.0)
    return ((draws & np.uint64(0xFFFFFFFF)) % np.uint64(config.dimensions)).astype(np.int64), signs
