"""The first two stages of an order: a vector for each document on disk, and its nearest neighbours."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lmlab.data.cache import TokenCache
from lmlab.data.config import InContextOrder
from lmlab.data.stages import in_blocks, open_array, stage
from lmlab.data.tokenizers import TextTokenizer
from lmlab.retrieval.config import FaissSearch
from lmlab.retrieval.encoder import Encoder, unit_rows
from lmlab.retrieval.index import Search, exact_search

_WORD = re.compile(r"\S+\s*")
_DOCUMENTS = 1024
"""Documents that are encoded together: what is lost when the encoding is killed."""
_CHARACTERS = 1 << 22
"""Of texts that are in memory together."""
_PIECES_OF_OTHERS = 4
"""Neighbours are searched for this many times as many pieces, as some lie in one document."""


@dataclass(frozen=True)
class Corpus:
    """Documents as the stages see them."""

    count: int
    text: Callable[[int], str]
    sizes_N: np.ndarray
    """Tokens of each."""
    fingerprint: str
    label: str
    """How messages call them."""


def corpus_of(cache: TokenCache, tokenizer: TextTokenizer, label: str) -> Corpus:
    """The documents of a token cache."""
    text = partial(cache.text, tokenizer=tokenizer)
    return Corpus(cache.documents, text, np.diff(cache.offsets), cache.fingerprint, label)


@dataclass(frozen=True)
class Vectors:
    """Rows of a file as unit vectors in float32, read and centred when asked for."""

    stored_MD: np.ndarray
    """float16, memory-mapped."""
    document_M: np.ndarray | None
    """The document of each row, rising; None: a row for each document."""
    mean_D: np.ndarray | None
    """Subtracted before rows are brought to length 1."""
    key: str
    """Hash of what they were made from, centring aside."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return self.stored_MD.shape[0], self.stored_MD.shape[1]

    def __len__(self) -> int:
        return len(self.stored_MD)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Unit rows [n, D] by slice or numbers."""
        chosen_ND = self.stored_MD[rows].astype(np.float32)
        return unit_rows(chosen_ND if self.mean_D is None else chosen_ND - self.mean_D)


def encode_corpus(config: InContextOrder, corpus: Corpus, encoder: Encoder, root: Path) -> Vectors:
    """A vector for each document, or for each of its pieces: embeddings.npy (float16), and document.npy.

    Raises:
        UserError: weights that are missing, a full disk.
    """

    def build(folder: Path) -> dict[str, int]:
        document_M = _piece_owners(config, corpus)
        rows = corpus.count if config.pieces == "mean" else len(document_M)
        stored_MD = open_array(folder / "embeddings.npy", (rows, encoder.dimensions), np.float16)
        if rows != corpus.count:
            np.save(folder / "document.npy", document_M)
        encode = encoder.fit(text_batches(corpus))

        def fill(begin: int, end: int) -> None:
            pieces = (piece for i in range(begin, end) for piece in _pieces(config, corpus.text(i)))
            vectors_ND = np.concatenate([encode(some) for some in _batches(pieces)])
            first, last = np.searchsorted(document_M, [begin, end])
            if config.pieces == "mean":
                starts = np.searchsorted(document_M[first:last], np.arange(begin, end))
                vectors_ND = unit_rows(np.add.reduceat(vectors_ND, starts, axis=0))
                first, last = begin, end
            stored_MD[first:last] = vectors_ND

        in_blocks(folder, f"encoding {corpus.label}", corpus.count, _DOCUMENTS, fill, stored_MD)
        return {"documents": corpus.count, "rows": rows}

    inputs = {
        "corpus": corpus.fingerprint,
        "encoder": encoder.fingerprint,
        "pieces": (config.piece_words, config.pieces),
    }
    folder, key = stage(root, "vectors", inputs, build)
    stored_MD = np.load(folder / "embeddings.npy", mmap_mode="r")
    owners = folder / "document.npy"
    document_M = np.load(owners) if owners.is_file() else None
    return Vectors(stored_MD, document_M, _mean(stored_MD) if config.center else None, key)


def _mean(stored_MD: np.ndarray) -> np.ndarray:
    total_D = np.zeros(stored_MD.shape[1])
    for begin in range(0, len(stored_MD), 65536):
        total_D += np.sum(stored_MD[begin : begin + 65536], axis=0, dtype=np.float64)
    return (total_D / max(len(stored_MD), 1)).astype(np.float32)


def _pieces(config: InContextOrder, text: str) -> list[str]:
    if not config.piece_words:
        return [text]
    words = _WORD.findall(text)
    size = config.piece_words
    return ["".join(words[i : i + size]) for i in range(0, len(words), size)] or [text]


def _piece_owners(config: InContextOrder, corpus: Corpus) -> np.ndarray:
    if not config.piece_words:
        return np.arange(corpus.count)
    counts = [len(_pieces(config, corpus.text(i))) for i in range(corpus.count)]
    return np.repeat(np.arange(corpus.count), counts)


def text_batches(corpus: Corpus) -> Iterator[list[str]]:
    """All texts, some at a time."""
    return _batches(corpus.text(i) for i in range(corpus.count))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """As many at a time as a stage encodes together, but fewer where they are long."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _DOCUMENTS or size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Neighbours:
    """What the search found, memory-mapped."""

    ids_MK: np.ndarray
    """int32 or int64 numbers of rows, the nearest first; -1: none."""
    sims_MK: np.ndarray
    """float32 cosines."""
    heldout_M: np.ndarray
    """float32 cosine with the nearest held-out row; -inf: there is none."""
    key: str


