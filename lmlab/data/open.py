"""From a `DataConfig` to a tokenizer, training batches and held-out batches."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lmlab.core.errors import UserError
from lmlab.core.types import Batch
from lmlab.data.cache import TokenCache, open_cache
from lmlab.data.config import DataConfig
from lmlab.data.folders import cache_root
from lmlab.data.in_context import Order, order_documents
from lmlab.data.sources import Document, Split, documents, fingerprint
from lmlab.data.stream import Stream, heldout_batches, train_stream
from lmlab.data.tokenizers import TextTokenizer, build_tokenizer
from lmlab.data.vectors import corpus_of
from lmlab.retrieval.encoder import Encoder


@dataclass(frozen=True)
class Data:
    """All that a run reads."""

    tokenizer: TextTokenizer
    train: Stream
    heldout: Callable[[], Iterator[Batch]]
    """Starts a pass over the held-out rows of all sources, each once."""
    texts: Callable[[Split], Iterator[str]]
    """Starts a pass over the texts of a split, decoded from their tokens."""
    caches: dict[Split, dict[str, TokenCache]]
    """The tokens of each split, by source."""
    orders: dict[str, Order]
    """The order of the training documents of each source, where the config asks for one of related documents."""
    summary: dict[str, int | str]
    """Counts and hashes, ready for JSON."""


def open_data(
    config: DataConfig, *, lookahead: int = 1, host: int = 0, hosts: int = 1, encoder: Encoder | None = None
) -> Data:  # fmt: skip
    """Read, tokenise (once; later runs map the cache) and lay out everything that `config` names.

    Args:
        config: what to read.
        lookahead: n, tokens beyond T in a row: how far ahead the objective predicts.
        host: which host this is; gets its part of each batch.
        hosts: number of hosts.
        encoder: finds related documents in place of the one that the config names.

    Raises:
        UserError: any fault of the input, see `documents`, `build_tokenizer`, `open_cache`, `order_documents`,
            `train_stream`.
    """
    root = cache_root(config.cache_dir)
    prints = {}
    for name, source in config.sources.items():
        with _names_source(name):
            prints[name] = fingerprint(source, "train", root)
    shares = "".join(f"{name} {text} {config.weights.get(name, 1.0)};" for name, text in prints.items())
    tokenizer = build_tokenizer(config.tokenizer, partial(_interleaved, config, root), root, shares)
    splits: tuple[Split, ...] = ("train", "heldout")
    caches = {
        split: {name: _tokenised(config, name, split, tokenizer, root) for name in config.sources} for split in splits
    }
    orders = _orders(config, caches, tokenizer, root, encoder) if config.order == "in_context" else {}
    numbers = {name: order.documents for name, order in orders.items()}
    return Data(
        tokenizer=tokenizer,
        train=train_stream(config, caches["train"], lookahead=lookahead, host=host, hosts=hosts, orders=numbers),
        heldout=partial(heldout_batches, config, caches["heldout"], lookahead=lookahead, host=host, hosts=hosts),
        texts=partial(_texts, caches, tokenizer),
        caches=caches,
        orders=orders,
        summary=_summary(tokenizer, caches)
        | {f"{name}/train/order": order.folder.name for name, order in orders.items()},
    )


def _orders(
    config: DataConfig, caches: Mapping[Split, Mapping[str, TokenCache]], tokenizer: TextTokenizer, root: Path,
    encoder: Encoder | None,
) -> dict[str, Order]:  # fmt: skip
    """Each source in an order of its own, so that its weight in the mixture holds everywhere."""
    found = {}
    for name in config.sources:
        corpus, heldout = (corpus_of(caches[split][name], tokenizer, f"{name}/{split}") for split in caches)
        found[name] = order_documents(
            config.in_context, corpus, root, heldout=heldout, length=config.length, seed=config.seed, encoder=encoder
        )
    return found


def _tokenised(
    config: DataConfig, name: str, split: Split, tokenizer: TextTokenizer, root: Path
) -> TokenCache:  # fmt: skip
    source = config.sources[name]
    read = partial(_documents, config, name, split, root)
    with _names_source(name):
        content = fingerprint(source, split, root)
    return open_cache(read, content, tokenizer, root, label=f"{name}/{split}")


def _documents(config: DataConfig, name: str, split: Split, root: Path) -> Iterator[Document]:
    with _names_source(name):
        yield from documents(config.sources[name], split, root)


@contextmanager
def _names_source(name: str) -> Iterator[None]:
    """Faults of a source say which one of the mixture it is."""
    try:
        yield
    except UserError as error:
        field = error.field.replace("data.sources", f"data.sources.{name}", 1)
        raise UserError(field, error.value, error.expected, error.remedy) from error


def _interleaved(config: DataConfig, root: Path) -> Iterator[Document]:
    """Training documents of all sources, taken so that each source's bytes keep to its weight."""
    readers = {name: _documents(config, name, "train", root) for name in config.sources}
    taken = dict.fromkeys(readers, 0.0)
    while readers:
        name = min(readers, key=taken.__getitem__)
        document = next(readers[name], None)
        if document is None:
            del readers[name]
            continue
        taken[name] += len(document.text) / config.weights.get(name, 1.0)
        yield document


def _texts(
    caches: Mapping[Split, Mapping[str, TokenCache]], tokenizer: TextTokenizer, split: Split
) -> Iterator[str]:  # fmt: skip
    return (cache.text(i, tokenizer) for cache in caches[split].values() for i in range(cache.documents))


def _summary(
    tokenizer: TextTokenizer, caches: Mapping[Split, Mapping[str, TokenCache]]
) -> dict[str, int | str]:  # fmt: skip
    counts: dict[str, int | str] = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    for split, by_source in caches.items():
        for name, cache in by_source.items():
            counts[f"{name}/{split}/documents"] = cache.documents
            counts[f"{name}/{split}/tokens"] = len(cache.tokens_N)
            counts[f"{name}/{split}/bytes"] = cache.text_bytes
            counts[f"{name}/{split}/fingerprint"] = cache.fingerprint
    return counts
