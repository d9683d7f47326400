"""`lmlab steer`: what it writes and tells, while it runs and after, and how it answers input that it cannot use."""

import io
import json
import math
import os
import signal

import numpy as np
import pytest
from rich.console import Console
from tiny_run import one_line

from lmlab.cli import main
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.steering.layout import MOST_COLUMNS, MOST_ROWS, columns
from lmlab.steering.rounds import Round
from lmlab.steering.watch import Watch, particle_table

WORDS = ["steer", "out", "--prompt", "ab", "--tokens", "6", "--particles", "4", "--out", "s"]
MASK = """
import jax.numpy as jnp
from lmlab.inference.programs import Program

def program(tokenizer):
    ab = jnp.asarray([tokenizer.decode([i]) in ("a", "b") for i in range(tokenizer.vocab_size)])
    stop = jnp.asarray([tokenizer.decode([i]) == "b" for i in range(tokenizer.vocab_size)])

    def step(p, count):
        p.observe(p.context.mask(p.tables[0]), True)
        token = p.sample(p.context.next_token())
        p.finish(p.tables[1][token] & (count > 0))
        return count + 1

    return Program(step, jnp.int32(0), (ab, stop))
"""
DIES = """
import jax.numpy as jnp
from lmlab.inference.programs import Program

def program(tokenizer):
    def step(p, count):
        p.sample(p.context.next_token())
        p.condition(count < 2)
        return count + 1
    return Program(step, jnp.int32(0))
"""
PAIRS = """
import jax.numpy as jnp
from lmlab.inference.programs import Program

def program(tokenizer):
    def step(p, count):
        token = p.sample(p.context.next_token())
        p.twist(jnp.where(token % 2 == 0, 0.5, -0.5))
        return count + 1
    return Program(step, jnp.int32(0), boundary=lambda count: count % 2 == 0)
"""


@pytest.fixture
def there(place):
    for name, text in {"mask": MASK, "dies": DIES, "pairs": PAIRS}.items():
        (place / f"{name}.py").write_text(text)
    return place


def strict(folder):
    """The trace, which may hold no NaN or Infinity; and the page, which may ask for nothing."""
    refuse = lambda name: pytest.fail(name)
    page = (folder / "report.html").read_text()
    for outside in ("http://", "https://", "<link", "src=", "@import", "NaN", ">nan"):
        assert outside not in page.replace("http://www.w3.org", ""), outside
    return json.loads((folder / "trace.json").read_text(), parse_constant=refuse), page


def check_trace(trace, particles=4):
    """Texts follow from the history, and log Z from the weights."""
    paths = [[] for _ in range(particles)]
    for one in trace["rounds"]:
        paths = [paths[parent] + tokens for parent, tokens in zip(one["parent"], one["tokens"], strict=True)]
        kept = [w for w in one["log_weight"] if w is not None]
        if kept:
            assert np.logaddexp.reduce(kept) - math.log(particles) == pytest.approx(one["log_evidence"], abs=1e-4)
    for path, particle in zip(paths, trace["particles"], strict=True):
        assert byte_tokenizer().decode(path) == particle["text"]
    if trace["posterior"]:
        assert sum(one["probability"] for one in trace["posterior"]) == pytest.approx(1, abs=1e-5)
        mean = np.logaddexp.reduce([p["log_weight"] for p in trace["particles"] if p["log_weight"] is not None])
        assert trace["log_evidence"] == pytest.approx(mean - math.log(particles), abs=1e-4)


def test_free_texts_have_all_of_the_evidence_and_the_same_seed_the_same_trace(there, capsys):
    assert main([*WORDS, "--prompt", "</script><b>bold"]) == 0
    said = capsys.readouterr()
    assert "log Z           0.000   (Z = 1)" in said.out
    assert "rounds with particles drawn anew: 0 of 6" in said.out
    assert "round 6/6" in said.err
    trace, page = strict(there / "s")
    check_trace(trace)
    assert "</script><b>" not in page
    assert "&lt;/script&gt;&lt;b&gt;bold" in page
    assert page.count("</script>") == 2
    before = (there / "s/trace.json").read_bytes()
    assert main([*WORDS, "--prompt", "</script><b>bold"]) == 0
    assert (there / "s/trace.json").read_bytes() == before


