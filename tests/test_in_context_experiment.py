"""The experiment of In-Context Pretraining at toy size, and what its corpus is."""

import json

import numpy as np
import pytest

from benchmarks import ordering
from experiments import in_context as experiment
from experiments import in_context_topics as topics
from lmlab.retrieval.encoder import unit_rows


def test_a_document_shows_pairs_of_its_topic():
    documents = topics.topic_documents(30, 8, np.random.default_rng(0))
    assert documents.shape == (240, topics.SIZE)
    keys, values = documents[:, 1::2], documents[:, 2::2]
    assert (documents[:, 0] == 0).all()
    assert keys.min() >= 1
    assert keys.max() <= topics.KEYS < values.min()
    assert values.max() == topics.MODEL.vocab_size - 1
    for topic in range(30):
        mine = slice(8 * topic, 8 * topic + 8)
        pairs = set(zip(keys[mine].ravel().tolist(), values[mine].ravel().tolist(), strict=True))
        assert len(pairs) == len({key for key, _ in pairs}) <= topics.PAIRS
    assert all(len(set(row)) == topics.SHOWN for row in keys.tolist())


def test_vectors_are_near_where_pairs_are_shared():
    documents = topics.topic_documents(10, 8, np.random.default_rng(0))
    encode = topics.pair_encoder(documents).fit([])
    vectors = encode([str(i) for i in range(80)])
    np.testing.assert_allclose(vectors, unit_rows(vectors), atol=1e-6)
    sims = vectors @ vectors.T
    same = np.repeat(np.arange(10), 8)[:, None] == np.repeat(np.arange(10), 8)[None]
    assert sims[same].mean() > 4 * sims[~same].mean()


def test_values_stand_where_they_are_looked_for():
    documents = topics.topic_documents(1, topics.WINDOW, np.random.default_rng(0))
    labels = documents.ravel()[1:][topics.value_places()]
    np.testing.assert_array_equal(labels.reshape(topics.WINDOW, -1), documents[:, 2::2])


def test_the_experiment_runs_and_writes_what_it_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LMLAB_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    posts = [
        {"text": " ".join(f"g{i % 4}w{w}" for w in rng.integers(0, 9, 30)), "group": f"g{i % 4}"} for i in range(80)
    ]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    words = ["--smoke", "--out", str(tmp_path / "out"), "--text", str(tmp_path / "posts.jsonl")]
    assert experiment.main(words) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())
    arms = {f"{order}, {attend}" for order in ("random", "related") for attend in ("row", "document")}
    assert set(result["topics"]["arms"]) == set(result["text"]["arms"]) == arms
    for arm in result["topics"]["arms"].values():
        assert np.shape(arm["by place"]) == (2, topics.WINDOW)
    assert all(order["same topic"] > 0.5 for order in result["topics"]["order"])
    for arm in result["text"]["arms"].values():
        assert np.isfinite([arm["related"], arm["random"]]).all()
    orders = result["text"]["orders"]["hash_tfidf"]["orders"]
    assert orders["dynamic degree"]["same group"] > orders["random"]["same group"] + 0.2
    assert orders["dynamic, linked"]["similarity"] >= orders["dynamic degree"]["similarity"]
    assert (tmp_path / "out/in_context.svg").read_text().startswith("<?xml")
    assert "same group" in capsys.readouterr().out


def test_without_posts_the_second_part_is_skipped_with_a_reason():
    result = {"text": {"skipped": "no posts were named (--text)"}}
    assert "skipped, no posts" in experiment.table(result)


@pytest.mark.parametrize(
    ("words", "said"), [(["--text", "absent"], "--text"), (["--only", "text"], "--text"), (["--only", "x"], "--only")]
)
def test_rude_input_gets_one_line(words, said, capsys):
    assert experiment.main(words) == 2
    assert said in capsys.readouterr().err


def test_ordering_measures_every_stage_and_ends_in_its_numbers(capsys):
    found = ordering.measure(300)
    assert found["total"] == pytest.approx(sum(found[stage] for stage in ordering.STAGES))
    # One in twenty is a near copy, and neighbours in the order come from one cluster.
    assert 270 <= found["kept"] <= 290
    assert found["similarity"] > 0.4
    capsys.readouterr()
    rows = {n: dict.fromkeys((*ordering.STAGES, "total", "gb", "similarity"), n**2 / 1e9) for n in (1000, 2000)}
    ordering.report(rows)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {"seconds_100k": 0.0, "gb_100k": 0.0}
    assert out.splitlines()[3].split()[1:7] == ["2.00"] * 6
