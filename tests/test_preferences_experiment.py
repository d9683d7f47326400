"""The experiment on preferences at toy size: its controls are what they are called, rude options are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import preferences, preferences_grammar, preferences_real
from experiments.preferences_grammar import BEGIN, END, KIND, LETTER, LONGEST
from experiments.preferences_table import run_table
from lmlab.data.preferences import EncodedPair
from lmlab.models.transformer import transformer
from lmlab.testing.tiny import lively, random_preferences

LM = transformer(preferences_grammar.LM_CONFIG)
PARAMS = lively(LM.init(jax.random.key(0)))


def test_a_table_ends_at_the_optimum_and_flips_lead_away_unless_the_loss_knows_them():
    found = run_table(2)
    assert min(found["before"]) > 0.1
    assert max(found["after"]["DPO"]) < 1e-4
    assert max(found["after"]["robust, 20% flips"]) < 1e-4
    assert min(found["after"]["DPO, 20% flips"]) > 0.05
    # Labels at random say nothing: the policy stays where it was.
    np.testing.assert_allclose(found["after"]["DPO, labels at random"], found["before"], atol=1e-5)


def test_rewards_by_hand():
    own, other = LETTER + 1, LETTER + 2
    answers = jnp.asarray([[own, own, other, END, END], [other, END, END, END, END]])
    found = preferences_grammar.reward(jnp.asarray([1, 1]), answers)
    np.testing.assert_allclose(found, [2 - 0.3, -0.1], rtol=1e-6)
    assert preferences_grammar.counted(answers).sum(axis=1).tolist() == [4, 2]


def test_samples_are_drawn_with_their_log_probabilities():
    """Of one prompt: how often a first letter comes is its probability."""
    kinds = jnp.zeros(4000, jnp.int32)
    answers = np.asarray(jax.jit(lambda key: preferences_grammar.sample(LM, PARAMS, kinds, key))(jax.random.key(1)))
    hidden, _ = LM.apply(PARAMS, jnp.asarray([[BEGIN, KIND]]))
    first = np.asarray(jax.nn.softmax(LM.logits(PARAMS, hidden[:, -1]))[0])
    shares = np.bincount(answers[:, 0], minlength=len(first)) / len(answers)
    assert np.abs(shares - first).max() < 0.03
    ended = np.cumsum(answers == END, axis=1) > 0
    assert (answers[ended] == END).all()
    # The log-probability of an answer is that of its tokens, one after the other.
    row = next(i for i in range(100) if 2 <= (answers[i] != END).sum() < LONGEST)
    length = int((answers[row] != END).sum()) + 1
    text = jnp.asarray([[BEGIN, KIND, *answers[row, :length]]])
    hidden, _ = LM.apply(PARAMS, text[:, :-1])
    steps = jax.nn.log_softmax(LM.logits(PARAMS, hidden))[0, 1:]
    wanted = sum(float(steps[t, answers[row, t]]) for t in range(length))
    found = preferences_grammar.logprobs(LM, PARAMS, kinds[:1], jnp.asarray(answers[row : row + 1]))
    assert float(found[0]) == pytest.approx(wanted, rel=1e-4)


def test_controls_are_what_they_are_called():
    pairs = [EncodedPair(str(i), np.asarray([i]), (np.asarray([1]), np.asarray([2])), 1.0, 0.0) for i in range(400)]
    turned = preferences_grammar.flipped(pairs, 0.2, 0)
    share = np.mean([pair.answers[0][0] == 2 for pair in turned])
    assert 0.14 < share < 0.26
    singles = preferences_grammar.singles(pairs[:3])
    assert [(int(s.prompt[0]), int(s.answers[0][0]), s.target) for s in singles[:2]] == [(0, 1, 1.0), (0, 2, 0.0)]
    batch = random_preferences()
    all_of_them = np.ones(batch.weights_BP.shape, bool)
    back = preferences_real.turn(preferences_real.turn(batch, all_of_them), all_of_them)
    np.testing.assert_array_equal(back.answers.answers_BA, batch.answers.answers_BA)
    once = preferences_real.turn(batch, all_of_them)
    np.testing.assert_array_equal(once.reference_BS[:, 0::2], batch.reference_BS[:, 1::2])
    assert (np.asarray(once.answers.answers_BA) != np.asarray(batch.answers.answers_BA)).any()


def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    few = {name: arm for name, arm in preferences_grammar.arms().items() if name in ("DPO 0.1", "KTO 0.1")}
    monkeypatch.setattr(preferences_grammar, "arms", lambda: few)
    monkeypatch.setattr(preferences_grammar, "SAMPLES", 40)
    assert preferences.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "robust, 20% flips" in told
    assert "KTO 0.1" in told
    assert (tmp_path / "out/preferences.svg").is_file()
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["grammar"]["arms"].keys() == few.keys()
    assert all(np.isfinite(arm["kl"]).all() for arm in found["grammar"]["arms"].values())


@pytest.mark.parametrize(
    "words", [["--seeds", "0"], ["--only", "all"], ["--only", "real"], ["--pairs", "nowhere"], ["--rate", "0"]], ids=str
)
def test_rude_options_are_refused(words, capsys):
    assert preferences.main(words) == 2
    assert capsys.readouterr().err.startswith("python -m experiments.preferences: ")
