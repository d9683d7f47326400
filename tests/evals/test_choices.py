"""Multiple choice picks by the model's own log-probabilities, and counts as lm-evaluation-harness counts."""

import math

import jax
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.data.tokenizers import byte_tokenizer
from lmlab.evals.choices import Question, answer_choices
from lmlab.evals.generation import exact_match, generate_and_check
from lmlab.evals.pairs import encode_pairs
from lmlab.evals.perplexity import text_values
from lmlab.inference.config import SamplingConfig
from lmlab.testing.tiny import lively, tiny_lm

LM = tiny_lm(vocab_size=257, max_length=64)
PARAMS = lively(jax.jit(LM.init)(jax.random.key(0)))
CODEC = byte_tokenizer()


@jax.jit
def all_logprobs(row_T):
    hidden_BTD, _ = LM.apply(PARAMS, row_T[None])
    return jax.nn.log_softmax(LM.logits(PARAMS, hidden_BTD))[0]


def logprob_of(ids, prompt):
    """log p(the ids after the first `prompt` | those), by one full pass; of one shape, so one compilation."""
    read = np.asarray(ids[:-1], np.int32)
    logprobs_TV = np.asarray(all_logprobs(np.pad(read, (0, LM.max_length - len(read)))))
    return float(sum(logprobs_TV[i - 1, ids[i]] for i in range(prompt, len(ids))))


def logprob(context, continuation):
    """Of text after the token that begins texts; blanks at the end of the context belong to the continuation."""
    return logprob_of([256, *(context + continuation).encode()], 1 + len(context.rstrip().encode()))


QUESTIONS = [
    Question("one", ("aé", "b", "ccc"), 0), Question("two ", ("dd", "éé"), 1), Question("three", ("e", "fff", "g"), 1),
    Question("one", ("漢", "hi"), 1),
]  # fmt: skip


def test_the_choice_of_most_probability_is_taken():
    found = answer_choices(LM, PARAMS, CODEC, QUESTIONS)
    wanted = [[logprob(one.context, " " + choice) for choice in one.choices] for one in QUESTIONS]
    for got, values in zip(found.logprobs, wanted, strict=True):
        np.testing.assert_allclose(got, values, atol=1e-4)
    measures = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    for name, measure in measures.items():
        right = [
            max(range(len(one.choices)), key=lambda i: values[i] / measure(one.choices[i])) == one.answer
            for one, values in zip(QUESTIONS, wanted, strict=True)
        ]
        assert found.values[name] == np.mean(right)
        assert found.values[f"{name}_stderr"] == pytest.approx(np.std(right, ddof=1) / 2)


def test_an_empty_context_is_the_beginning_of_a_text():
    (logprobs,) = answer_choices(LM, PARAMS, CODEC, [Question("", ("ab", "c"), 0)]).logprobs
    np.testing.assert_allclose(logprobs, [logprob("", " ab"), logprob("", " c")], atol=1e-4)


def test_questions_that_have_no_answer_are_refused():
    for choices, answer in ((("a",), 1), (("a", ""), 0), ((), 0)):
        with pytest.raises(UserError, match=r"answer|choices"):
            Question("q", choices, answer)
    with pytest.raises(UserError, match="questions"):
        answer_choices(LM, PARAMS, CODEC, [])


def test_blanks_before_the_cut_belong_to_the_continuation():
    pairs = encode_pairs(lambda texts: [np.asarray([ord(x) for x in text]) for text in texts], (9,), [
        ("a ", "b"), ("a", " b"), ("a  ", "c"), ("", "a"), ("a", "b")])  # fmt: skip
    assert [(bytes(context[1:].tolist()), bytes(rest.tolist())) for context, rest in pairs] == [
        (b"a", b" b"), (b"a", b" b"), (b"a", b"  c"), (b"", b"a"), (b"a", b"b")]  # fmt: skip
    assert all(context[0] == 9 for context, _ in pairs)


@pytest.mark.parametrize("stride", [0, 20])
def test_texts_longer_than_the_context_are_scored_window_by_window(stride):
    texts = ["", "short é", "x" * 150]
    values = text_values(LM, PARAMS, CODEC, texts, stride=stride)
    nats = -logprob("", texts[1])
    row = [256, *texts[2].encode()]
    done = 1
    while done < len(row):
        stop = min(len(row), 65 if done == 1 else done + (stride or 64))
        start = max(0, stop - 65)
        nats -= logprob_of(row[start:stop], done - start)
        done = stop
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / (8 + 150), rel=1e-5)
    # One token a byte.
    assert values["nll"] == pytest.approx(nats / 158, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(nats / 158), rel=1e-4)
    with pytest.raises(UserError, match="texts"):
        text_values(LM, PARAMS, CODEC, [""])


def test_generations_are_checked_record_by_record():
    records = [{"q": "ab", "a": 0}, {"q": "c", "a": 1}]
    seen = []

    def check(text, record):
        seen.append((text, record["q"]))
        return len(seen) % 2 == 1 and record["a"] == 1

    config = SamplingConfig(max_new_tokens=4)
    found = generate_and_check(
        LM, PARAMS, CODEC, records, lambda record: record["q"], check, jax.random.key(0), config, samples=3
    )
    assert [question for _, question in seen] == ["ab"] * 3 + ["c"] * 3
    assert [text for texts in found.texts for text in texts] == [text for text, _ in seen]
    assert len(set(found.texts[0])) > 1  # samples of one record differ
    assert found.right_PN.tolist() == [[False] * 3, [False, True, False]]
    assert found.values == pytest.approx({"accuracy": 1 / 6, "accuracy_stderr": 1 / 6})
    for wrong in ({"records": []}, {"samples": 0}):
        arguments = {"records": records, "samples": 1, **wrong}
        with pytest.raises(UserError, match=next(iter(wrong))):
            generate_and_check(
                LM, PARAMS, CODEC, arguments["records"], str, check, jax.random.key(0), config,
                samples=arguments["samples"],
            )  # fmt: skip


def test_exact_match_is_after_normalisation():
    check = exact_match("answer")
    assert check(" $1,200. ", {"answer": 1200})
    assert not check("1201", {"answer": 1200})
    assert exact_match("answer", str.lower)("YES", {"answer": "yes"})
