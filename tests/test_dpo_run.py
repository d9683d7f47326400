"""Preference learning from end to end: a tiny model learns from pairs, is interrupted, exported, refused."""

import json
import shutil
import signal
from pathlib import Path
from typing import get_args

import chex
import jax
import numpy as np
import pytest
from tiny_run import contents, one_line, rows

import lmlab.training
from experiments import sft
from experiments.dpo import main
from lmlab.cli import main as command
from lmlab.data.chat import ChatTemplate
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.loading import load_model
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.objectives import pair_losses
from lmlab.objectives.config import PairLossConfig, PairLossName
from lmlab.objectives.pair_losses import PairScores
from lmlab.preference import build_pair_loss
from lmlab.runs import load_run, load_whole

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
WORDS = [
    "--source", "model", "--data.train", "pairs.jsonl", "--data.heldout", "heldout.jsonl", "--data.length", "32",
    "--data.batch-size", "8", "--train.steps", "6", "--train.log-every", "1", "--train.eval-every", "3",
    "--train.sample-every", "3", "--train.checkpoint-every", "2", "--optim.schedule.peak", "1e-2", "--eval.batches",
    "0", "--eval.prompts", "say 3", "--eval.sampling.max-new-tokens", "4",
]  # fmt: skip
LORA = ["--lora.rank", "2", "--optim.schedule.peak", "3e-2"]


def write_pairs(path: Path, numbers) -> None:
    pairs = [{"prompt": f"say {i}", "chosen": f"{i}!", "rejected": f"{i}?"} for i in numbers]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with "model", its pairs, the run "out" that nobody touched, and its export "hf"."""
    folder = tmp_path_factory.mktemp("preferred")
    config = TransformerConfig(vocab_size=260, layers=2, width=16, max_length=64, attention=AttentionConfig(heads=2))
    text = TokenizerFiles(byte_tokenizer(), ChatTemplate(TEMPLATE, {}), None)
    save_pretrained(folder / "model", config, transformer(config).init(jax.random.key(3)), text)
    write_pairs(folder / "pairs.jsonl", range(30))
    write_pairs(folder / "heldout.jsonl", range(30, 41))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--out", "out", "--export", "hf"]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> Path:
    """A copy to work in."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def held_out(run: Path, key: str = "loss") -> dict[int, float]:
    return {row["step"]: row[key] for row in rows(run, "eval")}


def test_the_run_begins_at_its_reference_and_learns_what_is_preferred(trained):
    losses, accuracies = held_out(trained / "out"), held_out(trained / "out", "accuracy")
    assert list(losses) == [0, 3, 6]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert accuracies[0] == 0.5
    assert losses[6] < losses[3] < losses[0]
    assert accuracies[6] == 1
    assert (trained / "out/report.html").is_file()
    config = json.loads((trained / "hf/config.json").read_text())
    assert config["model_type"] == "llama"


def test_an_exported_run_is_the_run(trained):
    run, exported = load_run(trained / "out"), load_model(trained / "hf")
    chex.assert_trees_all_close(run.params, exported.params, atol=1e-6)


def test_a_reference_beside_and_adapters_learn_too(here):
    beside = [*WORDS, "--loss.reference", "beside", "--train.steps", "3"]
    assert main([*beside, "--out", "beside"]) == 0
    stored = held_out(here / "out")
    # Warm-up and decay depend on the length of the run, so that only the first values have to agree.
    assert held_out(here / "beside")[0] == pytest.approx(stored[0], abs=1e-6)
    source = load_model(here / "model")
    whole = load_whole(here / "beside")
    chex.assert_trees_all_equal(whole.params["reference"], source.params)
    assert "reference" not in load_run(here / "beside").params

    assert main([*WORDS, *LORA, "--loss.reference", "beside", "--out", "lora", "--export", "merged"]) == 0
    losses = held_out(here / "lora")
    assert losses[6] < losses[0] - 0.01
    whole, merged = load_whole(here / "lora").params, load_model(here / "merged").params
    chex.assert_trees_all_equal({name: whole[name] for name in source.params}, source.params)
    change = np.asarray(merged["layers"]["mlp"]["down"]["kernel"] - source.params["layers"]["mlp"]["down"]["kernel"])
    assert np.linalg.matrix_rank(change, rtol=1e-4).tolist() == [2, 2]


