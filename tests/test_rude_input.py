"""Rubbish for input, two runs in one folder, full disks: one line each, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import RECIPE, RUN, contents, one_line

import lmlab.pretrain
from benchmarks import crash
from lmlab.cli import main
from lmlab.train.folder import open_run


@dataclass(frozen=True)
class Rude:
    """Bad input: how it comes about, the words of the command, and what the one line has to say."""

    name: str
    said: tuple[str, ...]
    words: tuple[str, ...] = tuple(RUN)
    corpus: bytes | None = None
    """What stands in the corpus; None: as it was."""
    fresh: bool = True
    """Whether the run folder is empty at the start."""


RUDE = [
    Rude("no such recipe", ("recipe", "absent.py", "Python file"), ("run", "absent.py")),
    Rude("missing file", ("data.sources.text.train", "nowhere*.jsonl"), corpus=b"", words=(*RUN, "-")),
    Rude("empty corpus", ("document", "text"), corpus=b""),
    Rude("only empty texts", ("document", "text"), corpus=b'{"text": ""}\n'),
    Rude("invalid UTF-8", ("UTF-8", "corpus.jsonl"), corpus=b'{"text": "a"}\n{"text": "\xff\xfe"}\n'),
    Rude("no JSON", ("corpus.jsonl", "2"), corpus=b'{"text": "a"}\nnot json\n'),
    Rude("no such field", ("corpus.jsonl", "text", "body"), corpus=b'{"text": "a"}\n{"body": "b"}\n'),
    Rude("field of another type", ("corpus.jsonl", "text"), corpus=b'{"text": "a"}\n{"text": 3}\n'),
    Rude("row longer than positions", ("data.length", "max_length = 32"), (*RUN, "--data.length", "33")),
    Rude("heads that do not divide the width", ("heads", "16"), (*RUN, "--model.attention.heads", "3")),
    Rude("token ids beyond the vocabulary", ("vocab_size = 99", "257"), (*RUN, "--model.vocab-size", "99")),
    Rude("microbatches", ("microbatches", "batch_size = 4"), (*RUN, "--train.microbatches", "3")),
    Rude("another model in the folder", ("model.width was 16, now 32",), (*RUN, "--model.width", "32"), fresh=False),
    Rude("steps to profile that the run lacks", ("profile = '5:7'", "LAST <= 6"), (*RUN, "--profile", "5:7")),
    Rude("steps to profile backwards", ("profile = '3:2'", "FIRST:LAST"), (*RUN, "--profile", "3:2")),
    Rude("no run there", ("run folder", "config.json"), ("eval", "nowhere")),
    Rude("no run to report", ("run folder", "config.json"), ("report", "nowhere")),
    Rude("prompt of no text", ("--prompt", "UTF-8"), ("generate", "out", "--prompt", "\udcff"), fresh=False),
    Rude("negative temperature", ("temperature", "-1"), ("generate", "out", "--temperature", "-1"), fresh=False),
    Rude("a bucket that is not mounted", ("--out", "gs://"), ("run", "tiny.py", "--out", "gs://bucket/run")),
    Rude("rows that the mesh cannot share", ("batch_size = 4", "= 8"), (*RUN, "--parallel.data", "8")),
    Rude("more devices than there are", ("at most 8 devices",), (*RUN, "--parallel.tensor", "16")),
    Rude("profile", ("10",), (*RUN, "--profile", "10")),
    Rude("run folder below a file", ("run folder", "written"), ("run", "tiny.py", "--out", "tiny.py/out")),
    Rude("run folder that nobody can write", ("run folder", "written"), ("run", "tiny.py", "--out", "/proc/lmlab")),
]


@pytest.mark.parametrize("case", RUDE, ids=lambda case: case.name)
def test_rude_input_gets_one_line_and_loses_nothing(case, place, capsys):
    if case.fresh:
        shutil.rmtree(place / "out")
    if case.corpus is not None:
        (place / "corpus.jsonl").write_bytes(case.corpus)
    if case.name == "missing file":
        (place / "tiny.py").write_text(RECIPE.replace("corpus.jsonl", "nowhere*.jsonl"))
    before = contents(place / "out")
    assert main([word for word in case.words if word != "-"]) == 2
    line = one_line(capsys)
    assert [part for part in case.said if part not in line] == []
    assert contents(place / "out") == before


def test_a_checkpoint_of_another_model(place, capsys):
    config = place / "out/config.json"
    config.write_text(config.read_text().replace('"width": 16', '"width": 32'))
    before = contents(place / "out/checkpoints")
    assert main(["generate", "out"]) == 2
    assert "another model" in one_line(capsys)
    assert contents(place / "out/checkpoints") == before


def test_two_runs_in_one_folder(place, capsys):
    with open_run(place / "out"):
        assert main(RUN) == 2
    assert f"Process {os.getpid()}" in one_line(capsys)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(place):
    """A limit on the size of files stands for the disk: the write of the arrays fails in the middle."""
    shutil.rmtree(place / "out")
    command = f"ulimit -f 20; exec {sys.executable} -m lmlab.cli {' '.join(RUN)}"
    path = str(Path(lmlab.pretrain.__file__).parents[1])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "make room" in done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith(("lmlab: ", "tokenising "))] == []
    assert main(RUN) == 0


def test_a_disk_without_room_for_a_checkpoint(place, capsys, monkeypatch):
    shutil.rmtree(place / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(RUN) == 2
    line = one_line(capsys)
    assert "1,000 are free" in line
    assert "make room" in line


def test_the_crash_benchmark_sees_what_differs(place, monkeypatch):
    monkeypatch.setattr(crash, "STEPS", 6)
    lab = crash.Lab(place)
    shutil.copytree(place / "out", place / "two")
    assert crash.differences(lab, "out", "two") == []
    metrics = place / "two/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 5', '"loss": 6', 1))
    assert crash.differences(lab, "out", "two") == ["metrics.jsonl"]
    for damage in (crash.truncate, crash.corrupt, crash.strip):
        before = contents(place / "two/checkpoints")
        damage(place / "two/checkpoints/6")
        assert contents(place / "two/checkpoints") != before
