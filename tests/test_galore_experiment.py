"""The experiment of projected gradients, its control against the closed form, and the benchmark, at toy size."""

import json

import pytest

from benchmarks import galore as benchmark
from experiments import galore


@pytest.mark.parametrize(("name", "rank"), [("frozen", 4), ("T=100", 24), ("T=20", 32)])
def test_the_control_ends_where_it_must(name, rank):
    found = galore.control(*galore.CONTROLS[name])
    assert found["rank"] == rank
    if name == "frozen":
        assert found["loss"] == pytest.approx(found["predicted"], abs=5e-5)
    else:
        assert found["loss"] < 0.1 * found["predicted"]


def test_a_smoke_run(tmp_path, capsys):
    assert galore.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    sizes = {name: arm["state_bytes"] for name, arm in result["arms"].items()}
    assert sizes["GaLore, rotate"] < sizes["Adam, rate 0.003"]
    ranks = {name: arm["ranks"]["layers/mlp/gate_up/kernel"] for name, arm in result["arms"].items()}
    # Factors of rank 8 move by 16 at most, Adam by all 64; GaLore by 8 a subspace, of which it had two.
    assert ranks["factorised"][1] <= 16
    low, high = ranks["GaLore, rotate"]
    assert 8 <= low <= high <= 16
    assert ranks["Adam, rate 0.003"] == [64, 64]
    assert all(len(arm["losses"]) == 2 for arm in result["arms"].values())
    assert (tmp_path / "out" / "control.svg").exists()
    assert (tmp_path / "out" / "losses.svg").exists()
    assert "closed form" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["seeds", "steps", "rank", "every"])
def test_sizes_of_nothing_are_refused(name, capsys):
    assert galore.main([f"--{name}", "0"]) == 2
    assert f"--{name} = 0: expected at least 1" in capsys.readouterr().err


def test_the_benchmark_at_toy_size(capsys):
    sizes = ["--layers", "2", "--width", "64", "--ffn", "96", "--vocab", "50", "--rank", "8", "--rows", "1"]
    assert benchmark.main([*sizes, "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["state_bytes_exact"]
    assert result["distance"] < 1e-2
