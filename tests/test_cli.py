"""Help is there at once and without JAX; what is wrong is said in one line, with exit code 2."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib", "numpy")
PROBE = f"""
import sys
from lmlab.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print("LOADED", [name for name in {HEAVY} if name in sys.modules])
sys.exit(code)
"""


def python(*words):
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_help_takes_less_than_a_second():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("-m", "lmlab.cli", "--help")
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in ("run", "generate", "eval", "report", "doctor"))
    assert min(times) < 1


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], ["usage: lmlab"]),
        (
            ["run", "configs/demo.py", "--help"],
            ["--model.layers", "--data.length", "--optim.schedule.peak"],
        ),
        (["run", "demo", "--help"], ["--model.layers"]),
        (["generate", "--help"], ["--temperature", "--prompt"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_help_names_the_options_and_loads_nothing_heavy(words, shown):
    done = python("-c", PROBE, *words)
    assert done.returncode == 0, done.stderr
    assert [name for name in shown if name not in done.stdout] == []
    assert "LOADED []" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rum"], "Did you mean run?"),
        (["run", "absent"], "demo"),
        (["run", "demo", "--model.widht", "3"], "--model.width"),
        (["run", "demo", "--model.layers", "many"], "--model.layers"),
        (["run", "demo", "--model.layers", "0"], "at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_used_exits_with_2_and_says_what_is_near(words, said):
    done = python("-m", "lmlab.cli", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
