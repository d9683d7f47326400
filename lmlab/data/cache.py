"""Documents as token ids on disk: made once, memory-mapped, and whole whenever the folder is there.

A document is stored as [end] tokens [end]. GPT-2's training text separates documents by its end token, so
that token stands both before and after each text; kept in both places here, the first real token has
something to be predicted from even when attention stops at document borders, the last predicts that the text
ends, and a prompt begins as a document does. All bytes of the text are predicted, which makes bits per byte
exact.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmlab.core.errors import UserError
from lmlab.data.folders import META, build_once, is_sealed, seal
from lmlab.data.progress import Tell, counting, say
from lmlab.data.sources import Document
from lmlab.data.tokenizers import TextTokenizer

FORMAT = 1
_TOKENS, _OFFSETS, _IDS, _ID_OFFSETS = "tokens.bin", "offsets.npy", "ids.txt", "ids.npy"
_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 4_000_000, 4096


@dataclass(frozen=True)
class TokenCache:
    """The tokens of one split of one source, memory-mapped."""

    tokens_N: np.ndarray
    """[N] uint16 or uint32 ids of all documents in order, with their markers."""
    offsets: np.ndarray
    """[documents + 1] int64 where each document begins."""
    document_id: Callable[[int], str]
    """The id of a document by its number."""
    text_bytes: int
    """UTF-8 bytes of all texts."""
    fingerprint: str
    """Hash of the documents, the tokenizer and the format."""
    labels_N: np.ndarray | None = None
    """[N] bool which tokens count as labels; None: all."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def text(self, document: int, tokenizer: TextTokenizer) -> str:
        """The text of a document, decoded from its tokens."""
        begin, end = self.offsets[document : document + 2]
        return tokenizer.decode(self.tokens_N[begin + 1 : end - 1].tolist())


def open_cache(
    documents: Callable[[], Iterator[Document]], documents_fingerprint: str, tokenizer: TextTokenizer,
    cache_dir: Path, *, label: str,
) -> TokenCache:  # fmt: skip
    """The tokens of `documents()`, from the cache or made now; empty texts are left out.

    Files are checked by size and by a checksum over up to 8 MB of each, spread evenly; a folder that fails is
    made anew, and a line says so.

    Args:
        documents: starts a pass over the documents; called only when there is no cache.
        documents_fingerprint: hash of what that pass yields.
        tokenizer: how text becomes ids; its cores do the work, the chunks bound the memory.
        cache_dir: the folder for caches.
        label: how messages call these documents.

    Raises:
        UserError: no document has text; an id is outside the vocabulary; the disk is full or read-only.
    """
    inputs = f"{documents_fingerprint} {tokenizer.fingerprint} {FORMAT}"
    key = hashlib.blake2b(inputs.encode(), digest_size=10).hexdigest()
    target = cache_dir / f"tokens-{key}"

    def build(folder: Path) -> None:
        if target.exists():
            say(f"{label}: the token cache {target} is damaged and is made anew")
        with counting(f"tokenising {label}") as tell:
            counts = _write(folder, documents(), tokenizer, label, tell)
        seal(folder, {"format": FORMAT, "fingerprint": key, **counts})

    return _map(build_once(target, lambda folder: is_sealed(folder, FORMAT), build))


def _write(
    folder: Path, documents: Iterator[Document], tokenizer: TextTokenizer, label: str, tell: Tell
) -> dict[str, int | str]:  # fmt: skip
    """Write tokens, ids and offsets; only the offsets are held in memory until the end."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    ends, id_ends, text_bytes = array("q", [0]), array("q", [0]), 0
    with (folder / _TOKENS).open("wb") as tokens_file, (folder / _IDS).open("wb") as ids_file:
        for chunk in _chunks(documents):
            encoded = tokenizer.encode_batch([document.text for document in chunk])
            for document, tokens_T in zip(chunk, encoded, strict=True):
                _check_ids(document, tokens_T, tokenizer.vocab_size, label)
                marked = np.pad(tokens_T, 1, constant_values=tokenizer.end_id).astype(dtype)
                tokens_file.write(marked.tobytes())
                ends.append(ends[-1] + len(marked))
                id_ends.append(id_ends[-1] + ids_file.write(document.id.encode(errors="replace") + b"\n"))
                text_bytes += len(document.text.encode())
            tell(len(ends) - 1, ends[-1])
    if not text_bytes:
        raise UserError("data.sources", label, "at least one document with text", _EMPTY_REMEDY)
    np.save(folder / _OFFSETS, np.asarray(ends))
    np.save(folder / _ID_OFFSETS, np.asarray(id_ends))
    return {"dtype": dtype.name, "documents": len(ends) - 1, "tokens": ends[-1], "text_bytes": text_bytes}


_EMPTY_REMEDY = (
    "A corpus of few documents may have none in a split: name held-out files, change heldout_percent, or "
    "store a document a paragraph."
)


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists that are long enough to keep all cores busy and short enough for memory."""
    chunk, characters = [], 0
    for document in documents:
        if not document.text:
            continue
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _check_ids(document: Document, tokens_T: np.ndarray, vocab_size: int, label: str) -> None:
    outside = tokens_T[(tokens_T < 0) | (tokens_T >= vocab_size)]
    if len(outside):
        raise UserError(
            "token id", int(outside[0]),
            f"0 to {vocab_size - 1}, the vocabulary, in document {document.id} of {label}",
            "The tokenizer and its vocabulary do not belong together.",
        )  # fmt: skip


def _map(folder: Path) -> TokenCache:
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    # A plain view: indexing the memmap class itself costs a Python call each time.
    tokens_N = np.memmap(folder / _TOKENS, dtype=meta["dtype"], mode="r").view(np.ndarray)
    names = np.memmap(folder / _IDS, dtype=np.uint8, mode="r").view(np.ndarray)
    name_offsets = np.load(folder / _ID_OFFSETS, mmap_mode="r").view(np.ndarray)

    def document_id(document: int) -> str:
        begin, end = name_offsets[document : document + 2]
        return names[begin : end - 1].tobytes().decode()

    offsets = np.load(folder / _OFFSETS, mmap_mode="r").view(np.ndarray)
    return TokenCache(tokens_N, offsets, document_id, meta["text_bytes"], meta["fingerprint"])
