"""Stages of an order are kept, and go on where they were killed."""

import errno
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from related_texts import SMALL, corpus, topics

from lmlab.core.errors import UserError
from lmlab.data import stages, vectors
from lmlab.data.in_context import order_documents
from lmlab.retrieval.config import ExactSearch


def test_stages_are_kept_and_only_what_changes_is_made_again(tmp_path):
    texts = topics()
    order_documents(SMALL, corpus(texts), tmp_path)
    made = {path.name for path in tmp_path.glob("*-*") if path.is_dir()}
    assert Counter(name.split("-")[0] for name in made) == {"vectors": 1, "neighbours": 1, "order": 1}
    never = replace(corpus(texts), text=lambda i: pytest.fail("read again"))
    again = order_documents(SMALL, never, tmp_path, seed=5, length=7)
    order_documents(replace(SMALL, tour="static"), never, tmp_path)
    now = {path.name for path in tmp_path.glob("*-*") if path.is_dir()}
    assert Counter(name.split("-")[0] for name in now - made) == {"order": 1}
    (again.folder / "order.npy").write_bytes(b"damaged")
    fixed = order_documents(SMALL, never, tmp_path)
    np.testing.assert_array_equal(fixed.documents, order_documents(SMALL, corpus(texts), tmp_path / "other").documents)


class Killed(BaseException):
    """Stands for kill -9: nothing is caught or cleaned up for it."""


def build(folder: Path, die_at: int, monkeypatch) -> int:
    """Order a corpus in blocks of 8 and die at the n-th moment; how many moments there were."""
    moments = 0

    def moment(function):
        def passing(*args, **kwargs):
            nonlocal moments
            for when in (False, True):
                moments += 1
                if moments == die_at:
                    raise Killed
                result = None if when else function(*args, **kwargs)
                kept.append(result)
            return kept[-2]

        kept = []
        return passing

    config = replace(SMALL, search=ExactSearch(queries=32, block=32))
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "_DOCUMENTS", 32)
        for module, name in ((stages, "write_atomically"), (stages, "seal"), (stages.np.memmap, "flush"), (np, "save")):
            patch.setattr(module, name, moment(getattr(module, name)))
        order_documents(config, replace(corpus(topics()), fingerprint="fixed"), folder)
    return moments


def artefacts(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_any_moment_then_gone_on_with_equals_clean(tmp_path, monkeypatch):
    whole = build(tmp_path / "clean", 0, monkeypatch)
    assert whole > 30
    for moment in range(1, whole + 1, 3):
        folder = tmp_path / str(moment)
        with pytest.raises(Killed):
            build(folder, moment, monkeypatch)
        left = build(folder, 0, monkeypatch)
        assert artefacts(folder) == artefacts(tmp_path / "clean")
        # It went on, and did not begin anew: at most one block, and its notes, are done twice.
        assert left <= whole - moment + 9


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="space"):
        order_documents(SMALL, corpus(topics(20)), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_read_error_loses_no_finished_block(tmp_path, monkeypatch):
    def faulty(path, text, write=stages.write_atomically):
        write(path, text)
        if text == "64" and "neighbours" in str(path):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(stages, "write_atomically", faulty)
    with pytest.raises(OSError, match="Input/output"):
        build(tmp_path, 0, monkeypatch)
    (left,) = tmp_path.glob("neighbours-*.partial")
    assert (left / "done.txt").read_text() == "64"


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
import lmlab.data.stages as stages
from test_order_stages import *

def note(path, text, write=stages.write_atomically):
    write(path, text)
    if text == sys.argv[2] and "neighbours" in str(path):
        os.kill(os.getpid(), 9)

stages.write_atomically = note
build(Path(sys.argv[1]), 0, pytest.MonkeyPatch())
"""


def test_a_process_that_is_killed_in_the_search_goes_on_there(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": f"{root}:{root}/tests:{root}/tests/data"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a"), "64"], env=env, stderr=subprocess.DEVNULL,
                          check=False)  # fmt: skip
    assert done.returncode == -9
    (left,) = (tmp_path / "a").glob("neighbours-*.partial")
    assert (left / "done.txt").read_text() == "64"
    build(tmp_path / "a", 0, monkeypatch)
    build(tmp_path / "clean", 0, monkeypatch)
    assert artefacts(tmp_path / "a") == artefacts(tmp_path / "clean")
