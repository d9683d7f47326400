"""Text in, text out: where samples begin, and where stop texts cut them."""

import jax
import pytest
from scripted import END, WHOLE, Letters, counting_lm

from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import STRIDE
from lmlab.inference.text import sample_text

LM = counting_lm()


def continued(*prompts, **config):
    return sample_text(LM, {}, Letters(), prompts, jax.random.key(0), SamplingConfig(**config))


def test_a_prompt_is_the_beginning_of_a_document():
    (new, _), (rest, one) = continued("", WHOLE[:5], max_new_tokens=100)
    assert new == WHOLE
    assert rest == WHOLE[5:]
    assert one.ended
    assert one.tokens.tolist() == list(range(5, END))


@pytest.mark.parametrize(
    ("first", "size"),
    [(0, 1), (0, 3), (4, 1), (STRIDE - 1, 1), (STRIDE - 1, 2), (STRIDE - 3, 6), (STRIDE, 2), (END - 2, 2)],
)
def test_a_stop_text_is_cut_wherever_it_lies(first, size):
    ((text, one),) = continued("", stop=(WHOLE[first : first + size],), max_new_tokens=100)
    assert text == WHOLE[:first]
    # The tokens hold the stop text, and nothing after it.
    assert one.tokens.tolist() == list(range(first + size))
    assert len(one.logprobs) == first + size
    assert one.ended


def test_the_earliest_of_several_stops_counts():
    ((text, _),) = continued("", stop=(WHOLE[20:22], WHOLE[9:12], WHOLE[40]), max_new_tokens=100)
    assert text == WHOLE[:9]


def test_rows_stop_each_for_itself():
    (first, one), (second, two) = continued("", WHOLE[:40], stop=(WHOLE[10],), max_new_tokens=100)
    assert (first, second) == (WHOLE[:10], WHOLE[40:])
    assert one.ended
    assert two.ended


def test_a_stop_beyond_the_limit_is_none():
    ((text, one),) = continued("", stop=(WHOLE[11:13],), max_new_tokens=12)
    assert text == WHOLE[:12]
    assert not one.ended


def test_a_stop_in_the_prompt_is_none():
    ((text, _),) = continued(WHOLE[:6], stop=(WHOLE[4:7], WHOLE[:3]), max_new_tokens=4)
    assert text == WHOLE[6:10]
