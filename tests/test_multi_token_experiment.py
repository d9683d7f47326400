"""The experiment and the benchmark of several heads at toy size: every arm runs, all that is promised is written."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import multi_token as benchmark
from experiments import multi_token as experiment
from lmlab.data.synthetic import PAD, one_document_a_row, polynomial_rows
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.objectives.multi_token import multi_token
from lmlab.testing.tiny import lively, tiny_config


def test_the_experiment_runs_and_writes_what_it_found(tmp_path, capsys):
    assert experiment.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["induction"]) == {"n = 1", "n = 2, labels of head 2 shuffled"}
    for found in result["induction"].values():
        assert found["steps"] == [0, 2, 4]
        assert np.shape(found["second tokens"]) == (3, 2)
        assert [len(found["passed"][mark]) for mark in ("0.25", "0.75")] == [2, 2]
    assert set(result["polynomials"]) == {"n = 4"}
    assert experiment.Options().out != "runs/multi_token"  # where the recipe of that name is trained
    assert (tmp_path / "multi_token.svg").read_text().startswith("<?xml")
    assert "polynomials, exact" in capsys.readouterr().out


def test_arms_are_of_equal_size_but_the_one_that_is_not_to_be():
    def size(model):
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.lm.init, jax.random.key(0))))

    sizes = {task: {arm: size(model) for arm, (model, _) in found.items()} for task, found in experiment.arms().items()}
    larger = sizes["induction"].pop("n = 2, trunk not reduced")
    assert set(sizes["induction"]) == {"n = 1", "n = 2", "n = 2, labels of head 2 shuffled"}
    assert [len({*found.values()}) for found in sizes.values()] == [1, 1]
    assert larger > sizes["induction"]["n = 1"]


def test_a_mark_is_passed_at_the_first_look_past_it():
    found = {"steps": [0, 100, 200], "second tokens": [[0.1, 0.2], [0.3, 0.2], [0.2, 0.8]]}
    result = experiment.summarised({"induction": {"n = 1": found}})
    assert result["induction"]["n = 1"]["passed"] == {"0.25": [100, 200], "0.75": [None, 200]}
    assert experiment.spread([100, None, 300, None, None]) == "never (300 to never)"
    assert experiment.spread([0.1, 0.5, 0.3, 0.2, 0.4]) == "0.300 (0.200 to 0.400)"


def test_the_control_teaches_its_first_head_alone():
    model = multi_token_lm(MultiTokenConfig(tiny_config(layers=3), 2))
    params = lively(model.lm.init(jax.random.key(0)))
    batch = one_document_a_row(jax.random.randint(jax.random.key(1), (4, 9), 0, 7))
    ours, real = (f(model)(params, batch, jax.random.key(0)).losses for f in (experiment.shuffled, multi_token))
    assert ours["head_1"].sum == pytest.approx(float(real["head_1"].sum), rel=1e-6)
    assert ours["head_2"].sum != pytest.approx(float(real["head_2"].sum), rel=1e-3)
    # Rows that are all alike have nothing to shuffle.
    alike = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batch)
    ours, real = (f(model)(params, alike, jax.random.key(0)).losses for f in (experiment.shuffled, multi_token))
    assert ours["head_2"].sum == pytest.approx(float(real["head_2"].sum), rel=1e-6)


def test_what_is_looked_at_is_not_in_the_pool():
    rng = np.random.default_rng(0)
    test, pool = (polynomial_rows(rng, [1, 2] * 8, lookahead) for lookahead in (0, 3))
    both = jax.tree.map(lambda x, y: jnp.concatenate([x[:5], jnp.pad(y, ((0, 0), (0, 3)))[:7], x[5:]]), pool, test)
    both = both.replace(tokens_BT=both.tokens_BT.at[5:12, -3:].set(PAD))
    chex.assert_trees_all_equal(experiment.without(both, test), pool)
    task = experiment.polynomials(experiment.Options(pool=8192, held_out=1024, rows=8192))
    rng, text = np.random.default_rng(0), lambda row: row[row != PAD].tobytes()
    tests = {text(row) for m in (1, 2) for row in np.asarray(polynomial_rows(rng, [m] * 1024).tokens_BT)}
    learnt = {text(row) for row in np.asarray(task.batch(jax.random.key(0), jnp.asarray(0)).tokens_BT)}
    assert len(tests) > 2000
    assert tests.isdisjoint(learnt)


@pytest.mark.parametrize("words", [["--every", "0"], ["--steps", "250"], ["--polynomial-steps", "50"]])
def test_looks_that_miss_the_end_are_refused(words, capsys):
    assert experiment.main(words) == 2
    assert f"{words[0]} = {words[1]}" in capsys.readouterr().err


def test_the_share_of_distinct_grams():
    assert benchmark.distinct([[1] * 10]) == pytest.approx(1 / 3)
    assert benchmark.distinct([list(range(10)), [1] * 10]) == pytest.approx(4 / 6)
    assert benchmark.distinct([[1, 2]]) == 1


TINY = """
from lmlab.data.config import DataConfig, Files
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.recipe import EvalConfig, MultiToken
from lmlab.train.config import ParallelConfig, TrainConfig

def recipe():
    return MultiToken(
        model=TransformerConfig(layers=3, width=8, max_length=128, attention=AttentionConfig(heads=1)), heads=2,
        data=DataConfig(sources={"text": Files("corpus.jsonl", heldout_percent=20)}, length=64, batch_size=2),
        train=TrainConfig(steps=1, eval_every=1, sample_every=0), parallel=ParallelConfig(data=1),
        eval=EvalConfig(batches=1, prompts=(), baselines=False),
    )
"""


def test_the_benchmark_ends_in_its_numbers(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "COUNTS", (1, 2))
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": f"abc {i} " * 9}) for i in range(40)))
    words = ["--recipe", "tiny.py", "--run", "out", "--texts", "1", "--new", "5", "--rounds", "1"]
    assert benchmark.main([*words, "--vocabulary", "512", "--memory-length", "8"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    warm = {"speedup_n2_warm", "acceptance_n2_warm"}
    assert set(result) == {"temp_growth_n2", "speedup_n2", "acceptance_n2", "overhead_n2", *warm}
    assert all(value >= 0 for value in result.values())
    greedy, other = out.split("temperature 0.8: ")
    assert greedy.count(" 1/1\n") == 2
    for said in (greedy.split("temperature 0.0: ")[1], other):
        assert "of whose 8-grams 1.00 are distinct" in said  # five tokens have none
    assert benchmark.main([*words, "--parts", "decoding", "--texts", "3"]) == 2
    assert "--texts = 3: expected at most 2" in capsys.readouterr().err
    assert benchmark.main([*words, "--parts", "memory", "speed"]) == 2