@pytest.mark.parametrize("method", ["smc", "steer"])
def test_a_program_of_a_file_is_met(there, capsys, method):
    assert main([*WORDS, "--program", "mask.py", "--method", method, "--threshold", "1", "--unfinished", "drop"]) == 0
    trace, page = strict(there / "s")
    check_trace(trace)
    assert -30 < trace["log_evidence"] < -1
    assert all(set(one["text"]) <= {"a", "b"} and one["text"].endswith("b") for one in trace["posterior"])
    assert all(one["finished"] for one in trace["posterior"])
    assert trace["drawn"] in [one["text"] for one in trace["posterior"]]
    children = 3 if method == "steer" else 1
    assert np.shape(trace["rounds"][0]["children_token"]) == (4, children)
    assert 'class="stub' in page
    assert f"of {len(trace['rounds'])}" in capsys.readouterr().out


def test_temperature_is_that_of_the_model_that_is_steered(there):
    found = []
    for temperature in ("1", "0.2"):
        assert main([*WORDS, "--program", "mask.py", "--temperature", temperature]) == 0
        found.append(strict(there / "s")[0]["log_evidence"])
    assert found[0] != found[1]


def test_rounds_of_several_tokens_are_drawn_and_twists_taken_back(there):
    assert main([*WORDS, "--program", "pairs.py", "--method", "steer", "--children", "2"]) == 0
    trace, page = strict(there / "s")
    check_trace(trace)
    assert [len(tokens) for one in trace["rounds"] for tokens in one["tokens"]] == [2] * 12
    assert trace["rounds"][0]["children_token"] is None
    assert np.shape(trace["rounds"][0]["children_log_weight"]) == (4, 2)
    assert 'class="dot going"' in page


def test_a_program_that_cannot_be_met_is_an_outcome(there, capsys):
    for method in ("smc", "steer"):
        assert main([*WORDS, "--program", "dies.py", "--method", method]) == 1
        said = capsys.readouterr().out
        assert "log Z           none" in said
        assert "All 4 particles are dead after round 3, at token 3 of the text" in said
        assert "nan" not in said
        trace, page = strict(there / "s")
        check_trace(trace)
        assert trace["log_evidence"] is None
        assert trace["posterior"] == []
        assert "are dead after round 3" in trace["failure"]
        assert "are dead after round 3" in page
        assert 'class="dot dead"' in page
    assert main([*WORDS, "--program", "pairs.py", "--unfinished", "drop"]) == 1
    assert "--unfinished drop leaves none" in capsys.readouterr().out


@pytest.mark.parametrize(("program", "number"), [("mask.py", signal.SIGINT), ("pairs.py", signal.SIGTERM)])
def test_a_signal_ends_it_with_what_there_is(there, capsys, monkeypatch, program, number):
    update, before = Watch.update, signal.getsignal(number)

    def interrupting(self, made, *rest):
        update(self, made, *rest)
        if made == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Watch, "update", interrupting)
    assert main([*WORDS, "--program", program, "--method", "steer"]) == 128 + number
    # It is heard after the next round.
    out = capsys.readouterr().out
    assert f"stopped by {number.name} after round 2" in out
    assert "the first 2 rounds of the model" in out
    trace, page = strict(there / "s")
    check_trace(trace)
    assert trace["stopped_by"] == number.name
    assert len(trace["rounds"]) == 2
    assert f"stopped by {number.name} after 2 rounds" in page
    assert signal.getsignal(number) is before


def made_round(parent, log_weight, finished=(), tokens=None, child=None):
    count, weights = len(parent), np.asarray(log_weight, np.float32)
    share = np.exp(weights) / max(np.exp(weights).sum(), 1e-30)
    return Round(
        np.asarray(parent), np.zeros(count, int) if child is None else child, tokens or [[1]] * count,
        np.ones(count, int), np.isin(np.arange(count), finished), weights, share, 0.0, 1.0,
    )  # fmt: skip


def test_the_terminal_shows_the_heaviest_and_no_controls():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=90, height=8, color_system=None)
    times = iter(range(100))
    one = made_round(range(9), [0, 2, -np.inf, 1, 0, 0, 0, 0, 0], finished=[3])
    texts = [f"text {p}\n\x1b[31m" if p else "long " * 40 + "end" for p in range(9)]
    with Watch(5, console, lambda: next(times)) as watch:
        watch.update(1, one, lambda: texts)
    said = file.getvalue()
    assert "round 1/5" in said
    assert "1 dead" in said
    assert said.index("text 1\\n\\x1b[31m") < said.index("text 3")
    assert "\x1b[31m" not in said
    assert "text 2" not in said
    assert "6 more" in said
    table = io.StringIO()
    Console(file=table, width=60).print(particle_table(one, texts, 20, 60))
    rows = table.getvalue().splitlines()
    assert len(rows) == 9
    assert max(map(len, rows)) <= 60
    assert [row for row in rows if "■" in row and "text 3" in row]
    assert [row for row in rows if " x " in row and "text 2" in row]
    assert [row for row in rows if "…" in row and row.rstrip().endswith("long end")]


