"""Small corpora for the tests of lmlab.data."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmlab.data.cache import TokenCache, open_cache
from lmlab.data.sources import Document
from lmlab.data.tokenizers import byte_tokenizer

NASTY = [
    "plain",
    "a <|endoftext|> b </s> [SEP] <s>",
    "e\u0301 é 漢字 🧑‍🚀 \U0010ffff",
    "\x00\x01\t\r\n\u2028\u2029\x85 end",
    "   spaces   and\n\n\n\nlines  ",
    "-" * 300,
    "1234567890 x=1;\nif x:\n\treturn",
]


@pytest.fixture
def nasty() -> list[str]:
    return NASTY


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[..., TokenCache]:
    """A token cache of n documents of random letters; document i is named "NAME i"."""

    def make(name: str, n: int, seed: int = 0, longest: int = 40) -> TokenCache:
        rng = np.random.default_rng(seed)
        texts = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, longest + 1)))) for _ in range(n)]
        documents = [Document(f"{name} {i}", text) for i, text in enumerate(texts)]
        return open_cache(
            lambda: iter(documents), f"{name}-{n}-{seed}-{longest}", byte_tokenizer(), tmp_path, label=name
        )

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, records: list) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
