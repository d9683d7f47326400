"""Fine-tuning from end to end: a tiny model on disk learns from conversations, is interrupted, exported, refused."""

import json
import shutil
import signal
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from tiny_run import contents, one_line, rows

import lmlab.training
from experiments.sft import main
from lmlab.cli import main as command
from lmlab.data.chat import ChatTemplate, encode_chat
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.interop.huggingface import save_pretrained
from lmlab.interop.pretrained import load_pretrained
from lmlab.interop.tokenizer_files import TokenizerFiles
from lmlab.loading import load_model
from lmlab.models.config import AttentionConfig, TransformerConfig
from lmlab.models.transformer import transformer
from lmlab.runs import load_run

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
WORDS = [
    "--source", "model", "--data.train", "chats.jsonl", "--data.heldout", "heldout.jsonl", "--data.length", "48",
    "--data.batch-size", "8", "--train.steps", "6", "--train.log-every", "1", "--train.eval-every", "3",
    "--train.sample-every", "3", "--train.checkpoint-every", "2", "--optim.schedule.peak", "1e-2", "--eval.batches",
    "0", "--eval.prompts", "say 3", "--eval.sampling.max-new-tokens", "4",
]  # fmt: skip


def write_chats(path: Path, numbers) -> list[dict]:
    chats = [{"prompt": f"say {i}", "completion": f"{i}{i}"} for i in numbers]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return chats


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A folder with "model", its conversations, the run "out" that nobody touched, and its export "hf"."""
    folder = tmp_path_factory.mktemp("tuned")
    config = TransformerConfig(vocab_size=260, layers=2, width=16, max_length=64, attention=AttentionConfig(heads=2))
    text = TokenizerFiles(byte_tokenizer(), ChatTemplate(TEMPLATE, {}), None)
    save_pretrained(folder / "model", config, transformer(config).init(jax.random.key(3)), text)
    write_chats(folder / "chats.jsonl", range(30))
    write_chats(folder / "heldout.jsonl", range(30, 41))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*WORDS, "--out", "out", "--export", "hf"]) == 0
    return folder


@pytest.fixture
def here(tuned, tmp_path, monkeypatch) -> Path:
    """A copy to work in."""
    shutil.copytree(tuned, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def held_out(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(run, "eval")}


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_the_run_begins_as_its_source_and_learns(tuned):
    losses = held_out(tuned / "out")
    assert list(losses) == [0, 3, 6]
    assert losses[6] < losses[3] < losses[0]
    drawn = samples(tuned / "out")
    assert [(row["step"], row["prompt"]) for row in drawn] == [(step, "u:say 3\na:") for step in (0, 3, 6)]
    assert (tuned / "out/report.html").is_file()

    # What was measured before the first step is the mean over the tokens of the answers, by the source as it is.
    model = load_pretrained(tuned / "model")
    nll, count = 0.0, 0
    for line in (tuned / "heldout.jsonl").read_text().splitlines():
        chat = json.loads(line)
        messages = [
            {"role": "user", "content": chat["prompt"]},
            {"role": "assistant", "content": chat["completion"]},
        ]
        ids_T, mask_T = encode_chat(model.text.chat, model.text.tokenizer, messages)
        assert mask_T.sum() == len(chat["completion"]) + 1
        hidden_1TD, _ = model.lm.apply(model.params, ids_T[None])
        logprobs_TV = jax.nn.log_softmax(model.lm.logits(model.params, hidden_1TD))[0]
        nll -= sum(float(logprobs_TV[t - 1, ids_T[t]]) for t in np.flatnonzero(mask_T))
        count += mask_T.sum()
    assert losses[0] == pytest.approx(nll / count, rel=1e-5)


def test_interrupted_and_run_again_without_its_source_it_is_the_same_run(here, tuned, monkeypatch, capsys):
    draw = lmlab.training.draw_samples

    def draw_then_stop(pieces, folder, say, step, params):
        draw(pieces, folder, say, step, params)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    words = [*WORDS, "--out", "again"]
    with monkeypatch.context() as patch:
        patch.setattr(lmlab.training, "draw_samples", draw_then_stop)
        assert main(words) == 128 + signal.SIGTERM
    # What it began as is needed no more.
    shutil.rmtree(here / "model")
    assert main(words) == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert rows(here / "again", "train", "eval") == rows(tuned / "out", "train", "eval")
    assert samples(here / "again") == samples(tuned / "out")
    chex.assert_trees_all_equal(load_run(here / "again").params, load_run(tuned / "out").params)


def test_killed_before_its_first_checkpoint_a_run_begins_anew(here, tuned):
    shutil.copytree(here / "out", here / "killed")
    shutil.rmtree(here / "killed/checkpoints")
    assert main([*WORDS, "--out", "killed"]) == 0
    assert rows(here / "killed", "train", "eval") == rows(tuned / "out", "train", "eval")
    assert samples(here / "killed") == samples(tuned / "out")


def test_a_mesh_changes_no_number(here, tuned):
    assert (
        main([*WORDS, "--out", "mesh", "--parallel.data", "2", "--parallel.fsdp", "2", "--parallel.tensor", "2"]) == 0
    )
    assert held_out(here / "mesh") == pytest.approx(held_out(tuned / "out"), rel=1e-4)


def test_master_weights_in_float32(here, tuned):
    assert main([*WORDS, "--out", "half", "--optim.parameters", "bfloat16_master"]) == 0
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(load_run(here / "half").params)} == {"bfloat16"}
    assert held_out(here / "half") == pytest.approx(held_out(tuned / "out"), rel=0.02)


def test_the_run_needs_no_source_and_its_export_is_the_same_model(here, capsys):
    shutil.rmtree(here / "model")
    run, exported = load_run(here / "out"), load_pretrained(here / "hf")
    chex.assert_trees_all_equal(exported.params, run.params)
    assert exported.config == run.config.model
    for text in (run.text, exported.text):
        assert (text.chat.source, text.chat.specials["eos_token"]) == (TEMPLATE, "<|endoftext|>")
        assert text.tokenizer.encode_marked("a<|endoftext|>")[0].tolist() == [97, 256]
    assert command(["eval", "out"]) == 0
    assert f"{held_out(here / 'out')[6]:.4f}" in capsys.readouterr().out
    words = ["--chat", "--prompt", "say 3", "--temperature", "0", "--max-new-tokens", "4"]
    said = []
    for model in ("out", "hf"):
        assert command(["generate", model, *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_tuned_run_can_be_tuned_again(here):
    words = ["out" if word == "model" else word for word in WORDS]
    assert main([*words, "--out", "second"]) == 0
    assert held_out(here / "second")[0] == pytest.approx(held_out(here / "out")[6], rel=1e-6)


def test_a_pretrained_run_is_given_a_template(here, finished):
    shutil.copytree(finished / "out", here / "base")
    (here / "chat.jinja").write_text(TEMPLATE)
    words = ["base" if word == "model" else word for word in WORDS]
    # Its rows hold 32 tokens.
    assert main([*words, "--template", "chat.jinja", "--data.length", "32", "--out", "chat"]) == 0
    losses = held_out(here / "chat")
    assert losses[6] < losses[0]
    assert load_model(here / "chat").text.chat.source == TEMPLATE


RUDE = [
    ("no such source", ("nowhere", "config.json"), ("--source", "nowhere")),
    ("no template", ("chat template", "--template"), ("--source", "mute")),
    ("no tokenizer", ("tokenizer",), ("--source", "bare")),
    ("no such template", ("template", "nowhere.jinja"), ("--template", "nowhere.jinja")),
    ("a template that is none", ("chat_template", "line 1"), ("--template", "broken.jinja")),
    ("a tokenizer larger than the embedding", ("tokenizer", "261", "260"), ("--source", "larger")),
    ("damaged weights", ("cut", "safetensors"), ("--source", "cut")),
    ("no data", ("nowhere*.jsonl", "at least one file"), ("--data.train", "nowhere*.jsonl")),
    ("nothing of the assistant", ("asked.jsonl:1", "assistant"), ("--data.train", "asked.jsonl")),
    ("rows longer than the context", ("data.length = 65", "64"), ("--data.length", "65")),
    ("another source", ("source was 'model', now 'hf'",), ("--source", "hf", "--out", "out")),
    ("another template", ("template was ''",), ("--template", "other.jinja", "--out", "out")),
    ("layers apart", ("execution.stacked",), ("--execution.no-stacked",)),
    ("a place for the export that is taken", ("folder", "model", "empty"), ("--export", "model")),
    ("an export of a job", ("--export", "lmlab convert"), ("--export", "new", "--hosts.address", "auto")),
]


@pytest.mark.parametrize(("name", "said", "words"), RUDE, ids=[case[0] for case in RUDE])
def test_rude_input_gets_one_line_and_loses_nothing(name, said, words, here, capsys):
    for copy in ("mute", "bare", "larger", "cut"):
        shutil.copytree("model", copy)
    Path("mute/chat_template.jinja").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path("bare") / file).unlink()
    tokenizer = json.loads(Path("larger/tokenizer.json").read_text())
    end = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [end | {"id": i, "content": f"<|{i}|>"} for i in range(257, 261)]
    Path("larger/tokenizer.json").write_text(json.dumps(tokenizer))
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    Path("broken.jinja").write_text("{% for %}")
    Path("other.jinja").write_text(f"chat\n{TEMPLATE}")
    Path("asked.jsonl").write_text('{"messages": [{"role": "user", "content": "say 3"}]}\n')
    before = contents(Path())
    assert main([*WORDS, "--out", "new", *words]) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == [], line
    assert contents(Path()) == before
