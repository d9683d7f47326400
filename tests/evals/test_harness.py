"""Tasks of lm-evaluation-harness run in process, on what its own model would be asked and answer."""

import gzip
import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks.harness import DATA, commonsense_qa, main, run_task
from lmlab.core.errors import UserError
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.evals.choices import Question, answer_choices
from lmlab.evals.harness import (
    Served,
    chat_text,
    generations,
    harness_model,
    loglikelihoods,
    rolling_loglikelihoods,
    sampling_config,
)
from lmlab.inference.config import SamplingConfig
from lmlab.inference.score import rolling, score
from lmlab.inference.text import sample_text
from lmlab.testing.tiny import lively, tiny_lm

LM = tiny_lm(vocab_size=257, max_length=256)
PARAMS = lively(jax.jit(LM.init)(jax.random.key(0)))
CODEC = byte_tokenizer()
SERVED = Served(LM, PARAMS, CODEC)
NO_BEGIN = replace(CODEC, begin_ids=())


def ids(text):
    return np.asarray([256, *text.encode()], np.int32)


def scored(*pairs):
    return [(pytest.approx(one.total, abs=1e-4), one.greedy) for one in score(LM, PARAMS, pairs)]


def test_contexts_are_cut_at_blanks_and_begin_as_texts_do():
    texts = [("ab ", "c"), ("ab", " c"), ("", "abc"), (" ", "x")]
    wanted = scored((ids("ab"), ids(" c")[1:]), (ids("ab"), ids(" c")[1:]), (ids(""), ids("abc")[1:]),
                    (ids(""), ids(" x")[1:]))  # fmt: skip
    assert loglikelihoods(SERVED, texts) == wanted


def test_the_prefix_stands_where_a_text_has_no_context():
    plain = Served(LM, PARAMS, NO_BEGIN, prefix_id=7)
    a = np.asarray([7], np.int32)
    assert loglikelihoods(plain, [("", "bc"), ("", "\x07c")]) == scored((a, ids("bc")[1:]), (a, ids("c")[1:]))
    assert rolling_loglikelihoods(plain, ["bc"])[0] == scored((a, ids("bc")[1:]))[0][0]


def test_long_contexts_lose_their_beginning(caplog):
    long = "x" * 300 + "abc"
    (found,) = loglikelihoods(SERVED, [(long, "def")])
    assert found == scored((ids(long)[-254:], ids("def")[1:]))[0]
    assert "cut to its last 254" in caplog.text
    with pytest.raises(UserError, match="continuation"):
        loglikelihoods(SERVED, [("a", "x" * 300)])


def test_texts_are_scored_in_windows_and_empty_ones_are_certain():
    texts = ["", "ab", "x" * 600]
    # As HFLM: what the tokenizer puts in front of a text is scored after the prefix.
    windows = [rolling(ids(text), [256], 256) for text in texts[1:]]
    wanted = [sum(one.total for one in score(LM, PARAMS, pairs)) for pairs in windows]
    found = rolling_loglikelihoods(SERVED, texts)
    scored_begin = score(LM, PARAMS, [(ids(""), ids(""))])[0].total
    assert found == pytest.approx([scored_begin, *wanted], rel=1e-5)


def test_generations_stop_where_the_task_says():
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    contexts = ["ab", "longer text", "c"]
    wanted = [text for text, _ in sample_text(LM, PARAMS, CODEC, contexts, jax.random.key(0), greedy)]
    task = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    assert generations(SERVED, [(context, task) for context in contexts]) == wanted
    stop = wanted[1][3:5]
    found = generations(SERVED, [("c", task), ("longer text", {**task, "until": [stop]})])
    assert found == [wanted[2], wanted[1][: wanted[1].index(stop)]]
    # A context is cut on the left to leave room for what is to be written.
    long, size = "y" * 300 + "longer text", {**task, "max_gen_toks": 200}
    assert generations(SERVED, [(long, size)]) == generations(Served(LM, PARAMS, NO_BEGIN), [(long[-56:], size)])
    with pytest.raises(UserError, match="max_gen_toks"):
        generations(SERVED, [("a", {**task, "max_gen_toks": 256})])


