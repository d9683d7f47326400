"""The experiment on preferences at toy size: its controls are what they are called, rude options are refused."""

import json
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import preferences, preferences_grammar, preferences_language, preferences_measure, preferences_real
from experiments.preferences_language import BEGIN, END, KIND, LETTER, LONGEST
from experiments.preferences_table import run_table
from lmlab.data.answers import lay_out_pairs, preferences_of
from lmlab.data.preferences import EncodedPair
from lmlab.models.transformer import transformer
from lmlab.objectives.dpo import dpo
from lmlab.objectives.pair_losses import sigmoid
from lmlab.reference import with_reference
from lmlab.testing.tiny import lively, random_pairs, random_preferences

LM = transformer(preferences_language.LM_CONFIG)
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
    found = preferences_language.reward(jnp.asarray([1, 1]), answers)
    np.testing.assert_allclose(found, [2 - 0.3, -0.1], rtol=1e-6)
    assert preferences_language.counted(answers).sum(axis=1).tolist() == [4, 2]


def test_samples_are_drawn_with_their_log_probabilities():
    """Of one prompt: how often a first letter comes is its probability."""
    kinds = jnp.zeros(4000, jnp.int32)
    answers = np.asarray(jax.jit(lambda key: preferences_language.sample(LM, PARAMS, kinds, key))(jax.random.key(1)))
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
    found = preferences_language.logprobs(LM, PARAMS, kinds[:1], jnp.asarray(answers[row : row + 1]))
    assert float(found[0]) == pytest.approx(wanted, rel=1e-4)


def test_controls_are_what_they_are_called():
    pairs = [EncodedPair(str(i), np.asarray([i]), (np.asarray([1]), np.asarray([2])), 1.0, 0.0) for i in range(400)]
    turned = preferences_grammar.flipped(pairs, 0.2, 0)
    share = np.mean([pair.answers[0][0] == 2 for pair in turned])
    assert 0.14 < share < 0.26
    # Of two kinds of prompts, so that a neighbour is of the same kind as often as not.
    kinds = [replace(pair, prompt=np.asarray([i % 2]), answers=(np.asarray([i % 2]),) * 2) for i, pair in
             enumerate(pairs[:40])]  # fmt: skip
    singles = preferences_grammar.singles(kinds, 0)
    assert [single.target for single in singles[:4]] == [1.0, 0.0, 1.0, 0.0]
    assert all(single.answers[1][0] != single.prompt[0] == single.answers[0][0] for single in singles)
    batch = random_preferences()
    all_of_them = np.ones(batch.weights_BP.shape, bool)
    back = preferences_real.turn(preferences_real.turn(batch, all_of_them), all_of_them)
    np.testing.assert_array_equal(back.answers.answers_BA, batch.answers.answers_BA)
    # What is learnt from it is what pairs teach whose answers change places.
    made = random_pairs(5, seed=1)
    swapped = [replace(pair, answers=pair.answers[::-1]) for pair in made]
    turned_batch, wanted = (
        preferences_of(with_reference(lay_out_pairs(part, 24, alone=True), LM, PARAMS), range(5), 5)
        for part in (made, swapped)
    )
    turned_batch = preferences_real.turn(turned_batch, np.ones((5, 1), bool))
    objective = dpo(LM, sigmoid, 0.3, sft=0.5)
    other = lively(PARAMS, seed=2)
    ours, theirs = (objective(other, part, jax.random.key(0)) for part in (turned_batch, wanted))
    chex.assert_trees_all_close((ours.losses, ours.metrics), (theirs.losses, theirs.metrics), rtol=1e-4, atol=1e-5)
    once = preferences_real.turn(batch, all_of_them)
    np.testing.assert_array_equal(once.reference_BS[:, 0::2], batch.reference_BS[:, 1::2])
    assert (np.asarray(once.answers.answers_BA) != np.asarray(batch.answers.answers_BA)).any()


def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
    few = {name: arm for name, arm in preferences_grammar.arms().items() if name in ("DPO 0.1", "KTO 0.1")}
    monkeypatch.setattr(preferences_grammar, "arms", lambda: few)
    monkeypatch.setattr(preferences_measure, "SAMPLES", 40)
    assert preferences.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "robust, 20% flips" in told
    assert "KTO 0.1" in told
    assert (tmp_path / "out/preferences.svg").is_file()
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["grammar"]["arms"].keys() == few.keys()
    assert all(np.isfinite(arm["kl"]).all() for arm in found["grammar"]["arms"].values())


def test_real_pairs_at_toy_size(tmp_path, monkeypatch):
    """Broken lines are left out, the file's own split is kept, labels are shuffled in the control alone."""
    talk = lambda answer: f"\n\nHuman: say {answer}\n\nAssistant: {answer}"
    records = [{"chosen": talk("yes" * (i % 3 + 1)), "rejected": talk("yes" * (i % 3 + 1)) + "no", "split": split}
               for i in range(12) for split in ("train", "test")]  # fmt: skip
    lines = [json.dumps(record) for record in [*records, {"prompt": "x", "rejected": "no"}, {"chosen": 3}]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(preferences_real, "BETAS", (0.1,))
    monkeypatch.setattr(preferences_real, "PROMPTS", 2)
    monkeypatch.setattr(preferences_real, "NEW_TOKENS", 3)
    monkeypatch.setattr(preferences_real, "LENGTH", 96)
    monkeypatch.setenv("LMLAB_CACHE", str(tmp_path / "cache"))
    found = preferences_real.run_real(str(tmp_path / "pairs.jsonl"), preferences_real.RealSizes(1, 260, 2, 2, 1e-3))
    assert (found["pairs"], found["held out"]) == (12, 12)
    assert found["arms"].keys() == {"DPO 0.1", "DPO 0.1, labels shuffled"}
    assert all(np.isfinite(arm["kl"]).all() for arm in found["arms"].values())


@pytest.mark.parametrize(
    "words", [["--seeds", "0"], ["--only", "all"], ["--only", "real"], ["--pairs", "nowhere"], ["--rate", "0"]], ids=str
)
def test_rude_options_are_refused(words, capsys):
    assert preferences.main(words) == 2
    assert capsys.readouterr().err.startswith("python -m experiments.preferences: ")
