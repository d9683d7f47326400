"""`lmlab label-noise`: what it finds, what it writes, and how it answers input that it cannot use."""

import gzip
import json
import os

import numpy as np
import pytest
from tiny_run import one_line

from lmlab.cli import main
from lmlab.evals.ranking import auc

GOOD, BAD = ("kind", "helpful", "clear", "polite", "sure"), ("rude", "wrong", "vague", "angry", "odd")
WORDS = ["label-noise", "pairs.jsonl", "--out", "out", "--rounds", "4", "--dimensions", "64", "--head.epochs", "8"]


def make_pairs(count=120, flips=12, seed=0):
    """Answers of good and of bad words; the first `flips` labels are wrong."""
    rng = np.random.default_rng(seed)
    say = lambda words: " ".join(rng.choice([*words, "the", "a", "of"], 12))
    pairs = []
    for i in range(count):
        sides = {"chosen": f"{say(GOOD)} {i}", "rejected": f"{say(BAD)} {i}"}
        if i < flips:
            sides = {"chosen": sides["rejected"], "rejected": sides["chosen"]}
        pairs.append({"id": i, "prompt": f"question {i}", **sides})
    return pairs


def write(path, records):
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def read(path):
    data = path.read_bytes()
    return [
        json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", make_pairs())
    return tmp_path


def test_flips_are_found_and_turned_back_and_the_page_tells_them(folder, capsys):
    before = (folder / "pairs.jsonl").read_bytes()
    assert main([*WORDS, "--treat", "flip"]) == 0
    said = capsys.readouterr()
    assert "120 pairs; 120 written, suspects were turned round" in said.out
    assert "disagrees with a label, not that the label is wrong" in said.out
    assert "training" in said.err  # how far it is
    rows = read(folder / "out/strength.jsonl")
    assert [row["where"] for row in rows] == [f"pairs.jsonl:{i + 1}" for i in range(120)]
    strength = np.asarray([row["strength"] for row in rows])
    assert auc(-strength, np.arange(120) < 12) > 0.99
    assert {row["vote"] for row in rows} <= {0, 0.25, 0.5, 0.75, 1}
    suspects = {i for i, row in enumerate(rows) if row["kind"] == "incorrect"}
    assert len(suspects & set(range(12))) >= 10
    assert len(suspects) <= 20
    pairs, cleaned = make_pairs(), read(folder / "out/cleaned.jsonl")
    for i, (old, new) in enumerate(zip(pairs, cleaned, strict=True)):
        turned = {**old, "chosen": old["rejected"], "rejected": old["chosen"], "flipped": True}
        assert new == (turned if i in suspects else old)
    assert (folder / "pairs.jsonl").read_bytes() == before
    page = (folder / "out/report.html").read_text()
    assert "<svg" in page
    assert page.index("Incorrect:") < page.index("Ambiguous:") < page.index("Normal:")
    assert pairs[0]["chosen"] in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not list((folder / "out").glob("*.partial"))


def test_what_is_done_to_suspects(folder):
    records = make_pairs(60, 6)
    for record in records:
        record |= {"weight": 2.0, "margin": 0.5, "target": 0.9}
    write(folder / "pairs.jsonl.gz", records)
    made = {}
    for treat in ("soft", "weight", "drop", "flip", "none"):
        words = ["label-noise", "pairs.jsonl.gz", "--out", treat, *WORDS[4:], "--treat", treat, "--share", "0.1"]
        assert main(words) == 0
        made[treat] = read(folder / treat / "cleaned.jsonl.gz")
    rows = read(folder / "soft/strength.jsonl")
    suspects = [row["kind"] == "incorrect" for row in rows]
    assert sum(suspects) == 6  # the share that was asked for
    assert made["none"] == records
    assert [record["target"] for record in made["soft"]] == [row["target"] for row in rows]
    assert max(row["target"] for row, bad in zip(rows, suspects, strict=True) if bad) < 0.5
    assert made["drop"] == [record for record, bad in zip(records, suspects, strict=True) if not bad]
    for record, weighed, flipped, row, bad in zip(records, made["weight"], made["flip"], rows, suspects, strict=True):
        assert weighed["weight"] == pytest.approx(2 * row["target"] if bad else 2, abs=1e-5)
        assert flipped["margin"] == (-0.5 if bad else 0.5)
        assert flipped["target"] == (0.1 if bad else 0.9)
        assert ("flipped" in flipped) == bad
        assert record["chosen"] == (flipped["rejected"] if bad else flipped["chosen"])
    # The same input gives the same bytes.
    again = ["label-noise", "pairs.jsonl.gz", "--out", "again", *WORDS[4:], "--treat", "soft", "--share", "0.1"]
    assert main(again) == 0
    assert (folder / "again/cleaned.jsonl.gz").read_bytes() == (folder / "soft/cleaned.jsonl.gz").read_bytes()


ASKED = ({"role": "user", "content": "what?"},)
SILENT = ({"role": "user", "content": " "},)


@pytest.mark.parametrize("prompts", [["a", "b", ASKED, ""], ["", " ", SILENT], ["a"], [ASKED]])
def test_copies_of_a_pair_and_pairs_of_one_prompt_are_in_one_fold(prompts):
    from lmlab.data.pair_records import Pair
    from lmlab.label_noise.read import group_pairs
    from lmlab.label_noise.scores import deal_folds

    texts = [(prompt, f"good {i}", f"bad {i}") for prompt in prompts for i in range(5)]
    # Each twice, the second time turned round.
    pairs = [Pair("", *text) for text in texts] + [Pair("", prompt, bad, good) for prompt, good, bad in texts]
    groups = group_pairs(pairs)
    folds = deal_folds(groups, 3, 20, np.random.default_rng(0))
    np.testing.assert_array_equal(folds[:, : len(texts)], folds[:, len(texts) :])
    assert all(sorted(set(row)) == [0, 1, 2] for row in folds.tolist())
    for prompt in prompts:
        mine = [i for i, pair in enumerate(pairs) if pair.prompt == prompt]
        telling = len(prompts) > 1 and prompt in ("a", "b", ASKED)
        assert len(set(groups[mine].tolist())) == (1 if telling else 5)
    assert sorted(set(groups.tolist())) == list(range(groups.max() + 1))


def test_soft_targets_are_read_by_training(folder):
    from lmlab.core.errors import UserError
    from lmlab.data.pair_records import read_pair

    assert read_pair({**make_pairs()[0], "target": 0.25}, "a:1").target == 0.25
    with pytest.raises(UserError, match="between 0 and 1"):
        read_pair({**make_pairs()[0], "target": 1.5}, "a:1")


def test_texts_are_escaped_and_every_shape_is_read(folder):
    evil = "<script>alert('x')</script> & \"quoted\" \ud800"
    records = make_pairs(30, 3)
    records[0] |= {"chosen": f"{evil} rude wrong", "prompt": "<b>bold</b>"}
    asked = "\n\nHuman: <i>hi\n\nAssistant:"
    records[1] = {"chosen": f"{asked} kind and clear", "rejected": f"{asked} rude, odd"}
    ask = {"role": "user", "content": "<u>what"}
    records[2] = {
        "chosen": [ask, {"role": "assistant", "content": "wrong and vague"}],
        "rejected": [ask, {"role": "assistant", "content": "polite, sure"}],
    }
    records[3] = {"conversation": [ask], "chosen": "kind kind", "rejected": "odd odd"}
    write(folder / "pairs.jsonl", records)
    assert main([*WORDS, "--treat", "flip"]) == 0
    page = (folder / "out/report.html").read_text(encoding="utf-8", errors="replace")
    for raw in ("<script>", "<b>bold", "<i>hi", "<u>what"):
        assert raw not in page
    assert "&lt;script&gt;" in page
    for old, new in zip(records, read(folder / "out/cleaned.jsonl"), strict=True):
        assert sorted(map(str, (old["chosen"], old["rejected"]))) == sorted(map(str, (new["chosen"], new["rejected"])))


def test_a_weak_ensemble_says_so(folder, capsys):
    rng = np.random.default_rng(0)
    noise = lambda: " ".join(rng.choice([*GOOD, *BAD], 12))
    write(folder / "pairs.jsonl", [{"prompt": "q", "chosen": noise(), "rejected": noise()} for _ in range(100)])
    assert main(WORDS) == 0
    assert "That is weak" in capsys.readouterr().out
    assert "That is weak" in (folder / "out/report.html").read_text()


def test_equal_answers_are_skipped_and_told_and_so_are_lines_that_are_no_pair(folder, capsys):
    same = {"prompt": "q", "chosen": "yes", "rejected": "yes "}
    broken = {"prompt": "q", "chosen": "", "rejected": "no"}
    write(folder / "pairs.jsonl", [*make_pairs(40, 4), same, broken, same])
    assert main([*WORDS, "--invalid", "drop"]) == 0
    said = capsys.readouterr()
    assert "2 of equal answers, 1 of no pair" in said.err
    assert "40 pairs, 2 left out (equal answers), 1 left out (no pair); 40 written" in said.out
    assert "left out: equal answers" in (folder / "out/report.html").read_text()


def test_features_of_a_model_that_was_trained_here(place, capsys):
    write(place / "pairs.jsonl", make_pairs(24, 2))
    words = [*WORDS, "--model", "out", "--out", "noise", "--rounds", "2", "--head.kind", "mlp", "--head.hidden", "4"]
    assert main(words) == 0
    assert "24 pairs" in capsys.readouterr().out
    rows = read(place / "noise/strength.jsonl")
    assert np.isfinite([row["strength"] for row in rows]).all()
    assert len({row["strength"] for row in rows}) > 20
    assert "out" in (place / "noise/report.html").read_text()


PAIR = {"prompt": "q", "chosen": "a b", "rejected": "c d"}
RUDE = [
    (None, ["absent.jsonl"], ("DATA", "absent.jsonl")),
    (None, ["pairs.csv"], ("DATA", ".jsonl")),
    ([], ["pairs.jsonl"], ("DATA", "at least one pair")),
    ([{"prompt": "q", "chosen": "a"}], ["pairs.jsonl"], ("pairs.jsonl:1", "rejected", "--invalid drop")),
    ([PAIR, {**PAIR, "chosen": " "}], ["pairs.jsonl"], ("pairs.jsonl:2", "not empty", "chosen")),
    ([PAIR, "text"], ["pairs.jsonl"], ("pairs.jsonl:2", "JSON object")),
    ([{**PAIR, "rejected": "a b"}], ["pairs.jsonl"], ("different answers", "1 of equal answers")),
    ([PAIR, {**PAIR, "chosen": "e"}], ["pairs.jsonl"], ("at least 5 prompts", "There are 2")),
    ([PAIR] * 9, ["pairs.jsonl"], ("at least 5 prompts", "There are 1")),
    (None, ["pairs.jsonl", "--folds", "1"], ("--folds", "at least 2")),
    (None, ["pairs.jsonl", "--rounds", "1"], ("--rounds", "at least 2")),
    (None, ["pairs.jsonl", "--share", "0.9"], ("--share", "below 0.5")),
    (None, ["pairs.jsonl", "--planted", "-1"], ("--planted", "below 0.5")),
    (None, ["pairs.jsonl", "--head.rate", "0"], ("--head.rate", "positive")),
    (None, ["pairs.jsonl", "--head.rate", "inf"], ("--head.rate", "positive")),
    (None, ["pairs.jsonl", "--head.decay", "nan"], ("--head.decay", "0 or more")),
    (None, ["pairs.jsonl", "--head.decay", "inf"], ("--head.decay", "0 or more")),
    (None, ["pairs.jsonl", "--seed", "-1"], ("--seed", "from 0")),
    (None, ["pairs.jsonl", "--head.rate", "1e30"], ("--head.rate", "not finite")),
    (None, ["pairs.jsonl", "--head.epochs", "0"], ("--head.epochs", "at least 1")),
    (None, ["pairs.jsonl", "--model", "nowhere"], ("--model", "nowhere")),
    (None, ["pairs.jsonl", "--model", "empty"], ("empty",)),
    (None, ["pairs.jsonl", "--out", "pairs.jsonl/x"], ("--out", "written")),
    (None, ["pairs.jsonl", "--out", "/proc/lmlab"], ("--out", "written")),
]


@pytest.mark.parametrize(("records", "words", "said"), RUDE)
def test_rude_input_gets_one_line_and_leaves_nothing(folder, capsys, records, words, said):
    (folder / "empty").mkdir()
    (folder / "pairs.csv").write_text("a,b\n")
    if records is not None:
        write(folder / "pairs.jsonl", records)
    assert main(["label-noise", *words, *([] if "--out" in words else ["--out", "out"])]) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == []
    assert not (folder / "out").exists() or not os.listdir(folder / "out")


@pytest.mark.parametrize("name", ["cleaned.jsonl", "strength.jsonl", "report.html"])
def test_an_input_is_never_overwritten(folder, capsys, name):
    (folder / "out").mkdir()
    write(folder / "out" / name, make_pairs())
    before = (folder / "out" / name).read_bytes()
    (folder / "link.jsonl").symlink_to(folder / "out" / name)
    for data in ["link.jsonl", f"out/{name}"][: 1 if name.endswith("html") else 2]:
        assert main(["label-noise", data, *WORDS[2:]]) == 2
        assert f"{name} is written there, and an input is never overwritten" in one_line(capsys)
    assert (folder / "out" / name).read_bytes() == before


def test_files_of_one_beginning_have_folders_of_their_own(folder):
    for name in ("hh.train.jsonl", "hh.test.jsonl.gz"):
        write(folder / name, make_pairs(20, 0))
        assert main(["label-noise", name, *WORDS[4:], "--head.epochs", "1"]) == 0
    assert sorted(os.listdir(folder / "runs")) == ["hh.test-label-noise", "hh.train-label-noise"]


def test_a_folder_in_the_way_of_a_file(folder, capsys):
    (folder / "out/report.html").mkdir(parents=True)
    assert main(WORDS) == 2
    assert "report.html is a folder" in one_line(capsys)
    assert os.listdir(folder / "out") == ["report.html"]


def test_a_disk_that_is_full_leaves_what_was_there(folder, capsys, monkeypatch):
    from lmlab.label_noise import clean

    assert main(WORDS) == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    capsys.readouterr()

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clean.Path, "write_bytes", full)
    assert main([*WORDS, "--treat", "drop"]) == 2
    assert "No space left" in one_line(capsys)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
