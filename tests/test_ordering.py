"""`lmlab order`: the table and the plot of a recipe's order; and a run that is trained in it."""

import json

import numpy as np
import pytest
from tiny_run import one_line, rows

from lmlab.cli import main
from lmlab.train.folder import read_config

TINY = """
from dataclasses import replace
from lmlab.data.config import Files
import importlib.util

def recipe():
    spec = importlib.util.spec_from_file_location("tiny", "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    made = tiny.recipe()
    return replace(made, data=replace(made.data, sources={"a": Files("topics.jsonl", heldout_percent=10)}))
"""
ORDER = ["order", "related.py", "--out", "ordered", "--data.in-context.neighbours", "5"]


@pytest.fixture
def topics(place):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"t{i % 6}w{w}" for w in rng.integers(0, 9, 12)) for i in range(90)]
    (place / "topics.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts[:4]]))
    (place / "related.py").write_text(TINY)
    return place


def test_the_table_and_the_plot(topics, capsys):
    assert main(ORDER) == 0
    out = capsys.readouterr().out
    record = json.loads((topics / "ordered/order.json").read_text())["a"]
    orders = record["orders"]
    assert list(orders) == ["dynamic", "clusters", "random"]
    assert orders["dynamic"]["similarity"] > orders["clusters"]["similarity"] > orders["random"]["similarity"]
    assert orders["dynamic"]["jumps"] < orders["random"]["jumps"]
    assert orders["dynamic"]["ratio"] <= 1
    assert record["copies"] >= 3
    assert f"{record['copies']} copies" in out
    for name, quality in orders.items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert f"{quality['similarity']:.3f}" in line
    svg = (topics / "ordered/order.svg").read_text()
    assert all(f">{name}<" in svg for name in orders)
    # The second time everything is there, and the same.
    assert main([*ORDER, "--data.in-context.tour", "greedy_edges", "--data.in-context.link-fragments"]) == 0
    linked = json.loads((topics / "ordered/order.json").read_text())["a"]["orders"]
    assert linked["greedy_edges"]["similarity"] > orders["dynamic"]["similarity"]
    assert linked["random"] == orders["random"]


@pytest.mark.parametrize("tour", ["random", "clusters", "release", "neighbours"])
def test_an_order_is_measured_beside_the_others(topics, tour):
    assert main([*ORDER, "--data.in-context.tour", tour]) == 0
    orders = json.loads((topics / "ordered/order.json").read_text())["a"]["orders"]
    assert list(orders) == [tour, *(name for name in ("clusters", "random") if name != tour)]
    assert (topics / "ordered/order.svg").is_file()


def test_a_run_trains_in_the_order_across_documents(topics):
    words = ["run", "related.py", "--out", "related", "--data.order", "in_context", "--data.attend", "row",
             "--data.positions", "row", "--eval.no-baselines"]  # fmt: skip
    assert main(words) == 0
    assert len(rows(topics / "related", "train")) == 6
    assert read_config(topics / "related").data.order == "in_context"
    assert main([*words[:3], "apart", *words[4:6], "--eval.no-baselines"]) == 0
    losses = [[row["loss"] for row in rows(topics / name, "train")] for name in ("related", "apart")]
    assert losses[0] != losses[1]


RUDE = [
    (["order", "absent.py"], ("recipe", "absent.py")),
    ([*ORDER[:2], "--out", "tiny.py/x"], ("--out", "written")),
    ([*ORDER, "--data.in-context.neighbours", "0"], ("data.in_context.neighbours", "at least 1")),
    ([*ORDER, "--data.in-context.tour", "random", "--data.in-context.link-fragments"], ("link_fragments", "random")),
    ([*ORDER, "--data.in-context.heldout-threshold", "-1"], ("heldout_threshold", "held-out")),
    ([*ORDER, "--data.sources.a.train", "nowhere*.txt"], ("data.sources.a.train", "nowhere*.txt")),
]


@pytest.mark.parametrize(("words", "said"), RUDE)
def test_rude_input_gets_one_line(topics, capsys, words, said):
    assert main(words) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == []
