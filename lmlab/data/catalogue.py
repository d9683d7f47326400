"""Documents of a tensorflow-datasets data set, read at random from array_record files without TensorFlow."""

import contextlib
import difflib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import tensorflow_datasets as tfds

from lmlab.core.errors import UserError
from lmlab.data.config import Tfds

READ_AHEAD = 64


def catalogue_documents(source: Tfds, split: Literal["train", "heldout"]) -> Iterator[tuple[str, str]]:
    """(id, text) of each example of a split; id is "name/split:number".

    Raises:
        UserError: unknown name, config, split or feature; not prepared in a format with random access.
    """
    expression = getattr(source, split)
    for number, example in enumerate(read_examples(_open(source, split))):
        if source.text_field not in example:
            remedy = f"There are: {', '.join(example)}."
            expected = f"a feature of {source.name}"
            raise UserError("data.sources.text_field", source.text_field, expected, remedy)
        value = example[source.text_field]
        where = f"{source.name}/{expression}:{number}"
        if not isinstance(value, bytes | str):
            raise UserError(
                "data.sources.text_field", source.text_field, f"text in {where}, not {type(value).__name__}"
            )
        yield where, value if isinstance(value, str) else value.decode(errors="replace")


def catalogue_version(source: Tfds, split: Literal["train", "heldout"]) -> list[object]:
    """What identifies the text of a split: full name with version, split expression, number of examples.

    Raises:
        UserError: as `catalogue_documents`.
    """
    return [_builder(source).info.full_name, getattr(source, split), len(_open(source, split))]


def read_examples(data: Any) -> Iterator[dict[str, Any]]:
    """The examples of a tfds data source in order; fetched by the dozen, which array_record does faster."""
    for start in range(0, len(data), READ_AHEAD):
        yield from data.__getitems__(range(start, min(start + READ_AHEAD, len(data))))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tfds from drawing progress bars, printing, and logging what it reports by exception anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)


def _builder(source: Tfds) -> tfds.core.DatasetBuilder:
    try:
        with quiet():
            return tfds.builder(source.name, **({"data_dir": source.data_dir} if source.data_dir else {}))
    except tfds.core.DatasetNotFoundError as error:
        names = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(source.name.split("/")[0], names, n=3)
        remedy = f"Near names: {', '.join(near)}." if near else "tfds.list_builders() lists them."
        raise UserError("data.sources.name", source.name, "a tensorflow-datasets name", remedy) from error
    except ValueError as error:
        expected = f"a data set and config that exist ({error})"
        raise UserError("data.sources.name", source.name, expected) from error


def _open(source: Tfds, split: Literal["train", "heldout"]) -> Sequence[Any]:
    builder = _builder(source)
    expression = getattr(source, split)
    if not builder.info.splits:
        raise UserError(
            "data.sources.name", source.name, f"a data set that is prepared under {builder.data_path}",
            _HOW_TO_PREPARE.format(name=source.name),
        )  # fmt: skip
    try:
        with quiet():
            return builder.as_data_source(split=expression)
    except NotImplementedError as error:
        raise UserError(
            "data.sources.name", source.name,
            f"array_record files, which can be read at random; {builder.data_path} holds another format",
            _HOW_TO_PREPARE.format(name=source.name),
        ) from error  # fmt: skip
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise UserError(
            f"data.sources.{split}", expression, f"a split of {source.name}", f"There are: {splits}."
        ) from error


_HOW_TO_PREPARE = (
    "Prepare it once, where TensorFlow is installed if the data set asks for it: "
    "tfds build {name} --file_format=array_record. Then name that folder in data_dir."
)
