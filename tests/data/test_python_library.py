"""The embedded corpus: split fixed by name, prepared by tfds without TensorFlow, quiet, and large enough."""

import subprocess
import sys

import pytest

from lmlab.data.config import PythonLibrary
from lmlab.data.files import is_heldout
from lmlab.data.sources import documents, fingerprint
from lmlab.data.standard_library import library_texts


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    return {
        split: dict((d.id, d.text) for d in documents(PythonLibrary(), split, folder)) for split in ("train", "heldout")
    }


def test_splits_are_disjoint_and_hold_every_document(splits):
    train, heldout = splits["train"], splits["heldout"]
    assert not set(train) & set(heldout)
    assert train | heldout == dict(library_texts())


def test_split_depends_on_the_name_alone():
    # Read off once: these modules are there in every Python version, and so is their side.
    assert [is_heldout(name, 4) for name in ("hmac.py", "json/__init__.py", "topics/import")] == [True] * 3
    assert [is_heldout(name, 4) for name in ("os.py", "typing.py", "topics/with")] == [False] * 3


def test_size_and_kinds_of_documents(splits):
    total = sum(len(text) for texts in splits.values() for text in texts.values())
    heldout = sum(len(text) for text in splits["heldout"].values())
    assert 5e6 < total < 20e6
    assert 0.01 < heldout / total < 0.12
    names = [*splits["train"], *splits["heldout"]]
    assert sum(name.startswith("topics/") for name in names) > 50
    assert not [name for name in names if "site-packages" in name or "/test/" in name or "topics.py" in name]
    assert {"os.py", "asyncio/base_events.py", "email/message.py"} <= set(names)


def test_share_is_part_of_the_fingerprint(tmp_path):
    prints = {fingerprint(PythonLibrary(p), split, tmp_path) for p in (4, 9) for split in ("train", "heldout")}
    assert len(prints) == 4


def test_preparing_prints_nothing_and_needs_no_tensorflow(tmp_path):
    code = (
        "import sys; from pathlib import Path; from lmlab.data.config import PythonLibrary;"
        "from lmlab.data.sources import documents;"
        "n = sum(1 for _ in documents(PythonLibrary(), 'heldout', Path(sys.argv[1])));"
        "assert n > 10 and 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
