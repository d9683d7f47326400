"""The whole program on a tiny corpus: train, interrupt, go on, sample, evaluate, report; and rubbish for input."""

import json
import shutil
import signal
from pathlib import Path

import chex
import jax
import pytest
from tiny_run import RUN, contents, rows

import lmlab.training
from lmlab.cli import main
from lmlab.runs import load_run
from lmlab.train.retrace import RetraceError


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
    draw = lmlab.training.draw_samples

    def draw_then_stop(*args):
        draw(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lmlab.training, "draw_samples", draw_then_stop)
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
    monkeypatch.setattr(lmlab.training, "draw_samples", stop)
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
    fit = lmlab.training.fit

    def with_a_short_batch(state, step, batches, *others):
        def shorter(first):
            yield next(rest := batches(first))
            yield jax.tree.map(lambda x: x[:3], next(rest))

        return fit(state, step, shorter, *others)

    monkeypatch.setattr(lmlab.training, "fit", with_a_short_batch)
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
