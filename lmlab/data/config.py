"""What to read, how to cut it into tokens, and how to lay it out in batches. Imports no JAX."""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from lmlab.core.errors import check
from lmlab.retrieval.config import EncoderConfig, ExactSearch, HashTfidf, SearchConfig


@dataclass(frozen=True)
class PythonLibrary:
    """The sources and help topics of Python's standard library: real text on every machine, split by name."""

    heldout_percent: int = 4
    """Share of the documents that is held out, in percent."""

    def __post_init__(self) -> None:
        """Check the share."""
        check(0 < self.heldout_percent < 50, "heldout_percent", self.heldout_percent, "1 to 49")


@dataclass(frozen=True)
class Files:
    """Local .txt (one document a file), .jsonl, .jsonl.gz or .parquet files (one document a record)."""

    train: str
    """Glob of the training files; ** matches folders."""
    heldout: str = ""
    """Glob of the held-out files. Empty: a share of the training documents is held out, by content hash; of a single
    text file, its end."""
    heldout_percent: int = 4
    """That share, in percent."""
    text_field: str = "text"
    """The field (JSON) or column (Parquet) that holds the text."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8."""

    def __post_init__(self) -> None:
        """Check the share."""
        check(0 < self.heldout_percent < 50, "heldout_percent", self.heldout_percent, "1 to 49")


@dataclass(frozen=True)
class Tfds:
    """Any tensorflow-datasets name that `tfds.data_source` reads (as array_record); no TensorFlow."""

    name: str
    """Dataset and config, such as "lm1b" or "wiki40b/en"."""
    train: str = "train"
    """Split expression for training."""
    heldout: str = "validation"
    """Split expression that is held out."""
    text_field: str = "text"
    """The feature that holds the text."""
    data_dir: str = ""
    """Where the prepared dataset lies; empty: the tfds default."""


