"""What automata over bytes accept, against the plain reading of each constraint."""

import itertools
import re

import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.inference.automata import both, minimal
from lmlab.inference.constraints import one_of, only_words, regex, without, word_length

TEXTS = ["".join(letters) for n in range(6) for letters in itertools.product("ab c", repeat=n)]


def accepted(automaton):
    return {text for text in TEXTS if automaton.accepts(text.encode())}


@pytest.mark.parametrize("pattern", ["a*b|cc", "(ab|ba)+ ?c*", "", "[^a]{2,3}", "a.b", "(?i)AB+", "(?x)a b # c"])
def test_patterns_match_whole_texts(pattern):
    assert accepted(regex(pattern)) == {text for text in TEXTS if re.fullmatch(pattern, text)}


@pytest.mark.parametrize("pattern", ["é+", "[à-ü]{2}", r"\w", "漢?字", "."])
def test_patterns_are_of_characters(pattern):
    texts = ["é", "éé", "àü", "漢字", "字", "x", "é漢"]
    automaton = regex(pattern)
    assert [automaton.accepts(text.encode()) for text in texts] == [bool(re.fullmatch(pattern, text)) for text in texts]
    assert not automaton.accepts("é".encode()[:1])


@pytest.mark.parametrize("pattern", ["a(", "[", "(?=a)b", "^a$", "a[b&&c]", r"a\b"])
def test_a_pattern_that_cannot_be_read_is_told(pattern):
    with pytest.raises(UserError, match=r"pattern = .*regular expression \(.+\)") as caught:
        regex(pattern)
    assert caught.value.value == pattern


def test_choices_words_and_what_is_forbidden():
    assert accepted(one_of(["ab", "abc", "c", "ab"])) == {"ab", "abc", "c"}
    fine = {text for text in TEXTS if all(word in ("a", "ab", "cb") for word in text.split())}
    assert accepted(only_words(["a", "ab", "cb"])) == fine
    for forbidden in (["ab"], ["aa", "aab"], ["abab", "ba c", "bb"], ["aba", "b"], ["a"]):
        assert accepted(without(forbidden)) == {text for text in TEXTS if not any(bad in text for bad in forbidden)}


@pytest.mark.parametrize("letters", [1, 2, 3])
def test_words_have_at_most_so_many_letters(letters):
    fine = {text for text in TEXTS if all(len(word) <= letters for word in text.split())}
    assert accepted(word_length(letters)) == fine


def test_letters_are_characters_and_signs_are_none():
    three = word_length(3)
    assert three.accepts("élé 漢字x — “abc”… a1b2c3d4 don't😀abc".encode())
    assert not three.accepts("élév".encode())
    assert not three.accepts("漢字漢字".encode())


def test_what_both_accept():
    one, other = without(["ab"]), regex("[abc]*c")
    assert accepted(both(one, other)) == accepted(one) & accepted(other)
    assert accepted(both(word_length(2), only_words(["abc", "b"]))) == accepted(only_words(["b"]))
    with pytest.raises(UserError, match="nothing fulfils"):
        both(one_of(["a"]), one_of(["b"]))


def test_minimal_automata_have_no_two_states_alike():
    automaton = regex("(a|b)*abb|(b|a)*abb")
    assert len(automaton.next_QB) == 4
    assert len(minimal(automaton).next_QB) == 4
    # 3 digits, however they are spelled.
    assert len(regex("[0-9]{3}").next_QB) == 4


def test_a_prompt_counts_as_far_as_it_obeys():
    three = word_length(3)
    assert not three.after(b"extraordinary").accepts(b"a")
    assert three.after(b"extraordinary").accepts(b" abc")
    assert three.after(b"go on with ab").accepts(b"c d")
    assert not three.after(b"go on with ab").accepts(b"cd")
    assert not without(["cat"]).after(b"a cat, a ca").accepts(b"t")
    assert only_words(["cat"]).after(b"I saw a ca").accepts(b"t cat")


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: one_of([]), "texts"), (lambda: without([]), "texts"), (lambda: without(["a", ""]), "texts"),
        (lambda: only_words([]), "words"), (lambda: only_words(["a b"]), "words"), (lambda: word_length(0), "letters"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_told(build, field):
    with pytest.raises(UserError) as caught:
        build()
    assert caught.value.field == field


def test_states_are_small_and_sound():
    automaton = without(["the", "then", "her"])
    assert automaton.next_QB.dtype == np.int32
    assert automaton.next_QB.min() >= -1
    assert automaton.next_QB.max() < len(automaton.next_QB)
