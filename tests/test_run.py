"""The whole program on a tiny corpus: train, interrupt, go on, sample, evaluate, report; and rubbish for input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import pytest

import lmlab.pretrain
from benchmarks import crash
from lmlab.cli import main
from lmlab.runs import load_run
from lmlab.train.folder import open_run
from lmlab.train.retrace import RetraceError

RECIPE = """
from lmlab.data.config import DataConfig, Files
from lmlab.inference.config import SamplingConfig
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.recipe import EvalConfig, Pretrain
from lmlab.train.config import ParallelConfig, TrainConfig

def recipe():
    return Pretrain(
        model=TransformerConfig(layers=2, width=16, max_length=32, attention=AttentionConfig(heads=2)),
        data=DataConfig(sources={"text": Files("corpus.jsonl", heldout_percent=20)}, length=16, batch_size=4),
        train=TrainConfig(steps=6, log_every=1, eval_every=3, sample_every=2, checkpoint_every=2),
        parallel=ParallelConfig(data=1),
        eval=EvalConfig(batches=1, prompts=("ab",), sampling=SamplingConfig(max_new_tokens=4)),
    )
"""
RUN = ["run", "tiny.py", "--out", "out"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with the recipe, its corpus, and in "out" a run that nobody touched."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.py").write_text(RECIPE)
    lines = [json.dumps({"text": f"abc {i} " * (i % 5 + 2)}) for i in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(RUN) == 0
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch) -> Path:
    """A copy of `finished` to work in."""
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def rows(run: Path, *kinds: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] in kinds]


def test_the_run_folder_holds_what_was_promised(finished):
    run = finished / "out"
    assert {row["step"] for row in rows(run, "train")} == set(range(1, 7))
    assert [row["step"] for row in rows(run, "eval")] == [3, 6]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 4, 6]
    assert json.loads((run / "config.json").read_text())["model"]["vocab_size"] == 257
    scores = json.loads((run / "baselines.json").read_text())
    assert {"model", "xz"} < scores.keys()
    assert all(0 < value < 30 for value in scores.values())
    assert list(run.glob("events.*")) or list(run.glob("*/events.*"))
    assert list(run.glob("plots/*.png")) or list(run.glob("*.png"))
    assert "<html" in (run / "report.html").read_text()
    assert not list(run.rglob("*.partial"))


def test_interrupted_and_run_again_is_the_run_that_nobody_touched(place, finished, monkeypatch, capsys):
    shutil.rmtree(place / "out")
    draw = lmlab.pretrain.draw_samples

    def draw_then_stop(*args):
        draw(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lmlab.pretrain, "draw_samples", draw_then_stop)
        assert main(RUN) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().out
    assert main(RUN) == 0
    assert "resuming at step 3" in capsys.readouterr().out
    for kind in ("train", "eval"):
        assert rows(place / "out", kind) == rows(finished / "out", kind)
    assert (place / "out/samples.jsonl").read_text() == (finished / "out/samples.jsonl").read_text()
    one, other = load_run(place / "out"), load_run(finished / "out")
    assert one.step == other.step == 6
    chex.assert_trees_all_equal(one.params, other.params)


@pytest.mark.parametrize("parameters", ["bfloat16_master", "bfloat16_stochastic"])
def test_bfloat16_parameters_train_and_go_on_bit_for_bit(parameters, place, monkeypatch):
    words = ["run", "tiny.py", "--optim.parameters", parameters, "--eval.no-baselines", "--out"]
    stops = iter([False, False, False, True, False, False])  # three samples of the whole run, then of the parts
    stop = lambda *_: signal.raise_signal(signal.SIGTERM) if next(stops) else None
    monkeypatch.setattr(lmlab.pretrain, "draw_samples", stop)
    assert main([*words, "whole"]) == 0
    assert main([*words, "parts"]) == 128 + signal.SIGTERM
    assert main([*words, "parts"]) == 0
    assert rows(place / "parts", "train", "eval") == rows(place / "whole", "train", "eval")
    losses = [row["loss"] for row in rows(place / "whole", "train")]
    assert losses[-1] < losses[0]
    one, other = load_run(place / "whole"), load_run(place / "parts")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(one.params)} == {"bfloat16"}
    chex.assert_trees_all_equal(one.params, other.params)


def test_a_finished_run_run_again_changes_nothing_that_was_measured(place, finished):
    assert main(RUN) == 0
    for name in ("metrics.jsonl", "samples.jsonl", "config.json", "baselines.json"):
        assert (place / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()


def test_a_profiled_run_computes_the_same_and_leaves_a_trace_and_a_table(place, finished, capsys):
    shutil.rmtree(place / "out")
    assert main([*RUN, "--profile", "3:3"]) == 0
    table = (place / "out/profile/operations.txt").read_text()
    assert table in capsys.readouterr().out
    assert "steps 3 to 3\n" in table
    assert " dot" in table
    # The sample before step 3 and the evaluation after it are not in it.
    assert {line.split()[-1] for line in table.splitlines() if "jit_" in line} == {"jit_step"}
    assert list((place / "out/profile").rglob("*.trace.json.gz"))
    assert "jit_step" in (place / "out/report.html").read_text()
    for name in ("config.json", "samples.jsonl", "baselines.json"):
        assert (place / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()
    assert rows(place / "out", "train", "eval") == rows(finished / "out", "train", "eval")

    before = contents(place / "out/profile")
    assert main([*RUN, "--profile", "3:3"]) == 0
    assert "nothing is profiled: the run has already made steps 3 to 3" in capsys.readouterr().out
    assert contents(place / "out/profile") == before


def test_a_batch_of_another_shape_is_an_error(place, monkeypatch):
    shutil.rmtree(place / "out")
    fit = lmlab.pretrain.fit

    def with_a_short_batch(state, step, batches, *others):
        def shorter(first):
            yield next(rest := batches(first))
            yield jax.tree.map(lambda x: x[:3], next(rest))

        return fit(state, step, shorter, *others)

    monkeypatch.setattr(lmlab.pretrain, "fit", with_a_short_batch)
    with pytest.raises(RetraceError, match=r"batch\.tokens_BT: int32\[4,17\] -> int32\[3,17\]"):
        main(RUN)


def test_generate_eval_report_and_doctor(place, capsys):
    words = ["generate", "out", "--prompt", "abc", "ab", "--seed", "1", "--max-new-tokens", "3"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("abc")
    assert "\nab" in first
    assert main(words) == 0
    assert capsys.readouterr().out == first

    assert main(["eval", "out"]) == 0
    out = capsys.readouterr().out
    held_out = rows(place / "out", "eval")[-1]
    assert f"{json.loads((place / 'out/baselines.json').read_text())['model']:.4f}" in out
    assert "trigram" in out
    assert held_out["step"] == 6

    (place / "out/report.html").unlink()
    assert main(["report", "out"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main(["doctor"]) == 0
    assert "float32 matmul" in capsys.readouterr().out


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
    Rude("no run there", ("run folder", "config.json"), ("generate", "nowhere")),
    Rude("no run to report", ("run folder", "config.json"), ("report", "nowhere")),
    Rude("negative temperature", ("temperature", "-1"), ("generate", "out", "--temperature", "-1"), fresh=False),
    Rude("run folder below a file", ("run folder", "written"), ("run", "tiny.py", "--out", "tiny.py/out")),
    Rude("run folder that nobody can write", ("run folder", "written"), ("run", "tiny.py", "--out", "/proc/lmlab")),
]


def one_line(capsys) -> str:
    """What was said on standard error: one message, no traceback."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("lmlab: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


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
