"""The commands that take any model: a run, its export, and what is wrong with the others."""

import importlib.util
import itertools
import shutil
from pathlib import Path

import jax
import pytest
from tiny_run import contents, one_line

from lmlab.cli import main
from lmlab.core.errors import UserError
from lmlab.evaluation import evaluate_texts
from lmlab.inference.config import SamplingConfig
from lmlab.inference.text import sample_texts
from lmlab.interop.pretrained import tokenizer_of
from lmlab.loading import export, load_model
from lmlab.talk import talk

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
GREEDY = ("--temperature", "0", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def folders(finished, tmp_path_factory) -> Path:
    """A folder with the run "out", its export "hf", and "chat", which has a template besides."""
    here = tmp_path_factory.mktemp("models")
    shutil.copytree(finished / "out", here / "out")
    export(here / "out", here / "hf")
    shutil.copytree(here / "hf", here / "chat")
    (here / "chat/chat_template.jinja").write_text(TEMPLATE)
    return here


@pytest.fixture
def here(folders, monkeypatch) -> Path:
    monkeypatch.chdir(folders)
    return folders


def printed(capsys, *words):
    assert main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_a_run_and_its_export_say_the_same(here, capsys, tmp_path):
    prompts = ("--prompt", "abc", "", "--seed", "3", "--max-new-tokens", "12")
    said = printed(capsys, "generate", "out", *prompts)
    assert said.startswith("abc")
    assert printed(capsys, "generate", "hf", *prompts) == said
    printed(capsys, "convert", "hf", str(tmp_path / "again"))
    files = {path.name: path.read_bytes() for path in (here / "hf").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


def test_samples_of_a_prompt_differ(here, capsys):
    said = printed(capsys, "generate", "hf", "--prompt", "abc", "--samples", "3", "--max-new-tokens", "5")
    assert len(set(said.split("abc")[1:])) > 1


def test_a_draft_changes_nothing_of_what_is_most_probable(here, capsys):
    plain = printed(capsys, "generate", "hf", "--prompt", "abc 1", *GREEDY)
    assert printed(capsys, "generate", "hf", "--draft", "out", "--prompt", "abc 1", *GREEDY) == plain


def test_texts_are_measured(here, capsys, tmp_path):
    (tmp_path / "text").write_text("abc 1 abc 1 abc 1")
    lines = printed(capsys, "eval", "hf", "--texts", str(tmp_path / "text")).splitlines()
    values = {line.split()[-2]: float(line.split()[-1]) for line in lines}
    assert set(values) == {"nll", "perplexity", "bits_per_byte"}
    assert 0 < values["bits_per_byte"] < 8.5


def test_a_chat_remembers_what_was_said(here):
    seen, said = [], []
    model = load_model(here / "chat")
    lines = iter(["abc", "1", "/new", "2", None])

    def remember(text):
        said.append(text)

    def ask():
        seen.append("".join(said))
        return next(lines)

    config = SamplingConfig(temperature=0, max_new_tokens=4)
    talk(model, (), "sys", jax.random.key(0), config, ask, remember)
    assert next(lines, "end") == "end"
    answers = [after[len(before) :] for before, after in itertools.pairwise(seen)]
    assert [answer.endswith("\n") for answer in answers] == [True, True, False, True]
    # The second answer follows from all that was said, and only from that.
    asked = [f"s:sys;u:abc;a:{answers[0][:-1]};u:1;a:", "s:sys;u:2;a:"]
    codec = tokenizer_of(model)
    prompts = [codec.encode_marked(text)[0] for text in asked]
    expected = sample_texts(model.lm, model.params, codec, prompts, jax.random.key(0), config)
    assert [text + "\n" for text, _ in expected] == [answers[1], answers[3]]


def test_a_chat_that_fills_the_context_goes_on_without_the_last_line(here):
    said = []
    lines = iter(["abc" * 30, "a", ""])
    config = SamplingConfig(temperature=0, max_new_tokens=4)
    talk(load_model(here / "chat"), (), "", jax.random.key(0), config, lambda: next(lines), said.append)
    assert "less than model.max_length = 32" in "".join(said)
    assert "/new" in "".join(said)
    assert said[-1] == "\n"


def test_an_answer_can_be_cut_short(here):
    said = []

    def say(text):
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    lines = iter(["a", None])
    talk(
        load_model(here / "chat"),
        (),
        "",
        jax.random.key(0),
        SamplingConfig(max_new_tokens=16),
        lambda: next(lines),
        say,
    )
    assert said[-2:] == [" ...", "\n"]


def test_chat_from_the_command_line(here, capsys):
    said = printed(capsys, "generate", "chat", "--chat", "--prompt", "abc", "1", *GREEDY)
    assert said.count("\n") >= 2


RUDE = [
    ("no such model", ("config.json", ".gguf"), ("generate", "nowhere")),
    ("no model of any kind", ("config.json",), ("convert", "empty", "target")),
    ("no chat template", ("chat template",), ("generate", "hf", "--chat", "--prompt", "a")),
    ("a prompt that fills the context", ("prompt", "max_length = 32"), ("generate", "hf", "--prompt", "abcd" * 20)),
    ("a template that raises", ("no system",), ("generate", "strict", "--chat", "--system", "s", "--prompt", "a")),
    ("a target that is not empty", ("chat",), ("convert", "hf", "chat")),
    ("a run as the target", ("out",), ("convert", "hf", "out")),
    ("samples", ("samples", "0"), ("generate", "hf", "--samples", "0")),
    ("no text to measure", ("UTF-8", "nowhere"), ("eval", "hf", "--texts", "nowhere")),
    ("a draft beside a chat", ("--draft",), ("generate", "chat", "--chat", "--draft", "hf", "--prompt", "a")),
    ("a task that is no file", ("nowhere.yaml",), ("eval", "hf", "--tasks", "nowhere.yaml")),
    ("held-out text of a model that was not trained here", ("run folder",), ("eval", "hf")),
    ("a truncated shard", ("model.safetensors",), ("generate", "cut")),
]


@pytest.mark.parametrize(("name", "said", "words"), RUDE, ids=[case[0] for case in RUDE])
def test_rude_input_gets_one_line(name, said, words, here, tmp_path, monkeypatch, capsys):
    shutil.copytree(here, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    Path("empty").mkdir()
    shutil.copytree("chat", "strict")
    Path("strict/chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}" + TEMPLATE
    )
    shutil.copytree("hf", "cut")
    weights = Path("cut/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    before = contents(Path())
    assert main(list(words)) == 2
    line = one_line(capsys)
    assert [part for part in said if part not in line] == [], line
    assert contents(Path()) == before


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_want_the_harness(here, capsys):
    assert main(["eval", "hf", "--tasks", "gsm8k"]) == 2
    assert "lmlab[harness]" in one_line(capsys)


def test_a_model_without_a_tokenizer_says_so(here, tmp_path):
    shutil.copytree("hf", tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        evaluate_texts(tmp_path / "bare", [__file__], "float32")
