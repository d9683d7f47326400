"""N-grams against a count of dictionaries, byte by byte; the compressor against what is known of texts."""

import math
import random
from collections import Counter, defaultdict

import pytest

from lmlab.core.errors import UserError
from lmlab.evals.baselines import ngram_bits_per_byte, xz_bits_per_byte


class WittenBell:
    """P(b | c) = (count(c b) + types(c) P(b | c[1:])) / (count(c) + types(c))."""

    def __init__(self, texts, order):
        self.counts = defaultdict(Counter)
        self.order = order
        for symbol, context in self.symbols(texts):
            for size in range(order):
                self.counts[context[len(context) - size :]][symbol] += 1

    def symbols(self, texts):
        """Every byte and end of document, with what comes before it."""
        stream = b"\0\0" + b"".join(text.encode() + b"\0" for text in texts)
        return [(stream[i], stream[i - self.order + 1 : i]) for i in range(2, len(stream))]

    def prob(self, symbol, context):
        shorter = self.prob(symbol, context[1:]) if context else 1 / 256
        seen = self.counts.get(context)
        if not seen:
            return shorter
        return (seen[symbol] + len(seen) * shorter) / (seen.total() + len(seen))

    def bits_per_byte(self, texts):
        bits = -sum(math.log2(self.prob(*place)) for place in self.symbols(texts))
        return bits / sum(len(text.encode()) for text in texts)


ORDERS = {"unigram": 1, "trigram": 3}


def by_dictionaries(train, held_out):
    return {name: WittenBell(train, order).bits_per_byte(held_out) for name, order in ORDERS.items()}


TRAIN = ["abracadabra", "a bad cab", "", "naïve"]
HELD_OUT = [
    pytest.param(["abra", "cab"], id="seen"),
    pytest.param(["zq\x7f", "xyz", "é"], id="unseen contexts"),
    pytest.param(["", "a", ""], id="empty documents"),
]


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_ngrams_equal_the_count_of_dictionaries(held_out):
    values = ngram_bits_per_byte(iter(TRAIN), iter(held_out))
    expected = {
        name: WittenBell(TRAIN, order).bits_per_byte(held_out) for name, order in (("unigram", 1), ("trigram", 3))
    }
    assert values == pytest.approx(expected, rel=1e-9)


def test_nothing_to_learn_from_leaves_what_the_document_ends_tell():
    # One empty document: its end was seen once, after two ends.
    values = ngram_bits_per_byte([""], ["ab"])
    assert values == pytest.approx(
        {n: WittenBell([""], o).bits_per_byte(["ab"]) for n, o in (("unigram", 1), ("trigram", 3))}
    )


@pytest.mark.parametrize("context", [b"ab", b"\0\0", b"zz", b"za", b"\0a"])
def test_probabilities_of_all_bytes_sum_to_one(context):
    # Of the dictionaries, which the tests above tie to the arrays: text alone cannot reach all 256 bytes.
    model = WittenBell(TRAIN, 3)
    assert sum(model.prob(symbol, context) for symbol in range(256)) == pytest.approx(1)


def test_a_trigram_beats_a_unigram_where_order_matters():
    text = ["abc" * 200]
    values = ngram_bits_per_byte(text, text)
    assert values["trigram"] < 0.2
    assert values["unigram"] == pytest.approx(math.log2(3), abs=0.1)


def test_xz_pays_for_what_is_random_and_not_for_what_repeats():
    noise = "".join(random.Random(0).choices("0123456789abcdef", k=20_000))
    # 4 bits of entropy in each of the 16 letters; a compressor cannot go below.
    assert 4 < xz_bits_per_byte([noise]) < 5
    once, twice = xz_bits_per_byte([noise]), xz_bits_per_byte([noise, noise])
    assert twice < 0.55 * once
    assert xz_bits_per_byte(iter(["ab" * 50_000])) < 0.05


@pytest.mark.parametrize("measure", [lambda texts: ngram_bits_per_byte(["a"], texts), xz_bits_per_byte])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_there_is_no_number_without_text(measure, texts):
    with pytest.raises(UserError, match="held-out text = 0"):
        measure(texts)