def test_a_run_with_adapters_is_a_source_like_any_other(here):
    first = [*WORDS, *LORA, "--train.steps", "2"]
    assert main([*first, "--out", "first"]) == 0
    again = [*WORDS, "--source", "first", "--train.steps", "2"]
    assert main([*again, "--out", "second"]) == 0
    begun = load_run(here / "first").params
    assert held_out(here / "second")[0] == pytest.approx(np.log(2), abs=1e-6)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), begun, load_run(here / "second").params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_pairs_that_changed_while_the_run_stood_are_told(here, capsys):
    longer = [*WORDS, "--out", "short", "--train.steps", "3"]
    assert main(longer) == 0
    write_pairs(here / "pairs.jsonl", range(1, 31))
    assert main(longer) == 2
    assert "the pairs and the tokenizer" in one_line(capsys)


def test_a_folder_of_another_run_is_left_as_it_is(here, capsys):
    (here / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    words = [word.replace("pairs.jsonl", "chats.jsonl").replace("heldout.jsonl", "chats.jsonl") for word in WORDS]
    words[words.index("--data.heldout") : words.index("--data.heldout") + 2] = []
    (here / "more.jsonl").write_text("".join(f'{{"prompt": "{i}", "completion": "b"}}\n' for i in range(60)))
    words[words.index("--data.train") + 1] = "more.jsonl"
    assert sft.main([*words, "--out", "sft", "--train.steps", "1"]) == 0
    before = contents(here / "sft")
    assert main([*WORDS, "--out", "sft"]) == 2
    one_line(capsys)
    assert contents(here / "sft") == before


SCORES = PairScores(*(jax.numpy.asarray([x]) for x in (-10.0, -12.0, -11.0, -11.5, 4.0, 5.0)))
OPTIONS = {"robust": {"smoothing": 0.2}, "exo_pair": {"smoothing": 0.1}, "simpo": {"gamma": 0.5}}
FREE = {name: {"reference": "uniform"} for name in ("simpo", "cpo", "orpo")}


@pytest.mark.parametrize("name", get_args(PairLossName))
def test_every_loss_that_a_recipe_names_is_the_function_of_that_name(name):
    options = OPTIONS.get(name, {})
    found = build_pair_loss(PairLossConfig(loss=name, **options, **FREE.get(name, {})))(SCORES, 0.1)
    words = {"flips" if name == "robust" and key == "smoothing" else key: value for key, value in options.items()}
    chex.assert_trees_all_equal(found, getattr(pair_losses, name)(SCORES, 0.1, **words))


def test_divergences_are_of_whole_answers_and_come_before_means():
    found = build_pair_loss(PairLossConfig(divergence="jensen_shannon", per_token=True))(SCORES, 0.1)
    ratios = pair_losses.jensen_shannon(SCORES.chosen_ratio) / 4, pair_losses.jensen_shannon(SCORES.rejected_ratio) / 5
    chex.assert_trees_all_close(found, -jax.nn.log_sigmoid(0.1 * (ratios[0] - ratios[1])), rtol=1e-6)


def test_a_loss_without_a_reference_runs(here):
    words = ["--loss.loss", "orpo", "--loss.reference", "uniform", "--loss.sft", "1", "--train.steps", "2"]
    assert main([*WORDS, *words, "--out", "orpo"]) == 0
    assert not (here / "orpo/reference.npz").exists()


def test_adapters_fine_tune_on_conversations(here):
    chats = [{"prompt": f"say {i}", "completion": f"{i}{i}"} for i in range(30)]
    (here / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    words = [word.replace("pairs.jsonl", "chats.jsonl").replace("heldout.jsonl", "chats.jsonl") for word in WORDS]
    words[words.index("--data.heldout") : words.index("--data.heldout") + 2] = ["--data.heldout-percent", "20"]
    assert sft.main([*words, *LORA, "--out", "sft", "--export", "tuned"]) == 0
    losses = held_out(here / "sft")
    assert losses[6] < losses[0]
    chex.assert_trees_all_close(load_run(here / "sft").params, load_model(here / "tuned").params, atol=1e-6)


@pytest.mark.parametrize("more", [[], ["--loss.reference", "beside"], LORA], ids=str)
def test_stopped_and_run_again_without_its_source_it_is_the_same_run(here, more, monkeypatch):
    assert main([*WORDS, *more, "--out", "whole"]) == 0
    original, calls = lmlab.training.make_held_out, []

    def stopping(*args):
        evaluate = original(*args)

        def stop(params):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
            return evaluate(params)

        return stop

    monkeypatch.setattr(lmlab.training, "make_held_out", stopping)
    assert main([*WORDS, *more, "--out", "parts"]) == 143
    monkeypatch.undo()
    monkeypatch.chdir(here)
    shutil.rmtree(here / "model")
    assert main([*WORDS, *more, "--out", "parts"]) == 0
    assert rows(here / "parts", "train", "eval") == rows(here / "whole", "train", "eval")
    chex.assert_trees_all_equal(load_whole(here / "parts").params, load_whole(here / "whole").params)


def test_eval_finds_what_the_run_found(here, capsys):
    assert command(["eval", "out"]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert float(told["loss"]) == pytest.approx(held_out(here / "out")[6], abs=1e-3)
    assert float(told["accuracy"]) == 1


RUDE = {
    "loss.beta": (["--loss.beta", "0"], "loss.beta = 0"),
    "smoothing": (["--loss.smoothing", "0.7"], "loss.smoothing = 0.7"),
    "smoothing of another loss": (["--loss.loss", "hinge", "--loss.smoothing", "0.1"], "loss.smoothing = 0.1"),
    "exo": (["--loss.loss", "exo_pair"], "loss.smoothing = 0.0"),
    "robust against nothing": (["--loss.loss", "robust"], "loss.smoothing = 0.0"),
    "a margin of no use": (["--loss.gamma", "3"], "loss.gamma = 3"),
    "means of means": (["--loss.loss", "simpo", "--loss.per-token", "--loss.reference", "uniform"], "loss.per_token"),
    "a reference that is not read": (["--loss.loss", "cpo"], "loss.reference = 'stored'"),
    "rank": (["--lora.rank", "-1"], "lora.rank = -1"),
    "no file": (["--data.train", "nowhere.jsonl"], "nowhere.jsonl"),
    "no source": (["--source", "nowhere"], "nowhere"),
    "length": (["--data.length", "65"], "data.length = 65"),
    "microbatches": (["--train.microbatches", "3"], "train.microbatches = 3"),
    "adapters of nothing": (["--lora.rank", "2", "--lora.include", "xyz"], "matrices"),
    "template": (["--template", "nowhere.jinja"], "nowhere.jinja"),
    "layout of another run": (["--out", "out", "--data.layout", "apart"], "data.layout"),
    "export over files": (["--export", "model"], "model"),
}


@pytest.mark.parametrize("name", RUDE)
def test_rude_input_gets_one_message(here, name, capsys):
    words, told = RUDE[name]
    before = contents(here / "out")
    assert main([*WORDS, "--out", "new", *words]) == 2
    assert told in one_line(capsys)
    assert contents(here / "out") == before


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "dropped"),
        ({"prompt": "q", "chosen": "", "rejected": "x"}, "pairs.jsonl:1"),
        ({"prompt": "q", "chosen": "x"}, "pairs.jsonl:1"),
        ({"prompt": "q", "chosen": "x" * 80, "rejected": "y"}, "dropped"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "weight": -3}, "pairs.jsonl:1"),
        ("text", "pairs.jsonl:1"),
    ],
    ids=str,
)
def test_pairs_that_cannot_be_used_are_told(here, record, told, capsys):
    (here / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    assert main([*WORDS, "--out", "new"]) == 2
    assert told in one_line(capsys)


def test_a_damaged_reference_is_told(here, capsys):
    (here / "out/reference.npz").write_bytes(b"rubbish")
    assert main([*WORDS, "--out", "out"]) == 2
    assert "reference.npz" in one_line(capsys)