@pytest.mark.parametrize(("particles", "rounds"), [(5, 12), (90, 140)])
def test_lines_of_the_tree_do_not_cross_and_every_node_has_its_parent(particles, rounds):
    rng = np.random.default_rng(0)
    history = []
    for t in range(rounds):
        parent = rng.integers(particles, size=particles) if t else np.zeros(particles, int)
        weights = np.where(rng.random(particles) < 0.1, -np.inf, rng.normal(size=particles))
        child = np.asarray([int(np.sum(parent[:p] == parent[p])) for p in range(particles)])
        if t:
            weights = np.where(history[-1].log_weight_P[parent] > -np.inf, weights, -np.inf)
        weights[0], parent[0] = 0, 0
        history.append(made_round(parent, weights, child=child))
    drawn = columns(history)
    assert len(drawn) == min(rounds, MOST_COLUMNS)
    for t, column in enumerate(drawn):
        assert 0 < len(column) <= min(particles, MOST_ROWS)
        rows = [node.row for node in column]
        assert np.all(np.diff(rows) > 1 - 1e-6)
        assert rows[0] > -1e-6
        assert rows[-1] < min(particles, MOST_ROWS) - 1 + 1e-6
        parents = [node.parent for node in column]
        assert parents == sorted(parents)
        if t:
            named = [drawn[t - 1][node.parent].particle for node in column]
            assert named == [history[t].parent_P[node.particle] for node in column]
            assert all(drawn[t - 1][node.parent].state != "dead" for node in column)
    alive = [int(np.sum(one.log_weight_P > -np.inf)) for one in history[: len(drawn)]]
    shown = [sum(node.state != "dead" for node in column) for column in drawn]
    assert shown[-1] == min(alive[-1], MOST_ROWS)


RUDE = [
    (["nowhere"], ("model", "nowhere")),
    (["out", "--program", ""], ("--program",)),
    (["out", "--program", "absent.py"], ("program", "absent.py", "there")),
    (["out", "--program", "tiny.py"], ("program", "function program(tokenizer)")),
    (["out", "--program", "wrong.py"], ("program", "not int")),
    (["out", "--program", "nan.py"], ("weights", "NaN")),
    (["out", "--program", "inf.py"], ("weights", "inf", "numbers")),
    (["out", "--program", "forbid:\udcff"], ("--program", "UTF-8")),
    (["out", "--prompt", "\udcff"], ("--prompt", "UTF-8")),
    (["out", "--prompt", "a", "b"], ("--prompt", "1, one for each context")),
    (["out", "--prompt", "a" * 30], ("prompt", "max_length = 32")),
    (["out", "--tokens", "0"], ("--tokens", "at least 1")),
    (["out", "--particles", "0"], ("--particles", "at least 1")),
    (["out", "--children", "0"], ("--children", "at least 1")),
    (["out", "--threshold", "1.5"], ("--threshold", "[0, 1]")),
    (["out", "--threshold", "nan"], ("--threshold", "[0, 1]")),
    (["out", "--temperature", "-1"], ("--temperature", "positive")),
    (["out", "--temperature", "inf"], ("--temperature", "positive")),
    (["out", "--seed", "-1"], ("--seed", "from 0")),
    (["out", "--out", "out"], ("--out", "other than that of a run")),
    (["out", "--out", "tiny.py/x"], ("--out", "written")),
    (["out", "--out", "/proc/lmlab"], ("--out", "written")),
]


@pytest.mark.parametrize(("words", "said"), RUDE)
def test_rude_input_gets_one_line_and_leaves_nothing(there, capsys, words, said):
    (there / "wrong.py").write_text("def program(tokenizer):\n    return 1\n")
    (there / "nan.py").write_text(DIES.replace("p.condition(count < 2)", "p.score(jnp.nan)"))
    (there / "inf.py").write_text(DIES.replace("p.condition(count < 2)", "p.score(jnp.inf)"))
    out = [] if "--out" in words else ["--out", "s"]
    tokens = [] if "--tokens" in words else ["--tokens", "6"]
    before = sorted(os.listdir(there / "out"))
    assert main(["steer", *words, *tokens, *out]) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == []
    assert not (there / "s").exists() or not os.listdir(there / "s")
    assert sorted(os.listdir(there / "out")) == before
