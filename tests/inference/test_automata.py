"""Programs of automata: their posteriors by enumeration, over tokens that are no characters, and the look ahead."""

import numpy as np
import pytest
from enumerated import assert_posterior, bigram_lm, chances, random_params, runs

from lmlab.core.errors import UserError
from lmlab.inference.automata import constrained
from lmlab.inference.constraints import one_of, only_words, regex, without, word_length

SPELLINGS = [b"a", b"ab", b"b ", "é".encode()[:1], "é".encode()[1:], b"a", b""]
END, FIRST, LONGEST = 6, 2, 4
LM, PARAMS = bigram_lm(len(SPELLINGS)), random_params(len(SPELLINGS))
TEXTS = chances(PARAMS, FIRST, [END], LONGEST)
"""Of all texts with their end, or cut."""


def spelled(text):
    return b"".join(SPELLINGS[token] for token in text)


def run_it(program, **options):
    return runs(LM, PARAMS, program, [FIRST], LONGEST, **options)


def fitting(automaton, ended):
    """The texts that an automaton accepts; those that are cut are accepted if they must not end."""
    fine = lambda text: (text[-1] == END) == ended and automaton.accepts(spelled(text))
    return {text: p for text, p in TEXTS.items() if fine(text)}


@pytest.mark.parametrize(
    "automaton", [without(["aa", "ba"]), word_length(2), regex("(a|b| )*é?"), only_words(["ab", "a"])],
    ids=["without", "word_length", "regex", "only_words"],
)  # fmt: skip
def test_accepted_texts_within_so_many_tokens(automaton):
    made = run_it(constrained(automaton, SPELLINGS, [END], LONGEST))
    assert made[3].all()
    assert_posterior(made, fitting(automaton, ended=True))


@pytest.mark.parametrize("automaton", [without(["aa", "b a"]), regex("(é|ab)*")], ids=["without", "regex"])
def test_texts_that_do_not_end_are_accepted_where_they_are_cut(automaton):
    made = run_it(constrained(automaton, SPELLINGS, (), LONGEST))
    assert (made[2] == LONGEST).all()
    assert_posterior(made, fitting(automaton, ended=False))


def test_without_a_look_ahead_texts_are_cut_where_they_may_go_on():
    automaton = regex("a*é")
    made = run_it(constrained(automaton, SPELLINGS, [END]))
    begins = lambda text: any(automaton.accepts(spelled(text) + rest) for rest in (b"", "é".encode(), b"\xa9"))
    weights = fitting(automaton, ended=True)
    cut = {text: p for text, p in TEXTS.items() if text[-1] != END and END not in text and begins(text)}
    assert_posterior(made, weights | cut)
    # Given that a text has ended the two targets are one.
    log_weight_CP, tokens_CPS, length_CP, finished_CP = made
    assert_posterior((np.where(finished_CP, log_weight_CP, -np.inf), tokens_CPS, length_CP, finished_CP), weights)


def test_several_tokens_may_spell_the_same():
    automaton = one_of(["a"])
    made = run_it(constrained(automaton, SPELLINGS, [END], LONGEST))
    assert set(fitting(automaton, ended=True)) == {(0, END), (5, END)}
    assert_posterior(made, fitting(automaton, ended=True))


def test_an_automaton_goes_on_where_the_prompt_stopped():
    automaton = word_length(2).after(b"xy a")
    made = run_it(constrained(automaton, SPELLINGS, [END], LONGEST), count=500)
    assert_posterior(made, fitting(automaton, ended=True))


def test_a_masked_token_weighs_the_mass_of_all_allowed():
    # N = 1 and never resampled: the weight is the product of what the model gives the allowed.
    automaton = without(["aa"])
    log_weight_CP, tokens_CPS, length_CP, _ = run_it(constrained(automaton, SPELLINGS), particles=1, count=5)
    p_VV = np.exp(PARAMS["logits_VV"]) / np.exp(PARAMS["logits_VV"]).sum(axis=1, keepdims=True)
    for log_weight, tokens, length in zip(log_weight_CP[:, 0], tokens_CPS[:, 0], length_CP[:, 0], strict=True):
        total = 0.0
        for i in range(length):
            allowed = [v for v in range(6) if automaton.run(spelled([*tokens[:i], v])) >= 0]
            total += np.log(p_VV[tokens[i - 1] if i else FIRST][allowed].sum())
        np.testing.assert_allclose(log_weight, total, rtol=1e-5)


def test_what_no_text_can_fulfil_is_told():
    with pytest.raises(UserError, match=r"no text of these tokens fulfils.*of at most 4 tokens"):
        constrained(regex("a{9}"), SPELLINGS, [END], LONGEST)
    with pytest.raises(UserError, match="no text of these tokens fulfils"):
        constrained(regex("x"), SPELLINGS, [END])
    with pytest.raises(UserError, match="end_ids"):
        constrained(regex("a"), SPELLINGS, [7])
    with pytest.raises(UserError, match="at most 32768 states"):
        constrained(word_length(2**15), [b"a"] * 2**13)


def test_large_vocabularies_take_a_moment():
    rng = np.random.default_rng(0)
    spellings = [bytes(rng.integers(97, 101, rng.integers(1, 9)).tolist()) for _ in range(20_000)] + [b""]
    program = constrained(both_kinds := without(["ab", "cc"]), spellings, [20_000], 16)
    next_QV = np.asarray(program.tables["next_QV"])
    for token in rng.integers(0, 20_000, 200):
        state = both_kinds.run(spellings[token])
        assert next_QV[both_kinds.start, token] == state
    assert next_QV.dtype == np.int16
