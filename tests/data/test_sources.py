"""Readers of files and tfds data sets: what comes out, and one clear message for each fault."""

import gzip
import json

import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet

from lmlab.core.errors import UserError
from lmlab.data.config import Files, Tfds
from lmlab.data.sources import documents, fingerprint

ALL = {"heldout": "none"}


def read(source, split="train", cache_dir=None):
    return [(document.id, document.text) for document in documents(source, split, cache_dir)]


def fault(source, tmp_path, split="train") -> str:
    with pytest.raises(UserError) as caught:
        read(source, split, tmp_path)
    return str(caught.value)


def both_splits(source) -> list[tuple[str, str]]:
    return sorted(read(source, "train") + read(source, "heldout"))


def test_text_files_are_one_document_each(tmp_path, nasty):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_bytes(nasty[2].encode())
    (tmp_path / "sub" / "b.md").write_bytes(b"one\r\ntwo")
    with gzip.open(tmp_path / "sub" / "c.txt.gz", "wb") as handle:
        handle.write(b"packed")
    found = both_splits(Files(f"{tmp_path}/**/*.*"))
    assert found == [("a.txt", nasty[2]), ("sub/b.md", "one\r\ntwo"), ("sub/c.txt.gz", "packed")]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_json_lines_keep_their_line_numbers(tmp_path, nasty, name):
    lines = [json.dumps({"body": text, "n": 1}, ensure_ascii=False) for text in nasty]
    data = ("\n\n".join(lines) + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = both_splits(Files(f"{tmp_path}/{name}", text_field="body"))
    assert found == sorted((f"{name}:{2 * i + 1}", text) for i, text in enumerate(nasty))


def test_parquet_reads_the_named_column(tmp_path, nasty):
    parquet.write_table(pa.table({"id": range(700), "body": (nasty * 100)}), tmp_path / "x.parquet")
    found = both_splits(Files(f"{tmp_path}/*.parquet", text_field="body"))
    assert found == sorted((f"x.parquet:{i + 1}", text) for i, text in enumerate(nasty * 100))


def test_split_by_content_is_disjoint_fixed_and_near_its_share(write_jsonl):
    path = write_jsonl("x.jsonl", [{"text": f"document {i % 900}"} for i in range(1000)])
    source = Files(str(path), heldout_percent=10)
    train, heldout = read(source, "train"), read(source, "heldout")
    assert len(train) + len(heldout) == 1000
    assert not {text for _, text in train} & {text for _, text in heldout}
    assert 60 <= len(heldout) <= 140
    assert read(source, "heldout") == heldout


@pytest.mark.parametrize("text", ["".join(f"line {i}\n" for i in range(1000)), "x" * 1000])
def test_the_end_of_a_single_text_file_is_held_out(tmp_path, text):
    (tmp_path / "all.txt").write_text(text)
    source = Files(f"{tmp_path}/all.txt", heldout_percent=10)
    ((_, train),), ((_, heldout),) = read(source, "train"), read(source, "heldout")
    assert train + heldout == text
    assert 0.1 <= len(heldout) / len(text) < 0.102
    assert train.endswith("\n" if "\n" in text else "x")


def test_heldout_files_are_never_training_files(tmp_path):
    for name in ("a", "b", "valid"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = Files(f"{tmp_path}/*.txt", heldout=f"{tmp_path}/valid.txt")
    assert read(source, "train") == [("a.txt", "a"), ("b.txt", "b")]
    assert read(source, "heldout") == [("valid.txt", "valid")]
    overlap = fault(Files(f"{tmp_path}/valid.txt", heldout=f"{tmp_path}/*.txt"), tmp_path)
    assert "besides the held-out ones" in overlap


def test_fingerprint_follows_content_and_settings_not_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("text")
    one, two = Files(f"{tmp_path}/one/*.txt"), Files(f"{tmp_path}/two/*.txt")
    before = fingerprint(one, "train", tmp_path)
    assert before == fingerprint(two, "train", tmp_path) == fingerprint(one, "train", tmp_path)
    assert before != fingerprint(one, "heldout", tmp_path)
    assert before != fingerprint(Files(f"{tmp_path}/one/*.txt", heldout_percent=5), "train", tmp_path)
    (tmp_path / "one" / "x.txt").write_text("texts")
    assert before != fingerprint(one, "train", tmp_path)


def test_no_file_matches(tmp_path):
    message = fault(Files(f"{tmp_path}/*.txt"), tmp_path)
    assert "data.sources.train" in message
    assert "at least one file" in message
    assert "current folder" in message


def test_invalid_utf8_names_the_file_and_the_byte(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    message = fault(Files(f"{tmp_path}/bad.txt"), tmp_path)
    assert "bad.txt" in message
    assert "0xff at byte offset 5" in message
    assert "invalid_utf8" in message
    source = Files(f"{tmp_path}/bad.txt", invalid_utf8="replace")
    found = read(source, "train") + read(source, "heldout")
    assert "".join(text for _, text in found) == "good \ufffd bad"


def test_invalid_utf8_in_a_line_counts_bytes_from_the_file_start(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xc3("}\n')
    message = fault(Files(f"{tmp_path}/bad.jsonl"), tmp_path)
    assert "bad.jsonl:2" in message
    assert "byte offset 25" in message


def test_lone_surrogate_counts_as_invalid_utf8(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x\\ud800y"}\n')
    assert "lone surrogate at character 1" in fault(Files(f"{tmp_path}/bad.jsonl"), tmp_path)
    ((_, text),) = both_splits(Files(f"{tmp_path}/bad.jsonl", invalid_utf8="replace"))
    assert text.startswith("x\ufffd")
    assert text.encode()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{not json", ["x.jsonl:2", "a line of JSON", "column 2"]),
        ('{"body": "b", "title": "t"}', ["text_field = 'text'", "x.jsonl:2", "There are: body, title"]),
        ('{"text": 3}', ["text_field", "x.jsonl:2", "not int"]),
        ('{"text": null}', ["text_field", "x.jsonl:2", "not null"]),
        ('["text"]', ["x.jsonl:2", "a JSON object, not list"]),
    ],
)
def test_faulty_json_lines(tmp_path, line, expected):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    message = fault(Files(f"{tmp_path}/x.jsonl"), tmp_path)
    assert all(part in message for part in expected), message


def test_faulty_archives_and_parquet(tmp_path):
    whole = gzip.compress(b'{"text": "fine"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cut.jsonl.gz" in fault(Files(f"{tmp_path}/cut.jsonl.gz"), tmp_path)
    (tmp_path / "not.parquet").write_bytes(b"hello")
    assert "a Parquet file" in fault(Files(f"{tmp_path}/not.parquet"), tmp_path)
    parquet.write_table(pa.table({"texts": ["a"], "other": [1]}), tmp_path / "x.parquet")
    assert "There are: texts." in fault(Files(f"{tmp_path}/x.parquet"), tmp_path)
    parquet.write_table(pa.table({"text": [1]}), tmp_path / "y.parquet")
    assert "not int" in fault(Files(f"{tmp_path}/y.parquet"), tmp_path)


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """Ten short texts in two splits, prepared by the test."""

    VERSION = tfds.core.Version("1.2.3")
    url_infos = None

    def _info(self):
        features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split):
        for i in range(10):
            yield i, {"body": f"{split} é {i}"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_reads_any_prepared_split(prepared, tmp_path):
    source = Tfds("tiny_texts", text_field="body", data_dir=prepared)
    found = read(source, "heldout", tmp_path)
    assert sorted(text for _, text in found) == sorted(f"validation é {i}" for i in range(10))
    assert found[3][0] == "tiny_texts/validation:3"
    part = Tfds("tiny_texts", train="train[:3]", text_field="body", data_dir=prepared)
    assert len(read(part, "train", tmp_path)) == 3
    assert fingerprint(part, "train", tmp_path) != fingerprint(source, "train", tmp_path)


def test_tfds_faults(prepared, tmp_path):
    unknown = fault(Tfds("tiny_text", data_dir=prepared), tmp_path)
    assert "data.sources.name = 'tiny_text'" in unknown
    assert "Near names: tiny_texts" in unknown
    assert "There are: train, validation" in fault(Tfds("tiny_texts", train="training", data_dir=prepared), tmp_path)
    assert "There are: body" in fault(Tfds("tiny_texts", data_dir=prepared), tmp_path)
    unprepared = fault(Tfds("lm1b", data_dir=prepared), tmp_path)
    assert "prepared under" in unprepared
    assert "tfds build lm1b --file_format=array_record" in unprepared


def test_a_packed_file_with_a_broken_middle(tmp_path):
    packed = bytearray(gzip.compress(b'{"text": "a"}\n' * 3))
    packed[10] = 0xFF  # the first byte behind the header: a kind of block that there is not
    (tmp_path / "x.jsonl.gz").write_bytes(packed)
    message = fault(Files(f"{tmp_path}/x.jsonl.gz"), tmp_path)
    assert "x.jsonl.gz" in message
    assert "a file that can be read" in message


@pytest.mark.parametrize("line", ["1" * 5000, "[" * 200_000])
def test_json_that_python_does_not_read(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(f'{{"text": "a"}}\n{line}\n')
    message = fault(Files(f"{tmp_path}/x.jsonl"), tmp_path)
    assert "x.jsonl:2" in message
    assert "a line of JSON" in message
