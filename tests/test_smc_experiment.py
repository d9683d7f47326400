"""The experiment of SMC steering at toy size; its measures by hand; rude options are refused."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import smc_arms, smc_bytes, smc_prompts, smc_words
from experiments import smc_steering as experiment
from experiments.smc_answers import over_seeds, prompts_table
from experiments.smc_bytes import short_words
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.inference.programs import Particle
from lmlab.interop.pretrained import Pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.testing.tiny import lively, tiny_lm

LM = tiny_lm(vocab_size=257, max_length=96)
PARAMS = lively(LM.init(jax.random.key(0)))


def some_runs(weights, **changes):
    weights = np.asarray(weights, np.float32)
    found = {"log_prob_RN": np.zeros_like(weights), "tokens_RNT": np.full((*weights.shape, 6), ord("a")),
             "fits_RN": weights > -np.inf, "ancestors_R": np.ones(len(weights))} | changes  # fmt: skip
    return smc_arms.Runs(weights, **found)


def test_letters_are_counted_and_words_of_five_are_none():
    table = np.asarray(smc_bytes.letters_after())
    state = 0
    for byte, after in zip(b"ab'cdef,", (1, 2, 0, 1, 2, 3, 4, 0), strict=True):
        state = table[state, byte]
        assert state == after
    assert table[4, ord("Z")] == -1
    assert table[3, ord("_")] == table[4, smc_bytes.END] == 0


def test_proposals_differ_in_how_they_meet_the_constraint():
    logprobs = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(0), (257,)))
    state = short_words("free").start | {"letters": jnp.int32(4)}
    letter = np.asarray([token < 128 and chr(token).isalpha() for token in range(257)])
    mass = float(jnp.log(jnp.exp(logprobs)[~letter].sum()))
    seen = set()
    for seed in range(8):
        found = {}
        for name in smc_bytes.PROPOSALS:
            program = short_words(name)
            particle = Particle(jax.random.key(seed), logprobs[None], program.tables, jnp.int32(0))
            after = program.step(particle, state)
            token = int(particle.context.token)
            assert bool(after["fits"]) == (not letter[token])
            assert after["log_prob"] == logprobs[token]
            found[name] = token, float(particle.log_weight), bool(after["fits"])
        assert found["free"][::2] == found["plain"][::2]
        assert found["free"][1] == 0
        assert found["plain"][1] == (0 if found["plain"][2] else -math.inf)
        assert found["optimal"][1] == pytest.approx(mass, abs=1e-5)
        assert found["optimal"][2]
        seen.add(found["free"][2])
    assert seen == {True, False}


def test_evidence_and_quality_by_hand():
    exact = smc_words.Exact(
        100, np.full(25, -3.0), {"first byte": np.full(25, ord("a")), "first letters": np.full(25, 2)}
    )
    assert exact.log_evidence == pytest.approx(math.log(0.25))
    assert exact.error == pytest.approx(math.sqrt(0.75 / 25))
    runs = some_runs(
        [[math.log(0.25)] * 2, [-math.inf] * 2, [0, -math.inf]], log_prob_RN=np.asarray([[-2, -4], [9, 9], [-1, 9]])
    )
    found = smc_words.evidence([runs], [exact])
    assert found["log_gap"] is None
    assert found["log_gap_alive"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert found["dead"] == pytest.approx(1 / 3)
    assert found["ratio"] == pytest.approx((1 + 0 + 2) / 3)
    found = smc_words.quality([runs], [exact])
    assert found["log_prob_gap"] == pytest.approx((-3 - 1) / 2 + 3)
    # All first bytes are the right one, and all words begin with the most letters that are counted, five.
    assert found["far"] == pytest.approx({"first byte": 0, "first letters": 1})
    assert smc_words.quality([some_runs([[-math.inf]])], [exact])["log_prob_gap"] is None


def test_ancestors_are_traced_to_the_first_round():
    weights = np.asarray([0.0, 0, 0, -np.inf])
    history = smc_arms.History(
        *[None] * 2, np.asarray([[3, 2, 1, 0], [0, 0, 2, 3], [1, 2, 0, 3], [9, 9, 9, 9]]), *[None] * 3
    )
    # Round 3 was not made. Those alive descend from 0, 2 and 0.
    assert smc_arms._ancestors(history, 3, weights > -np.inf) == 2


def test_values_are_of_answers_that_have_them():
    rows = [[{"x": 1.0}, {"x": None}], [{"x": 3.0}, {"x": 5.0}]]
    mean, spread = over_seeds(rows, lambda one: one["x"])
    assert (mean, spread) == (pytest.approx(3), pytest.approx(math.sqrt(4.5)))
    assert over_seeds(rows, lambda one: None) == (None, 0.0)


def test_the_part_on_a_small_model_runs_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    """Training is that of any run, and is not tried here."""
    monkeypatch.setattr(smc_words, "byte_model", lambda folder, steps: (LM, PARAMS))
    assert experiment.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())["words"]
    assert set(result["arms"]) == {*experiment.SMOKE, smc_words.MASKED}
    assert result["arms"]["importance, optimal"]["2"]["dead"] == 0
    assert (tmp_path / "smc_steering.svg").read_text().startswith("<?xml")
    shown = capsys.readouterr().out
    assert all(arm in shown for arm in result["arms"])
    assert "no model was named" in shown


def test_the_part_on_a_trained_model_keeps_to_its_constraint(tmp_path, capsys, monkeypatch):
    model = Pretrained(LM.config, LM, PARAMS, TokenizerFiles(byte_tokenizer(), None, None))
    monkeypatch.setattr(smc_prompts, "load_model", lambda path: model)
    assert experiment.main(["--smoke", "--out", str(tmp_path), "--only", "prompts", "--model", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["prompts"]
    assert list(found) == ["words of at most 5 letters"]
    for arm, rows in found["words of at most 5 letters"].items():
        for answer in (one for row in rows for one in row if arm != "unconstrained, best"):
            assert re.fullmatch(r"( [A-Za-z']{1,5},?){4,}\.", answer["text"])
            assert answer["tokens"] == len(answer["text"]) <= 32
    # A model that knows nothing writes no such sentence by chance.
    assert all(one["tokens"] == 0 for one in found["words of at most 5 letters"]["unconstrained, best"][0])
    assert prompts_table(found) in capsys.readouterr().out
    assert (tmp_path / "smc_prompts.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "prompts"], "--model"),
        (["--model", "absent"], "--model"),
        (["--seeds", "1"], "--seeds"),
        (["--particles", "0"], "--particles"),
        (["--prompts", "9"], "--prompts"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_rude_input_gets_one_line(words, said, capsys):
    assert experiment.main(words) == 2
    assert said in capsys.readouterr().err
