"""The experiment on reward modelling at toy size: every part runs, and what is planted is what is said."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import reward_digits as digits
from experiments import reward_meta as meta
from experiments import reward_modeling as experiment
from experiments import reward_pilot as pilot
from lmlab.objectives.treatments import Treatment


def write(path, records):
    path.write_bytes(gzip.compress("".join(f"{json.dumps(record)}\n" for record in records).encode()))


def test_the_experiment_runs_and_writes_what_it_found(tmp_path, capsys):
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(list("abcdefgh"), 6))
    splits = ["test" if i % 4 == 0 else "train" for i in range(60)]
    pairs = [
        {"prompt": "q", "chosen": f"{say()} {i}", "rejected": say(), "split": split} for i, split in enumerate(splits)
    ]
    write(tmp_path / "pairs.jsonl.gz", pairs)
    # One of the answers is the JSON value false, as in the file of PandaLM.
    answers = [{"instruction": "q", "response1": say(), "response2": i % 9 == 0} for i in range(60)]
    votes = [{"annotator1": i % 3, "annotator2": 1, "annotator3": 1 + i % 2} for i in range(60)]
    write(tmp_path / "votes.jsonl.gz", [one | other for one, other in zip(answers, votes, strict=True)])
    words = ["--smoke", "--out", str(tmp_path), "--pairs", str(tmp_path / "pairs.jsonl.gz"),
             "--votes", str(tmp_path / "votes.jsonl.gz")]  # fmt: skip
    assert experiment.main(words) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert [len(result[part]) for part in ("vectors", "digits", "votes")] == [2, 2, 2]
    for seed in result["vectors"]:
        assert set(seed["detection"]) == {"0", "0.1", "0.2", "0.3", "0.4"}
        assert not any("auc" in name for by in seed["detection"]["0"].values() for x in by.values() for name in x)
        found = seed["detection"]["0.2"]
        assert {kind: list(by) for kind, by in found.items()} == {"in-sample": ["1", "5"], "out-of-fold": ["1", "5"]}
        assert 0.5 < found["out-of-fold"]["5"]["auc"] <= 1
        assert len(found["out-of-fold"]["5"]["flips by tenth"]) == 10
        assert {rate: len(values) for rate, values in seed["tenths alone"].items()} == {"0": 11, "0.2": 11}
        assert set(seed["cures"]) == {"0", "0.2", "0.4"}
        for arms in seed["cures"].values():
            assert len(arms) == 16
            assert all(0 < value < 1 for arm in arms.values() for values in arm.values() for value in values.values())
    assert set(result["meta"]) == set(experiment.SMOKE_ARMS)
    assert result["pairs"]["test"] == 15
    assert len(result["pairs"]["seeds"]) == 2
    assert (tmp_path / "reward_modeling.svg").read_text().startswith("<?xml")
    said = capsys.readouterr().out
    for part in ("vectors, 20% flipped", "MetaRM", "digit strings", "real pairs, 45", "votes:"):
        assert part in said


def test_parts_without_files_are_skipped_with_a_reason():
    result = {"pairs": {"skipped": "no file was named (--pairs)"}}
    assert "skipped, no file was named" in experiment.table(result)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--only", "x"], "--only"), (["--only", "pairs"], "--pairs"), (["--votes", "absent.jsonl.gz"], "--votes"),
     (["--epochs", "1"], "--epochs"), (["--seeds", "0"], "--seeds")],
)  # fmt: skip
def test_rude_input_gets_one_line(words, said, capsys):
    assert experiment.main(words) == 2
    assert said in capsys.readouterr().err


VOTE = {"instruction": "q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 1, "annotator3": 2}
PAIRS = [{"prompt": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(50)]


@pytest.mark.parametrize(
    ("option", "records", "said"),
    [
        ("--pairs", PAIRS, '"split": "test"'),
        ("--pairs", [{**pair, "split": "test"} for pair in PAIRS], "There are 0"),
        ("--pairs", [*PAIRS[:3], {**PAIRS[3], "split": "test"}], "There are 3"),
        ("--votes", [{"instruction": "q", "response1": "a", "response2": "b"}], "annotator1"),
        ("--votes", [{**VOTE, "annotator2": None}], "0, 1 or 2"),
        ("--votes", ["text"], "x.jsonl.gz:1"),
        ("--votes", [VOTE] * 50, "There are 1"),
        ("--votes", [{**VOTE, "response1": str(i)} for i in range(50)], "sometimes"),
        ("--votes", None, "can be read"),
    ],
)
def test_rude_files_get_one_line_before_anything_is_trained(tmp_path, capsys, option, records, said):
    path = tmp_path / "x.jsonl.gz"
    path.write_text("no gzip file") if records is None else write(path, records)
    assert experiment.main([option, str(path), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert "\n" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "x").write_text("")
    assert experiment.main(["--out", str(tmp_path / "x" / "out")]) == 2
    err = capsys.readouterr().err.strip()
    assert "--out" in err
    assert "\n" not in err


def test_pairs_are_in_their_true_order_and_shifted_where_they_say():
    world = pilot.draw_world(0, 400)
    for pairs in (world.train_N2D, *world.tests.values()):
        rewards = world.truth(pairs.astype(np.float64))
        assert (rewards[:, 0] > rewards[:, 1] - 1e-4).all()
    assert world.tests["shifted"][..., :4].mean() == pytest.approx(1.5, abs=0.1)
    assert abs(world.tests["shifted"][..., 4:].mean()) < 0.1
    again = pilot.draw_world(0, 400)
    np.testing.assert_array_equal(world.train_N2D, again.train_N2D)


def test_no_row_of_a_meta_set_is_in_a_test_set():
    # The coordinates that are not shifted, three in a row: sets that share a stream share them at some offset.
    def threes(sets):
        rows = np.concatenate([z.reshape(-1, pilot.WIDTH)[:, 4:] for z in sets])
        return {three.tobytes() for three in np.lib.stride_tricks.sliding_window_view(rows, 3, axis=1).reshape(-1, 3)}

    for seed in range(2):
        world, (_, answers, rng) = pilot.draw_world(seed, 50), meta.draw_meta(seed, 50)
        measured = meta.draw_answers(50, rng, 1.5)
        assert not threes([*answers.values(), measured]) & threes([world.train_N2D, *world.tests.values()])


def test_a_planted_flip_is_learnt_as_one():
    # All labels flipped: the members learn the opposite order.
    world = pilot.draw_world(0, 200)
    wrong = jnp.arange(200) >= 0
    ones = jnp.ones((2, 200))
    flipped = pilot.cure.with_flips(Treatment(ones, 0 * ones, ones), wrong)
    *_, (_, params) = pilot.trained(world.train_N2D, flipped, np.ones((2, 200), bool), 5, np.random.default_rng(0))
    assert np.asarray(pilot.measured_accuracy(params, world.train_N2D)).max() < 0.3


def test_digit_strings_are_worth_what_they_hold():
    assert digits.true_reward(np.asarray([7, 1, 7, 0])) == pytest.approx(1.6)
    rng = np.random.default_rng(0)
    for pair in (digits.draw_pair(rng) for _ in range(50)):
        first, second = (digits.true_reward(answer[:-1]) for answer in pair.answers)
        assert first > second
    batch = digits.draw_rows(6, rng)
    assert batch.answers.ends_BS.shape == (6, 2)
    assert np.asarray(batch.answers.tokens_BT)[np.arange(6)[:, None], batch.answers.ends_BS].tolist() == [[11, 11]] * 6
