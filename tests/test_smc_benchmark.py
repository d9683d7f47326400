"""The benchmark of SMC steering at toy size: it writes the model, runs ours, and ends in JSON."""

import json

import pytest

from benchmarks import peers, smc
from lmlab.core.errors import UserError
from lmlab.loading import load_model

TOY = {"N_LAYERS": 1, "WIDTH": 32, "N_HEADS": 2, "HEAD_SIZE": 16, "FFN": 48}


@pytest.fixture
def toy(monkeypatch):
    for name, size in TOY.items():
        monkeypatch.setattr(peers, name, size)
    monkeypatch.setattr(smc, "VOCAB", 300)
    monkeypatch.setattr(smc, "NEW", 4)


@pytest.mark.usefixtures("toy")
def test_our_arm_runs_and_tells_what_resampling_takes():
    reply = smc.work("lmlab", "", 0)
    for line in ("standard 4", "steer 4"):
        seconds, megabytes = reply(line)
        assert 0 < seconds < 60
        assert megabytes > 10
    share, kept = reply("resampling")
    assert 0 < share < 1
    assert 0.005 < kept < 0.05


@pytest.mark.usefixtures("toy")
def test_the_model_is_written_for_both(tmp_path):
    smc.write_model(tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.lm.vocab_size == model.text.tokenizer.vocab_size == smc.VOCAB
    prompt, allowed_V = smc.draw_case(0)
    assert len(prompt) == smc.PROMPT
    assert not allowed_V[model.text.tokenizer.end_id]


def test_the_report_ends_in_ratios(capsys):
    case = lambda ours, theirs, peak: {"lmlab": [[s, peak] for s in ours], "llamppl": [[s, 2 * peak] for s in theirs]}
    found = {("standard", 16): case([1.0, 2.0], [20.0, 20.0], 100), ("standard", 64): case([2.0], [80.0], 148)}
    smc.report(found, [0.03, 1.5])
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == {"ratio_16": 15.0, "ratio_64": 40.0, "resample_fraction": 0.03}
    assert "lmlab: 1.00 MB a particle" in out
    assert "llamppl: 2.00 MB a particle" in out


def test_rude_options_and_a_missing_peer(monkeypatch, capsys):
    assert smc.main(["--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match="torch"):
        smc.work("llamppl", "", 0)
