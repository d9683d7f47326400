"""From a DataConfig to batches, with the counts that tie rows, texts and tokens together."""

import json

import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.data.config import DataConfig, Files, PythonLibrary, TrainedBPE
from lmlab.data.open import open_data


def config(tmp_path, write_jsonl, **changes) -> DataConfig:
    one = write_jsonl("one.jsonl", [{"text": f"one {i} " * 9} for i in range(200)])
    two = write_jsonl("two.jsonl", [{"text": f"zwei {i} " * 9} for i in range(100)])
    sources = {"one": Files(str(one), heldout_percent=20), "two": Files(str(two), heldout_percent=20)}
    fixed = {"sources": sources, "length": 32, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(**fixed | changes)


def test_everything_from_one_config(tmp_path, write_jsonl, capsys):
    settings = config(tmp_path, write_jsonl, tokenizer=TrainedBPE(320))
    data = open_data(settings, lookahead=3)
    assert data.train.batch_at(0).tokens_BT.shape == (4, 35)
    assert json.loads(json.dumps(data.summary)) == data.summary
    assert data.summary["one/train/documents"] + data.summary["one/heldout/documents"] == 200
    assert data.train.tokens == data.summary["one/train/tokens"] + data.summary["two/train/tokens"]
    assert data.train.text_bytes == sum(len(text.encode()) for text in data.texts("train"))
    read = np.concatenate([b.tokens_BT[:, :32][b.segments_BT[:, :32] != 0] for b in data.heldout()])
    assert len(read) == data.summary["one/heldout/tokens"] + data.summary["two/heldout/tokens"]
    heldout_bytes = data.tokenizer.token_bytes_V[read].sum()
    assert heldout_bytes == sum(len(text.encode()) for text in data.texts("heldout"))
    assert not set(data.texts("train")) & set(data.texts("heldout"))
    capsys.readouterr()
    again = open_data(settings, lookahead=3)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(again.train.batch_at(9).tokens_BT, data.train.batch_at(9).tokens_BT)


def test_changed_text_is_read_again(tmp_path, write_jsonl):
    settings = config(tmp_path, write_jsonl)
    before = open_data(settings).summary
    write_jsonl("two.jsonl", [{"text": f"drei {i}"} for i in range(100)])
    after = open_data(settings).summary
    assert before["one/train/fingerprint"] == after["one/train/fingerprint"]
    assert before["two/train/fingerprint"] != after["two/train/fingerprint"]


def test_one_record_cannot_be_split(tmp_path, write_jsonl):
    path = write_jsonl("x.jsonl", [{"text": "the whole corpus in one record"}])
    settings = DataConfig(sources={"x": Files(str(path))}, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"'x/heldout': expected at least one document.*name held-out files"):
        open_data(settings)


def test_faults_of_a_source_name_it(tmp_path):
    sources = {"good": PythonLibrary(), "bad": Files(f"{tmp_path}/*.txt")}
    with pytest.raises(UserError, match=r"^data.sources.bad.train = "):
        open_data(DataConfig(sources=sources, cache_dir=str(tmp_path / "cache")))
