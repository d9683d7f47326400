"""Several heads by the command line: trained, interrupted, used as the model of head 1, begun from a model of one."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from test_sft import TEMPLATE, WORDS, write_chats
from tiny_run import RECIPE, contents, one_line, rows

import lmlab.talk
import lmlab.training
from experiments.sft import main as sft
from lmlab.cli import main
from lmlab.core.errors import UserError
from lmlab.inference.speculative import Speculated
from lmlab.interop.pretrained import load_pretrained
from lmlab.loading import load_model, open_model
from lmlab.models.config import ExecutionConfig
from lmlab.models.flops import further_heads_flops_per_token, training_flops_per_token
from lmlab.models.heads import drop_heads
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.objectives.config import MultiTokenLossConfig
from lmlab.recipe import MultiToken, load_recipe
from lmlab.runs import load_heads, load_run
from lmlab.testing.tiny import tiny_config

HEADS = RECIPE.replace("EvalConfig, Pretrain", "EvalConfig, MultiToken").replace("Pretrain(", "MultiToken(heads=2,")
HEADS = HEADS.replace("layers=2", "layers=3")
TRAIN = ["run", "heads.py", "--out", "heads"]
GREEDY = ["--prompt", "abc", "ab", "--temperature", "0", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory) -> Path:
    """What `finished` holds, and beside it a run "heads" of two heads that nobody touched."""
    folder = tmp_path_factory.mktemp("heads") / "place"
    shutil.copytree(finished, folder)
    (folder / "heads.py").write_text(HEADS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(TRAIN) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A copy to work in."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_every_head_is_reported_and_head_1_is_the_language_model(trained):
    for row in rows(trained / "heads", "train"):
        heads = [row[f"loss/head_{i}"] for i in (1, 2)]
        assert row["loss"] == pytest.approx(sum(heads), rel=1e-5)
        assert row["nll"] == pytest.approx(heads[0], rel=1e-5)
        # The tokens that end a text are labels without bytes.
        assert 1 <= row["bits_per_byte"] * math.log(2) / heads[0] < 1.2
    last = rows(trained / "heads", "eval")[-1]
    assert last["step"] == 6
    assert last["perplexity"] == pytest.approx(math.exp(last["loss/head_1"]), rel=1e-5)
    scores = json.loads((trained / "heads/baselines.json").read_text())
    assert scores["model"] < rows(trained / "heads", "train")[0]["bits_per_byte"]
    assert len((trained / "heads/samples.jsonl").read_text().splitlines()) == 3


def test_interrupted_and_run_again_is_the_run_that_nobody_touched(here, trained, monkeypatch, capsys):
    draw = lmlab.training.draw_samples

    def draw_then_stop(*args):
        draw(*args)
        signal.raise_signal(signal.SIGTERM)

    shutil.rmtree(here / "heads")
    with monkeypatch.context() as patch:
        patch.setattr(lmlab.training, "draw_samples", draw_then_stop)
        assert main(TRAIN) == 128 + signal.SIGTERM
    assert main(TRAIN) == 0
    assert "resuming at step 3" in capsys.readouterr().out
    assert rows(here / "heads", "train", "eval") == rows(trained / "heads", "train", "eval")
    assert (here / "heads/samples.jsonl").read_text() == (trained / "heads/samples.jsonl").read_text()
    chex.assert_trees_all_equal(load_heads(here / "heads").params, load_heads(trained / "heads").params)


def test_heads_draft_what_head_1_would_have_written(here, capsys):
    assert main(["generate", "heads", *GREEDY]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("abc")
    for words in (["1"], ["2"], ["2", "--verify", "block"]):
        assert main(["generate", "heads", *GREEDY, "--heads", *words]) == 0
        assert capsys.readouterr().out == plain


def test_how_drafts_are_kept_reaches_the_decoding(here, monkeypatch):
    asked = []
    for name in ("speculate", "self_speculate"):
        monkeypatch.setattr(
            lmlab.talk, name, lambda *args, **rest: asked.append(rest["verify"]) or Speculated([], 0, 0)
        )
    monkeypatch.setattr(lmlab.talk, "_texts", lambda *args: [""])
    words = ["--prompt", "a", "--verify", "block"]
    assert main(["generate", "heads", *words, "--heads", "2"]) == 0
    assert main(["generate", "out", *words, "--draft", "out"]) == 0
    assert asked == ["block", "block"]


def test_a_run_is_opened_as_its_first_head(here):
    every, run, model = load_heads(here / "heads"), load_run(here / "heads"), load_model(here / "heads")
    assert run.step == 6
    assert run.lm.config == model.config == replace(every.config.model, layers=2)
    chex.assert_trees_all_equal(run.params, drop_heads(every.params), model.params)
    tokens = jnp.arange(12).reshape(2, 6) + 97
    chex.assert_trees_all_close(
        model.lm.apply(model.params, tokens)[0], every.model.lm.apply(every.params, tokens)[0], atol=1e-5
    )
    opened = open_model(here / "heads", ExecutionConfig(), "float32")
    places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), run.params)
    chex.assert_trees_all_equal(opened.load(places), run.params)
    assert opened.config == run.lm.config


def test_eval_measures_all_heads_and_export_writes_the_first(here, capsys):
    assert main(["eval", "heads"]) == 0
    said = capsys.readouterr().out
    assert f"{json.loads((here / 'heads/baselines.json').read_text())['model']:.4f}" in said
    assert "loss/head_2" in said
    assert main(["eval", "heads", "--texts", "heads.py"]) == 0
    assert main(["convert", "heads", "exported"]) == 0
    exported, run = load_pretrained(here / "exported"), load_run(here / "heads")
    tokens = jnp.arange(12).reshape(2, 6) + 97
    for layers in (exported.config.layers, run.lm.config.layers):
        assert layers == 2
    chex.assert_trees_all_close(
        exported.lm.apply(exported.params, tokens)[0], run.lm.apply(run.params, tokens)[0], atol=1e-5
    )


def test_begun_from_a_model_and_run_again_without_it_it_is_the_same_run(here, monkeypatch, capsys):
    words = ["run", "heads.py", "--source", "out", "--train.sample-every", "0", "--eval.no-baselines", "--out"]
    assert main([*words, "whole"]) == 0
    save = lmlab.training.save

    def save_then_stop(*args):
        save(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lmlab.training, "save", save_then_stop)
        assert main([*words, "parts"]) == 128 + signal.SIGTERM
    shutil.rmtree(here / "out")
    assert main([*words, "parts"]) == 0
    assert "resuming at step 3" in capsys.readouterr().out
    assert rows(here / "parts", "train", "eval") == rows(here / "whole", "train", "eval")
    # What is asked for is still compared with what was begun.
    assert main([*words, "parts", "--model.width", "32"]) == 2
    assert "model.width was 16, now 32" in one_line(capsys)


@pytest.mark.parametrize(("chain", "layers"), [("parallel", "3"), ("linear", "2"), ("sequential", "2")])
def test_heads_are_added_to_a_model_that_has_one(here, chain, layers, capsys):
    assert main(["eval", "out"]) == 0
    wanted = rows(here / "out", "eval")[-1]
    words = ["run", "heads.py", "--source", "out", "--chain", chain, "--model.layers", layers, "--out", "added"]
    assert main([*words, "--eval.batches", "0", "--eval.no-baselines"]) == 0
    said = capsys.readouterr().out
    assert "from out" in said
    found = rows(here / "added", "eval")
    assert [row["step"] for row in found] == [0, 3, 6]
    # A row holds two tokens more here, so a last token or two of the text may be in one and not in the other.
    assert found[0]["loss/head_1"] == pytest.approx(wanted["loss"], rel=0.02)
    assert found[-1]["loss"] < found[0]["loss"]
    # And back: fine-tuned into one head, head 1 is where it was.
    again = ["run", "heads.py", "--source", "added", "--heads", "1", "--chain", "linear", "--model.layers", "2"]
    assert main([*again, "--out", "back", "--eval.batches", "0", "--eval.no-baselines"]) == 0
    assert rows(here / "back", "eval")[0]["loss"] == pytest.approx(found[-1]["loss/head_1"], rel=0.02)


def test_a_run_of_several_heads_is_fine_tuned_as_its_first(here):
    (here / "template.jinja").write_text(TEMPLATE)
    write_chats(here / "chats.jsonl", range(30))
    write_chats(here / "heldout.jsonl", range(30, 41))
    words = [*WORDS, "--source", "heads", "--template", "template.jinja", "--data.length", "32", "--out", "tuned"]
    assert sft(words) == 0
    tuned = load_run(here / "tuned")
    assert tuned.lm.config == load_run(here / "heads").lm.config
    assert [row["step"] for row in rows(here / "tuned", "eval")] == [0, 3, 6]
    assert not any(name.startswith("head_") for name in tuned.params)


def test_a_mesh_changes_no_number(here):
    mesh = ["--parallel.data", "2", "--parallel.fsdp", "2", "--parallel.tensor", "2"]
    short = ["--model.vocab-size", "260", "--train.steps", "2", "--train.eval-every", "2", "--train.sample-every", "0"]
    short += ["--eval.no-baselines"]
    assert main([*TRAIN[:-1], "mesh", *mesh, *short]) == main([*TRAIN[:-1], "one", *short]) == 0
    for one, other in zip(rows(here / "mesh", "train"), rows(here / "one", "train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "heads.py", "--heads", "3"], "heads = 3: expected less than model.layers = 3"),
        (["run", "heads.py", "--heads", "0"], "heads = 0: expected at least 1"),
        (["run", "heads.py", "--data.packing", "whole"], "data.packing = 'whole': expected concat or pad"),
        (["run", "heads.py", "--objective.head-weights", "1", "1", "1"], "a weight for each of the 2 heads"),
        (["run", "heads.py", "--source", "out", "--model.layers", "4"], "model.layers of head 1 = 3: expected 2"),
        (["run", "heads.py", "--source", "out", "--model.width", "32"], "model.width of head 1 = 32: expected 16"),
        (["run", "heads.py", "--source", "nowhere"], "nowhere"),
        (["generate", "heads", "--heads", "3"], "--heads = 3: expected 1 to 2"),
        (["generate", "heads", "--heads", "-1"], "--heads = -1: expected 1 to 2"),
        (["generate", "out", "--heads", "2"], "expected a run with several heads"),
        (["generate", "heads", "--heads", "2", "--draft", "out"], "neither --draft nor --chat"),
        (["grow", "out", "--to", "heads.py"], "only models of one head grow"),
        (["plan", "heads.py"], "expected a model of one head"),
    ],
)
def test_rude_input_gets_one_line_and_loses_nothing(here, words, said, capsys):
    before = contents(here)
    assert main([*words, *(["--out", "new"] if words[0] == "run" else [])]) == 2
    assert said in one_line(capsys)
    shutil.rmtree(here / "new", ignore_errors=True)
    assert contents(here) == before


def test_another_tokenizer_is_refused(here, capsys):
    recipe = (here / "heads.py").read_text().replace("DataConfig, Files", "DataConfig, Files, TrainedBPE")
    (here / "other.py").write_text(recipe.replace("length=16,", "length=16, tokenizer=TrainedBPE(vocab_size=257),"))
    assert main(["run", "other.py", "--source", "out", "--out", "new"]) == 2
    assert "data.tokenizer = 'another tokenizer'" in one_line(capsys)


def test_a_recipe_of_several_heads():
    recipe = MultiToken(model=tiny_config(layers=4, max_length=256), heads=3)
    assert recipe.several == MultiTokenConfig(tiny_config(layers=4, max_length=256), 3)
    assert replace(recipe, heads=1, data=replace(recipe.data, packing="whole")).heads == 1
    with pytest.raises(UserError, match="head_weights"):
        replace(recipe, objective=MultiTokenLossConfig(head_weights=(1.0,)))


@pytest.mark.parametrize("chain", ["parallel", "causal", "linear", "sequential"])
def test_further_heads_cost_their_unembeddings_and_what_is_beside_the_model(chain):
    config = MultiTokenConfig(tiny_config(layers=4), 3, chain)
    model = config.model
    own = {"linear": 6 * 16 * 16, "sequential": 6 * 2 * 16 * 16}.get(chain, 0)
    if chain == "sequential":
        own += training_flops_per_token(replace(model, layers=5), 8) - training_flops_per_token(model, 8)
    assert further_heads_flops_per_token(config, 8) == pytest.approx(2 * (own + 6 * 7 * 16))
    assert further_heads_flops_per_token(replace(config, heads=1), 8) == 0


def test_the_recipe_at_hand_is_one_of_four_heads():
    _, recipe = load_recipe(str(Path(__file__).resolve().parents[1] / "configs/multi_token.py"))
    assert (recipe.several.heads, recipe.several.first.layers) == (4, 9)
