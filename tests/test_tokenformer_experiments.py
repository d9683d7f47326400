"""The experiments and the benchmark of TokenFormer run, and what they write adds up."""

import json
import sys

import jax
import numpy as np
import pytest

from benchmarks import tokenformer as benchmark
from experiments import tokenformer_digits as digits
from experiments import tokenformer_growth as growth


def test_growth_at_a_few_steps(tmp_path, capsys):
    assert growth.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    before = result["small model before growth"]
    assert set(result["arms"]) == {"small model, trained on", *growth.GROWTHS}
    for name, curve in result["arms"].items():
        kept = name == "small model, trained on" or name.endswith("tau kept")
        assert np.allclose(curve["0"], before, atol=1e-5) == kept
        assert len(curve["4"]) == 2
    assert result["largest new key"]["zero keys, zero values, tau kept"] == 0
    assert result["largest new key"][growth.PAPER] > 0
    assert (tmp_path / "growth.svg").stat().st_size > 0
    said = capsys.readouterr().out
    assert all(name in said for name in growth.GROWTHS)


def test_cost_saved_is_interpolated_in_the_logarithm_of_the_steps():
    result = {
        "options": {"grown": 10, "base": 20}, "flops_per_token": {"small": 1.0, "large": 2.0},
        "arms": {growth.PAPER: {10: [1.0, 2.0]}}, "scratch": {10: {10: [2.0]}, 40: {40: [1.0]}},
    }  # fmt: skip
    found = growth.saved(result)
    assert found["target loss"] == 1.5
    assert found["steps from nothing"] == 20
    assert found["over the stage"] == 2.0
    assert found["over the small model and the stage"] == 1.0
    assert found["known"] == "by interpolation"
    never = growth.saved(result | {"scratch": {10: {10: [3.0]}, 40: {40: [2.0]}}})
    assert never["steps from nothing"] is None
    assert never["over the stage"] is None
    assert never["known"] == "not: no budget reaches the target"
    soon = growth.saved(result | {"scratch": {10: {10: [1.4]}, 40: {40: [1.0]}}})
    assert soon["steps from nothing"] == 10
    assert soon["known"].startswith("as an upper bound")


@pytest.mark.parametrize("budgets", [["400", "200"], ["200", "200"], ["0", "200"], []])
def test_budgets_that_do_not_rise_are_refused(budgets, capsys):
    assert growth.main(["--budgets", *budgets]) == 2
    assert "--budgets" in capsys.readouterr().err


def test_digits_at_a_few_steps(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn carries the images (the extra vision)")
    assert digits.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["models"]) == {"ViT", "TokenFormer"}
    assert "held-out accuracy" in capsys.readouterr().out


def test_the_two_image_models_have_equal_parameters():
    sizes = []
    for config in digits.models(digits.Options()).values():
        classifier = digits.image_classifier(digits.language_model(config), (8, 8, 1), digits.PATCH)
        shapes = jax.eval_shape(classifier.init, jax.random.key(0))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)
    vit, ours = digits.models(digits.Options()).values()
    assert vit.layer_weights == ours.layer_weights


def test_digits_without_scikit_learn_say_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert digits.main(["--smoke", "--out", str(tmp_path)]) == 2
    assert "pip install 'lmlab[vision]'" in capsys.readouterr().err


def test_the_benchmark_ends_in_ratios(capsys):
    small = ["--width", "16", "--layers", "1", "--rows", "1", "--length", "8", "--rounds", "1"]
    assert benchmark.main(small) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == {"forward_ratio", "step_ratio"}
    assert min(result.values()) > 0
    assert benchmark.main(["--rounds", "0"]) == 2
