"""Documents from local files: text (one document a file), JSON lines and Parquet (one document a record)."""

import difflib
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

from lmlab.core.errors import UserError
from lmlab.data.config import Files

_PARQUET_BATCH = 256


def file_documents(source: Files, split: Literal["train", "heldout"]) -> Iterator[tuple[str, str]]:
    """(id, text) of each document of a split; id is the path below the glob's fixed part, and the line.

    Where `source.heldout` names no files, a document is held out by a hash of its text, so that equal texts
    fall into the same split and a text stays where it is when the corpus grows. A single text file is cut: its
    last share, in whole lines, is held out.

    Raises:
        UserError: see `split_files`; unreadable file, bytes that are not UTF-8, a record without the text.
    """
    files = split_files(source, split)
    if len(files) == 1 and not source.heldout and _kind(files[0][1]) == "text":
        ((name, text),) = _read(*files[0], source)
        near = len(text) * (100 - source.heldout_percent) // 100
        cut = text.rfind("\n", 0, near) + 1 or near
        yield name, text[:cut] if split == "train" else text[cut:]
        return
    for name, path in files:
        for document_id, text in _read(name, path, source):
            if source.heldout or is_heldout(text, source.heldout_percent) == (split == "heldout"):
                yield document_id, text


def file_records(source: Files, split: Literal["train", "heldout"]) -> Iterator[tuple[str, object]]:
    """(file:line, value) of each line of JSON of a split; where no files are held out, a share of lines is, by hash.

    Raises:
        UserError: as `file_documents`; a file that is not lines of JSON.
    """
    key = lambda record: json.dumps(record, sort_keys=True)
    for where, record in read_records(source, split_files(source, split)):
        if source.heldout or is_heldout(key(record), source.heldout_percent) == (split == "heldout"):
            yield where, record


def read_records(source: Files, files: list[tuple[str, Path]]) -> Iterator[tuple[str, object]]:
    """(file:line, value) of each line of JSON of the files. Raises `UserError` for a file that is not lines of JSON."""
    for name, path in files:
        if _kind(path) != "lines":
            raise UserError("data.sources", str(path), "a .jsonl or .jsonl.gz file")
        with _readable(path), _open(path) as handle:
            yield from _read_json_lines(name, handle, source)


def split_files(source: Files, split: Literal["train", "heldout"]) -> list[tuple[str, Path]]:
    """(name, path) of the files of a split, sorted by name; a held-out file is never a training file.

    Raises:
        UserError: no file matches.
    """
    if split == "heldout" and source.heldout:
        return _matching(source.heldout, "heldout")
    chosen = _matching(source.train, "train")
    if source.heldout:
        heldout = {path.resolve() for _, path in _matching(source.heldout, "heldout")}
        chosen = [(name, path) for name, path in chosen if path.resolve() not in heldout]
        if not chosen:
            raise UserError(
                "data.sources.train", source.train, "files besides the held-out ones",
                f"Every match is also a match of heldout = {source.heldout!r}.",
            )  # fmt: skip
    return chosen


def is_heldout(key: str, percent: int) -> bool:
    """Whether a hash of `key` falls into the held-out share; the same on every machine and Python version."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < percent


def _matching(pattern: str, field: str) -> list[tuple[str, Path]]:
    expanded = Path(pattern).expanduser()
    paths = sorted(Path(match) for match in glob.glob(str(expanded), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        remedy = f"The current folder is {Path.cwd()}. ** matches folders; quote the glob in a shell."
        raise UserError(f"data.sources.{field}", pattern, "a glob that matches at least one file", remedy)
    root = expanded.parent
    while glob.has_magic(str(root)):
        root = root.parent
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def _kind(path: Path) -> Literal["parquet", "lines", "text"]:
    """How a file is read, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    if last in (".parquet", ".pq"):
        return "parquet"
    return "lines" if last in (".jsonl", ".ndjson") else "text"


def _read(name: str, path: Path, source: Files) -> Iterator[tuple[str, str]]:
    kind = _kind(path)
    with _readable(path):
        if kind == "parquet":
            yield from _read_parquet(name, path, source)
        elif kind == "lines":
            with _open(path) as handle:
                for where, record in _read_json_lines(name, handle, source):
                    yield where, _text_of(record, where, source)
        else:
            with _open(path) as handle:
                yield name, _decode(handle.read(), name, 0, source)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("data.sources", str(path), f"a file that can be read ({error})") from error


def _read_json_lines(name: str, handle: Iterable[bytes], source: Files) -> Iterator[tuple[str, object]]:
    offset = 0
    for number, line in enumerate(handle, start=1):
        if line.strip():
            where = f"{name}:{number}"
            yield where, _parse(_decode(line, where, offset, source), where)
        offset += len(line)


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        expected = f"a line of JSON ({error.msg} at column {error.colno})"
        raise UserError("data.sources", where, expected) from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits; brackets in brackets without end.
        raise UserError("data.sources", where, f"a line of JSON ({error})") from error


def _text_of(record: object, where: str, source: Files) -> str:
    """The text field of a JSON record; an escaped half of a surrogate pair counts as invalid UTF-8."""
    if not isinstance(record, dict):
        raise UserError("data.sources", where, f"a JSON object, not {type(record).__name__}")
    text = _field(record.get(source.text_field), list(record), where, source)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if source.invalid_utf8 == "error":
            expected = f"text that UTF-8 can hold (lone surrogate at character {error.start} of the field)"
            raise UserError("data.sources", where, expected, _UTF8_REMEDY) from error
        text = text.encode(errors="surrogatepass").decode(errors="replace")
    return text


def _field(value: object, fields: list[str], where: str, source: Files) -> str:
    wanted = source.text_field
    if isinstance(value, str):
        return value
    if wanted in fields:
        found = "null" if value is None else type(value).__name__
        raise UserError("data.sources.text_field", wanted, f"a field with text in {where}, not {found}")
    raise UserError(
        "data.sources.text_field", wanted, f"a field of {where}", f"There are: {', '.join(fields) or 'none'}."
    )


def _read_parquet(name: str, path: Path, source: Files) -> Iterator[tuple[str, str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError("data.sources", str(path), f"a Parquet file ({error})") from error
    with table:
        columns = table.schema_arrow.names
        if source.text_field not in columns:
            near = difflib.get_close_matches(source.text_field, columns, n=3) or columns[:20]
            remedy = f"There are: {', '.join(near)}."
            raise UserError("data.sources.text_field", source.text_field, f"a column of {path}", remedy)
        number = 0
        for batch in table.iter_batches(_PARQUET_BATCH, columns=[source.text_field]):
            for value in batch.column(0).to_pylist():
                number += 1
                where = f"{name}:{number}"
                yield where, _field(value, [source.text_field], where, source)


_UTF8_REMEDY = 'Convert the file to UTF-8, or set invalid_utf8 to "replace".'


def _decode(data: bytes, where: str, offset: int, source: Files) -> str:
    try:
        return data.decode(errors="strict" if source.invalid_utf8 == "error" else "replace")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        expected = f"UTF-8 (byte 0x{byte:02x} at byte offset {offset + error.start} of the file)"
        raise UserError("data.sources", where, expected, _UTF8_REMEDY) from error