Source = PythonLibrary | Files | Tfds


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes; id 256 ends a document. Vocabulary 257."""


@dataclass(frozen=True)
class TokenizerFile:
    """A Hugging Face `tokenizer.json`."""

    path: str
    """The file."""
    end_token: str = ""
    """The token that separates documents; empty: the first of the usual names that the vocabulary holds."""


@dataclass(frozen=True)
class TrainedBPE:
    """Byte-level BPE trained on the training documents of this run."""

    vocab_size: int = 4096
    """Number of tokens, the 256 bytes and the end-of-text token included."""
    train_bytes: int = 20_000_000
    """Documents are read for training until this many bytes."""

    def __post_init__(self) -> None:
        """Check the size."""
        check(self.vocab_size >= 257, "vocab_size", self.vocab_size, "at least 257 (256 bytes, one special)")


Tokenizer = Bytes | TokenizerFile | TrainedBPE


PackingMode = Literal["concat", "pad", "whole"]


@dataclass(frozen=True)
class InContextOrder:
    """Related documents one after the other, each once (In-Context Pretraining, arXiv 2310.10638)."""

    encoder: EncoderConfig = field(default_factory=HashTfidf)
    """How documents become vectors."""
    piece_words: int = 0
    """Longer documents are cut into pieces of this many words, each with a vector; 0: the beginning alone, as far as
    the encoder reads."""
    pieces: Literal["each", "mean"] = "each"
    """Documents are as alike as their closest pieces, or as the means of their pieces."""
    center: bool = False
    """Subtract the mean vector: fewer documents are then near to all others."""
    neighbours: int = 20
    """k: neighbours that are searched for each document (the paper's code: 50)."""
    search: SearchConfig = field(default_factory=ExactSearch)
    """How they are found."""
    duplicates: Literal["cosine", "minhash", "exact", "prefix_jaccard", "none"] = "cosine"
    """What counts as a copy and is left out: a neighbour so similar; 5-word shingles that overlap so much (MinHash);
    the same text up to case and white space; on the path, a beginning like that of the document before (the paper's
    code)."""
    threshold: float = 0.95
    """From which similarity on documents are copies (prefix_jaccard: above it; the paper's code: 0.85)."""
    linkage: Literal["single", "complete"] = "single"
    """single: copies of copies are copies; complete: only what is a copy of a document that stays goes."""
    keep: Literal["first", "longest"] = "first"
    """Which of some copies stays."""
    heldout_threshold: float = 0.95
    """Training documents whose cosine with a held-out one is as high are left out; above 1: none. With pieces = each
    one piece is enough."""
    mutual: bool = False
    """An edge needs each to be a neighbour of the other."""
    min_sim: float = 0.0
    """Pairs less similar are no neighbours."""
    max_degree: int = 0
    """Edges of a document; 0: no limit."""
    tour: Literal[
        "dynamic", "static", "greedy_edges", "release", "buffer_chain", "neighbours", "clusters", "random"
    ] = "dynamic"  # fmt: skip
    """dynamic: the paper's rule, degrees counted among what is left; static: degrees of the whole graph; greedy_edges:
    the heaviest edges first; release: what the paper's code does; buffer_chain: the best of a buffer is next, among
    the documents that stay (arXiv 2402.13991). For comparison: neighbours: windows of a document and its neighbours,
    which repeat; clusters: at random within clusters; random."""
    link_fragments: bool = False
    """Join the pieces between jumps where their ends are most alike (dynamic, static, greedy_edges, release)."""
    buffer: int = 2048
    """Documents in the buffer of buffer_chain."""
    scorer: Literal["vectors", "bm25"] = "vectors"
    """What buffer_chain compares by."""

    def __post_init__(self) -> None:
        """Check the ranges, and that linking has something to link."""
        for name in ("neighbours", "buffer"):
            check(getattr(self, name) >= 1, f"data.in_context.{name}", getattr(self, name), "at least 1")
        for name in ("piece_words", "max_degree"):
            check(getattr(self, name) >= 0, f"data.in_context.{name}", getattr(self, name), "0 or more")
        check(self.threshold > 0, "data.in_context.threshold", self.threshold, "a positive similarity")
        check(-1 <= self.min_sim <= 1, "data.in_context.min_sim", self.min_sim, "a cosine, from -1 to 1")
        check(not math.isnan(self.heldout_threshold), "data.in_context.heldout_threshold", self.heldout_threshold,
              "a cosine, or more than 1")  # fmt: skip
        linkable = ("dynamic", "static", "greedy_edges", "release")
        check(not self.link_fragments or self.tour in linkable, "data.in_context.link_fragments", self.link_fragments,
              f"False with tour = {self.tour!r}", f"Pieces are what {', '.join(linkable)} leave.")  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """A weighted mixture of sources, tokenised once into a cache, packed into rows."""

    sources: dict[str, Source] = field(default_factory=lambda: {"python": PythonLibrary()})
    """Sources by name."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the rows from each source; a name that is absent has weight 1."""
    tokenizer: Tokenizer = field(default_factory=Bytes)
    """How text becomes tokens."""
    length: int = 256
    """T: the tokens that the model reads in a row (rows carry further tokens that are only predicted)."""
    batch_size: int = 16
    """B: rows in a global batch, over all hosts."""
    packing: PackingMode = "concat"
    """concat: documents one after the other, cut at row ends; pad: one document a row, the rest dropped; whole: as many
    documents as a row has room for, none divided, what is longer than a row dropped."""
    order: Literal["shuffled", "corpus", "in_context"] = "shuffled"
    """Order of the documents before they are packed; in_context: related ones follow one another. Rows are shuffled in
    any case."""
    in_context: InContextOrder = field(default_factory=InContextOrder)
    """How related documents are found and put in order, where `order` asks for it."""
    recut: bool = False
    """Cut rows at other places in every epoch (packing = concat), so that related documents meet in other rows."""
    attend: Literal["document", "row"] = "document"
    """What a token sees of its row: its own document, or all that is before it (In-Context Pretraining)."""
    positions: Literal["document", "row"] = "document"
    """Where positions begin anew: at each document, or at each row."""
    seed: int = 0
    """Seed of all orders of data."""
    cache_dir: str = ""
    """Where token caches go; empty: $LMLAB_CACHE or ~/.cache/lmlab."""
    prefetch: int = 4
    """Batches made ahead of the train step."""

    def __post_init__(self) -> None:
        """Check the sizes and that weights name sources."""
        check(bool(self.sources), "data.sources", self.sources, "at least one source")
        check(self.length >= 1, "data.length", self.length, "at least 1 token")
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1 row")
        check(self.prefetch >= 1, "data.prefetch", self.prefetch, "at least 1 batch")
        check(not self.recut or self.packing == "concat", "data.recut", self.recut, "False unless packing is concat")
        check(self.order != "in_context" or self.packing == "concat", "data.packing", self.packing,
              "concat with order = in_context", "Other packings choose what goes into a row by its size.")  # fmt: skip
        for name, weight in self.weights.items():
            check(name in self.sources, "data.weights", name, f"names of sources: {', '.join(self.sources)}")
            check(weight > 0, f"data.weights[{name}]", weight, "a positive share")


@dataclass(frozen=True)
class ConversationsConfig:
    """Conversations to learn the assistant's part of: .jsonl or .jsonl.gz, one a line, packed into rows.

    A line is {"messages": [{"role", "content"}, ...]}, {"prompt", "completion"}, {"instruction", "input", "output"} as
    Alpaca has it, or {"instruction", "context", "response"} as Dolly has it.
    """

    train: str
    """Glob of the training files; ** matches folders."""
    heldout: str = ""
    """Glob of the held-out files. Empty: a share of the conversations is held out, by content hash."""
    heldout_percent: int = 4
    """That share, in percent."""
    turns: Literal["all", "last"] = "all"
    """Learn every answer of a conversation, or the last one alone."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What to do with a conversation longer than a row. One without an answer in what is left is dropped."""
    invalid: Literal["error", "drop"] = "error"
    """What to do with a line that is no conversation, or has no answer."""
    date: str = "2024-07-26"
    """The date that templates which ask for it are told: fixed, so that the data are the same on every day."""
    length: int = 512
    """T: the tokens that the model reads in a row (rows carry further tokens that are only predicted)."""
    batch_size: int = 16
    """B: rows in a global batch, over all hosts."""
    seed: int = 0
    """Seed of all orders of data."""
    prefetch: int = 4
    """Batches made ahead of the train step."""

    def __post_init__(self) -> None:
        """Check the date, and by `Files` and `DataConfig` what they share."""
        try:
            datetime.fromisoformat(self.date)
        except ValueError:
            check(False, "data.date", self.date, "a date such as 2024-07-26")
        self.stream_config()

    def stream_config(self) -> DataConfig:
        """The same as a mixture of one source."""
        source = Files(self.train, self.heldout, self.heldout_percent)
        return DataConfig(
            sources={"conversations": source}, length=self.length, batch_size=self.batch_size, packing="whole",
            seed=self.seed, prefetch=self.prefetch,
        )  # fmt: skip
