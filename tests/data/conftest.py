"""Small corpora for the tests of lmlab.data."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, records: list) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
