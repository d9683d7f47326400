"""The benchmark of the train step at toy size: its arms train, from the same loss, and its last line is JSON."""

import io
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import peers, train_step

TOY = {"N_LAYERS": 1, "WIDTH": 32, "N_HEADS": 2, "HEAD_SIZE": 16, "FFN": 48, "VOCAB": 64, "BATCH": 2, "SEQ_LEN": 8}


@pytest.mark.parametrize("arm", ["lmlab", "nanodo_shape", "plain_jax"])
def test_an_arm_learns(arm, monkeypatch):
    for name, size in TOY.items():
        monkeypatch.setattr(peers, name, size)
    monkeypatch.setattr(peers, "LEARNING_RATE", 0.01)
    tokens_BT = np.random.default_rng(0).integers(0, peers.VOCAB, (peers.BATCH, peers.SEQ_LEN + 1)).astype(np.int32)
    with jax.numpy_rank_promotion("allow"):  # the peers are as their authors write
        step = train_step.make_step(arm, 0)
        losses = [step(tokens_BT) for _ in range(8)]
    assert losses[0] == pytest.approx(math.log(peers.VOCAB), rel=0.25)
    assert losses[-1] < losses[0] - 0.2


def test_the_report_ends_in_tokens_per_second(capsys):
    train_step.report({"lmlab": [1.0, 2.0, 1.5], "plain_jax": [3.0, 4.0, 3.5]}, load=0.5)
    out = capsys.readouterr().out
    tokens = peers.BATCH * peers.SEQ_LEN
    assert json.loads(out.splitlines()[-1]) == {"lmlab": round(tokens / 1.5), "plain_jax": round(tokens / 3.5)}
    assert "0.43x" in out


def test_an_arm_that_dies_is_named(capsys, monkeypatch):
    dead = SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO(), kill=lambda: None)
    monkeypatch.setattr(train_step, "start", lambda arm, seed: train_step.Worker(arm, dead))
    assert train_step.main(["--arms", "lmlab"]) == 2
    assert "'lmlab'" in capsys.readouterr().err