ARGUMENTS = [
    ({"until": "\n\n", "max_gen_toks": 5}, SamplingConfig(temperature=0.0, max_new_tokens=5, stop=("\n\n",))),
    ({"until": ["a", ""], "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "do_sample": True},
     SamplingConfig(temperature=0.5, top_p=0.9, max_new_tokens=7, stop=("a",))),
    ({"temperature": 0.5, "max_tokens": 3, "max_gen_toks": 4}, SamplingConfig(temperature=0.5, max_new_tokens=4)),
    ({"do_sample": False, "temperature": 1.0, "top_k": 3, "num_beams": 1}, SamplingConfig(temperature=0.0)),
    ({"do_sample": None, "until": None}, SamplingConfig(temperature=0.0)),
    ({"do_sample": True}, SamplingConfig(temperature=1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "config"), ARGUMENTS)
def test_the_arguments_of_tasks_are_read(arguments, config):
    assert sampling_config(arguments) == config


@pytest.mark.parametrize(("arguments", "config"), ARGUMENTS)
def test_the_harness_reads_its_arguments_so_too(arguments, config):
    utils = pytest.importorskip("lm_eval.models.utils", reason="needs lm_eval")
    read = utils.normalize_gen_kwargs({name: value for name, value in arguments.items() if value is not None}, 256)
    assert read["max_gen_toks"] == config.max_new_tokens
    assert tuple(text for text in read["until"] if text) == config.stop
    assert read["do_sample"] == (config.temperature > 0)
    assert read.get("temperature", 1.0 if read["do_sample"] else 0.0) == config.temperature


def test_arguments_that_we_cannot_serve_are_named():
    with pytest.raises(UserError, match="num_beams"):
        sampling_config({"num_beams": 4})


def test_chats_end_with_what_is_to_be_continued():
    def render(messages, prompt):
        return "".join(f"<{one['role']}>{one['content']}</>\n" for one in messages) + ("<bot>" if prompt else "")

    served = Served(LM, PARAMS, CODEC, render)
    messages = [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "So "}]
    assert chat_text(served, messages[:1], True) == "<user>Hi</>\n<bot>"
    assert chat_text(served, messages, False) == "<user>Hi</>\n<bot>So"
    with pytest.raises(UserError, match="chat template"):
        chat_text(SERVED, messages, True)


def test_without_the_harness_one_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    with pytest.raises(UserError, match=r"pip install 'lmlab\[harness\]'"):
        harness_model(SERVED)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing kept outside of the test."""
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    pytest.importorskip("datasets", reason="needs datasets")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    return tmp_path


QUESTION = {"question": "Where do fish live?", "choices": dict(zip("ABCDE", ["sea", "a tree", "Mars", "x", "ink"],
            strict=True)), "answer": "A"}  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_multiple_choice_of_a_local_file_is_what_our_own_evaluation_finds(offline):
    if not DATA.is_file():
        pytest.skip("needs CommonsenseQA of the development data")
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines][:200]
    found = run_task(harness_model(SERVED), commonsense_qa(DATA, offline), limit=200)
    questions = [
        Question(f"Question: {one['question']}\nAnswer:", tuple(one["choices"].values()), "ABCDE".index(one["answer"]))
        for one in records
    ]
    ours = answer_choices(LM, PARAMS, CODEC, questions)
    for name in ("acc", "acc_norm"):
        assert found["results"][f"{name},none"] == pytest.approx(ours.values[name])
        assert found["results"][f"{name}_stderr,none"] == pytest.approx(ours.values[f"{name}_stderr"])
    logprobs = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in found["samples"]]
    np.testing.assert_allclose(logprobs, np.stack(ours.logprobs), atol=1e-4)


@pytest.mark.filterwarnings("default")
def test_gsm8k_of_a_local_file_is_generated_until(offline):
    path = DATA.parents[1] / "math" / "gsm8k_test.jsonl.gz"
    if not path.is_file():
        pytest.skip("needs GSM8K of the development data")
    task = {
        "task": "gsm8k_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(offline)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    found = run_task(harness_model(SERVED), task, limit=3)
    assert found["results"]["exact_match,none"] == 0
    texts = [sample["resps"][0][0] for sample in found["samples"]]
    arguments = {"until": ["Question:"], "do_sample": False, "max_gen_toks": 8}
    contexts = [f"Question: {sample['doc']['question']}\nAnswer:" for sample in found["samples"]]
    assert texts == generations(SERVED, [(context, arguments) for context in contexts])


def test_the_benchmark_says_what_it_needs(capsys, tmp_path):
    for argv, wrong in (([str(tmp_path)], "folder"), ([str(tmp_path), "--items", "0"], "--items")):
        if wrong != "folder":
            (tmp_path / "config.json").write_text("{}")
            (tmp_path / "data.jsonl").write_text(json.dumps(QUESTION))
            argv += ["--data", str(tmp_path / "data.jsonl")]
        assert main(argv) == 2
        assert wrong in capsys.readouterr().err
