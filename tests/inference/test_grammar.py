"""Masks of grammars against all texts of small languages, and posteriors by enumeration."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import assert_posterior, bigram_lm, chances, random_params, runs

import lmlab.inference.grammar as grammars
from lmlab.core.errors import UserError
from lmlab.inference.grammar import grammar, json_schema
from lmlab.inference.programs import Particle
from lmlab.inference.smc import steering

SPELLINGS = [b"a", b"b", b"(", b")", b"ab", b"))", b"(a", b"a", b"", b'"', b"1", b'"a', b""]
VOCAB, END, LONGEST, FIRST = len(SPELLINGS), 12, 4, 2
LM, PARAMS = bigram_lm(VOCAB), random_params(VOCAB, seed=1)
ENDED = {text: p for text, p in chances(PARAMS, FIRST, [END], LONGEST).items() if text[-1] == END and 8 not in text}
"""Whole texts without special tokens in them."""
NESTED = 'start: "(" start ")" | "a" "b"*'
LANGUAGES = {
    NESTED: ["(" * n + "a" + "b" * m + ")" * n for n in range(8) for m in range(8)],
    # Only one text may follow "(", and many tokens begin it.
    'start: "abab" | "(abab" "))"': ["abab", "(abab))"],
    "start: /(ab|b)+/": ["".join(words) for n in range(1, 8) for words in itertools.product(["ab", "b"], repeat=n)],
}


def spelled(text):
    return b"".join(SPELLINGS[token] for token in text)


def allowed_by(program, vocab=VOCAB):
    """`allowed(path)`: the tokens that a step leaves after a path."""

    @jax.jit
    def masked(path_T, length):
        p = Particle(jax.random.key(0), jnp.full((1, vocab), -jnp.log(vocab)), program.tables, length)
        program.step(p, path_T)
        return p.context.logprobs_V

    def allowed(path):
        path_T = np.zeros(program.start.shape, np.int32)
        path_T[: len(path)] = path
        return set(np.flatnonzero(np.asarray(masked(path_T, jnp.int32(len(path)))) > -np.inf).tolist())

    return allowed


@pytest.mark.parametrize("text", LANGUAGES)
def test_what_may_follow_is_what_some_text_goes_on_with(text):
    language = [one.encode() for one in LANGUAGES[text]]
    allowed = allowed_by(grammar(text, SPELLINGS, [END], 8))
    paths, seen = [()], 0
    while paths:
        path = paths.pop()
        begun = [one for one in language if one.startswith(spelled(path))]
        fine = {
            v for v in range(END) if SPELLINGS[v] and any(one.startswith(spelled([*path, v])) for one in begun)
        } | ({END} if spelled(path) in begun else set())  # fmt: skip
        assert allowed(path) == fine, path
        seen += 1
        paths += [(*path, v) for v in fine - {END} if len(path) < 4]
    assert seen > 10


@pytest.mark.parametrize("driver", [None, steering(2)], ids=["standard", "steering"])
def test_complete_texts_follow_the_posterior(driver):
    made = runs(LM, PARAMS, grammar(NESTED, SPELLINGS, [END], LONGEST), [FIRST], LONGEST, count=400, driver=driver)
    language = {one.encode() for one in LANGUAGES[NESTED]}
    complete = {text: p for text, p in ENDED.items() if spelled(text) in language}
    assert_posterior(made, complete)
    # Those that are not complete by then are dead.
    assert made[3][made[0] > -np.inf].all()


def test_a_schema_is_a_language():
    schema = {"enum": ["ab", "a", 1]}
    fine = {text: p for text, p in ENDED.items() if spelled(text) in (b'"ab"', b'"a"', b"1")}
    assert len(fine) > 4
    made = runs(LM, PARAMS, json_schema(json.dumps(schema), SPELLINGS, [END], LONGEST), [FIRST], LONGEST, count=300)
    assert_posterior(made, fine)


def test_white_space_is_left_out_where_a_schema_says_so():
    spellings = [bytes([byte]) for byte in range(256)] + [b""]
    schema = {"type": "array", "items": {"const": 1}, "maxItems": 1}
    for extra, fine in (({}, b"\t\n\r 1]"), ({"x-guidance": {"whitespace_flexible": False}}, b"1]")):
        program = json_schema(schema | extra, spellings, [256], 8)
        assert allowed_by(program, 257)([ord("[")]) == set(fine)


def test_children_ask_once_for_their_parent(monkeypatch):
    asked = []
    allowed = grammars._Parsers.allowed
    monkeypatch.setattr(
        grammars._Parsers, "allowed", lambda *args: asked.append(np.shape(args[2])) or allowed(*args)
    )  # fmt: skip
    program = grammar(NESTED, SPELLINGS, [END], LONGEST)
    runs(LM, PARAMS, program, [FIRST], LONGEST, count=5, driver=steering(3))
    assert asked
    assert {int(np.prod(shape)) for shape in asked} == {5 * 4}


def test_models_may_have_more_tokens_than_their_tokenizer():
    lm, params = bigram_lm(VOCAB + 3), random_params(VOCAB + 3)
    log_weight_CP, tokens_CPS, *_ = runs(lm, params, grammar(NESTED, SPELLINGS, [END], 4), [FIRST], 4, count=20)
    assert (log_weight_CP > -np.inf).any()
    assert tokens_CPS[log_weight_CP > -np.inf].max() < VOCAB


def test_equal_texts_are_parsed_once_and_forgotten_texts_again(monkeypatch):
    parsers = grammars._Parsers("grammar", "", NESTED + grammars.ANY_TOKENS, SPELLINGS, [END])
    paths = np.asarray([[6, 1, 3, 0]] * 50 + [[6, 1, 3, 12]] * 50)
    first = parsers.allowed(paths, np.full(100, 3))
    assert len(parsers._kept) == 1
    assert (first == first[0]).all()
    monkeypatch.setattr(grammars, "MOST_PARSERS", 2)
    asked = [((2,) * n, n) for n in range(1, 20)] + [((6, 1, 3), 3)]
    small = [parsers.allowed(np.asarray(path), np.asarray(n)) for path, n in asked]
    assert len(parsers._kept) == 2
    np.testing.assert_array_equal(small[-1], first[0])
    np.testing.assert_array_equal(small[0], parsers.allowed(np.asarray((2,)), np.asarray(1)))


def test_a_dead_end_kills_and_is_no_number_of_nan():
    # Nothing of this vocabulary spells a c.
    program = grammar('start: "a" "c"', SPELLINGS, [END], LONGEST)
    log_weight_CP, _, length_CP, _ = runs(LM, PARAMS, program, [FIRST], LONGEST, count=3)
    assert (log_weight_CP == -np.inf).all()
    assert (length_CP == 1).all()


def test_room_beyond_that_of_the_program_is_not_used():
    made = runs(LM, PARAMS, grammar('start: "a"*', SPELLINGS, [END], 2), [FIRST], 6, particles=1, count=100)
    log_weight_CP, _, length_CP, finished_CP = made
    assert finished_CP[log_weight_CP > -np.inf].all()
    assert set(length_CP[log_weight_CP > -np.inf]) == {1, 2}


@pytest.mark.parametrize("text", ['start: "a', 'other: "a"', "start: unknown", ""])
def test_a_grammar_that_cannot_be_read_is_told(text):
    with pytest.raises(UserError, match=r"grammar that llguidance reads \(.+\)") as caught:
        grammar(text, SPELLINGS, [END], LONGEST)
    assert (caught.value.field, caught.value.value) == ("grammar", text)
    assert "no_forcing" not in str(caught.value)


@pytest.mark.parametrize(
    "schema", ['{"type":', "[]", '{"type": "number of things"}', {"not": {}}, '{"type": "array", "uniqueItems": true}']
)
def test_a_schema_that_cannot_be_read_is_told(schema):
    with pytest.raises(UserError) as caught:
        json_schema(schema, SPELLINGS, [END], LONGEST)
    assert caught.value.field == "schema"
    assert caught.value.value == schema


def test_rude_numbers_are_told():
    for ends, tokens in (([], 4), ([13], 4), ([-1], 4), ([END], 0)):
        with pytest.raises(UserError, match=r"end_ids|tokens"):
            grammar(NESTED, SPELLINGS, ends, tokens)