def find_neighbours(
    config: InContextOrder, vectors: Vectors, heldout: Vectors | None, root: Path, label: str
) -> Neighbours:  # fmt: skip
    """The nearest of each row: knn_idx.npy, knn_sim.npy, and heldout_sim.npy.

    heldout: what is near to these is told, so that it can be left out; None: nothing is.
    """
    rows = len(vectors)
    factor = 1 if vectors.document_M is None else _PIECES_OF_OTHERS
    k = max(min(config.neighbours * factor, rows - 1), 1)

    def build(folder: Path) -> None:
        dtype = np.int32 if rows < 2**31 else np.int64
        ids_MK = open_array(folder / "knn_idx.npy", (rows, k), dtype)
        sims_MK = open_array(folder / "knn_sim.npy", (rows, k), np.float32)
        heldout_M = open_array(folder / "heldout_sim.npy", (rows,), np.float32)
        search = _searcher(config, vectors, k)
        near = exact_search(heldout, 1) if heldout is not None and len(heldout) else None
        block = min(config.search.queries, rows)

        def fill(begin: int, end: int) -> None:
            # Blocks have one shape, so that the search is compiled once: the last begins earlier.
            first = max(end - block, 0)
            queries, own = vectors[first:end], np.arange(first, end)
            ids_MK[first:end], sims_MK[first:end] = search(queries, own)
            none = np.full(end - first, -1)
            heldout_M[first:end] = near(queries, none)[1][:, 0] if near else -np.inf

        in_blocks(folder, f"neighbours of {label}", rows, block, fill, ids_MK, sims_MK, heldout_M)

    inputs = {
        "vectors": vectors.key, "heldout": heldout.key if heldout is not None else None, "k": k,
        "center": config.center, "search": {"kind": type(config.search).__name__, **asdict(config.search)},
    }  # fmt: skip
    folder, key = stage(root, "neighbours", inputs, build)
    ids_MK, sims_MK, heldout_M = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("knn_idx", "knn_sim", "heldout_sim")
    )
    return Neighbours(ids_MK, sims_MK, heldout_M, key)


def _searcher(config: InContextOrder, vectors: Vectors, k: int) -> Search:
    if isinstance(config.search, FaissSearch):
        from lmlab.retrieval.approximate import faiss_search

        return faiss_search(vectors, k, config.search)
    return exact_search(vectors, k, block=config.search.block)
