"""Python's standard library as a data set: its modules' sources and its help topics, one document each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds

from lmlab.data.catalogue import quiet, read_examples
from lmlab.data.config import PythonLibrary
from lmlab.data.files import is_heldout
from lmlab.data.folders import build_once
from lmlab.data.standard_library import library_digest, library_texts


class LocalInfo(tfds.core.DatasetInfo):
    """Information that is made here: tfds would ask its cloud bucket for it, and leave a temporary folder."""

    def initialize_from_bucket(self) -> None:
        """Ask nobody."""


class PythonLibraryBuilder(tfds.core.GeneratorBasedBuilder):
    """A tfds builder over the running Python's standard library; needs neither network nor TensorFlow."""

    name = "python_library"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    """Nothing is downloaded, and to look checksums up tfds needs a package that it does not install."""

    def __init__(self, *, heldout_percent: int = 4, **kwargs: Any) -> None:
        self._heldout_percent = heldout_percent
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"id": tfds.features.Text(), "text": tfds.features.Text()})
        return LocalInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(split) for split in ("train", "heldout")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for name, text in library_texts():
            if is_heldout(name, self._heldout_percent) == (split == "heldout"):
                yield name, {"id": name, "text": text}


def library_documents(
    source: PythonLibrary, split: Literal["train", "heldout"], cache_dir: Path
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """(id, text) of each module or topic of a split; the data set is prepared under `cache_dir` at first use.

    The split is by a hash of the document's name, so it is the same for every Python version.
    """
    target = cache_dir / f"python_library-{library_digest()[:16]}-{source.heldout_percent}"

    def prepare(folder: Path) -> None:
        with quiet():
            builder = PythonLibraryBuilder(data_dir=folder, heldout_percent=source.heldout_percent)
            builder.download_and_prepare()

    build_once(target, Path.is_dir, prepare)
    with quiet():
        builder = PythonLibraryBuilder(data_dir=target, heldout_percent=source.heldout_percent)
        examples = read_examples(builder.as_data_source(split=split))
    return ((example["id"].decode(), example["text"].decode()) for example in examples)
