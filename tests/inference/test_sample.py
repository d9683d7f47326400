"""Samples follow the model's exact distribution; ends, limits and keys do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import END, counting_lm

from lmlab.core.errors import UserError
from lmlab.inference.config import SamplingConfig
from lmlab.inference.engine import bucket, decode
from lmlab.inference.filters import filter_logits
from lmlab.inference.sample import STRIDE, sample
from lmlab.testing.tiny import VOCAB, all_sequences, lively, sequence_logprobs, tiny_lm

LM = tiny_lm(max_length=64)
PARAMS = lively(jax.jit(LM.init)(jax.random.key(0)))
KEY = jax.random.key(7)
COUNTING = counting_lm()


def ids(*tokens):
    return np.asarray(tokens, np.int32)


def draw(prompts, key=KEY, lm=LM, params=PARAMS, end_ids=(), stopped=lambda tokens: None, **config):
    return sample(lm, params, prompts, key, SamplingConfig(**config), end_ids=end_ids, stopped=stopped)


@jax.jit
def all_logprobs(row_T):
    """log p(. | the tokens up to each place), [T, V]."""
    hidden_BTD, _ = LM.apply(PARAMS, row_T[None])
    return jax.nn.log_softmax(LM.logits(PARAMS, hidden_BTD))[0]


def scored(prompt, tokens):
    """log p(. | all before) at each of the tokens, by one full pass: float [n, V]."""
    row = np.concatenate([prompt, tokens])
    # One shape, so one compilation: what pads the end is not seen from before it.
    logprobs = np.asarray(all_logprobs(np.pad(row, (0, 24 - len(row)))))
    return logprobs[len(prompt) - 1 : len(row) - 1]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 2}], ids=["plain", "filtered"])
def test_continuations_follow_the_exact_distribution(filters):
    rows, prompt = 4096, [1, 0]
    lm = tiny_lm(vocab_size=3, max_length=8)
    params = lively(lm.init(jax.random.key(0)), seed=3)
    config = SamplingConfig(max_new_tokens=3, **filters)
    every = all_sequences(3, 3)
    whole = jnp.concatenate([jnp.tile(jnp.asarray([prompt], jnp.int32), (27, 1)), every], axis=1)
    if filters:
        hidden_BTD, _ = lm.apply(params, whole[:, :-1])
        filtered = jax.vmap(lambda row: filter_logits(row, config))(lm.logits(params, hidden_BTD))
        logprobs = jax.nn.log_softmax(filtered)[:, len(prompt) - 1 :]
        exact = np.exp(np.take_along_axis(np.asarray(logprobs), np.asarray(every)[..., None], axis=2).sum((1, 2)))
    else:
        exact = np.exp(np.asarray(sequence_logprobs(lm, params, whole, len(prompt))))
    assert np.isclose(exact.sum(), 1, atol=1e-5)
    drawn = sample(lm, params, [ids(*prompt)] * rows, KEY, config, rows=rows)
    codes = np.stack([one.tokens for one in drawn]) @ [9, 3, 1]
    seen = np.bincount(codes, minlength=27)
    assert not np.any(seen[exact == 0])
    likely = exact > 0
    # Chi-squared of at most 26 degrees of freedom: above 70 by chance once in 100,000.
    expected = rows * exact[likely]
    assert np.sum((seen[likely] - expected) ** 2 / expected) < 70
    assert np.abs(seen / rows - exact).sum() / 2 < 0.05
    assert exact.max() > 2 / 27  # and not the uniform distribution, which a broken sampler may draw


def test_logprobs_are_the_models_own_whatever_the_filters():
    prompts = [ids(1, 2), ids(3), ids(6, 5, 4, 3)]
    for prompt, one in zip(prompts, draw(prompts, temperature=0.5, top_k=3, max_new_tokens=9), strict=True):
        assert one.logprobs.shape == one.tokens.shape == (9,)
        expected = scored(prompt, one.tokens)[np.arange(9), one.tokens]
        assert np.allclose(one.logprobs, expected, atol=1e-5)


def test_temperature_0_is_argmax_decoding_by_full_passes():
    prompts = [ids(1, 2, 3), ids(5)]
    for prompt, one in zip(prompts, draw(prompts, temperature=0.0, max_new_tokens=12), strict=True):
        # One pass over the result tells the best token after each of its prefixes.
        assert one.tokens.tolist() == scored(prompt, one.tokens).argmax(axis=-1).tolist()


def test_neighbours_and_padding_change_nothing():
    first = ids(1, 2)
    alone = draw([first], max_new_tokens=10)[0]
    # A longer neighbour widens the prompts from 16 places to 32.
    long = np.arange(20, dtype=np.int32) % VOCAB
    assert bucket(len(long)) > bucket(len(first))
    for others in ([ids(3)], [long]):
        again = draw([first, *others], max_new_tokens=10)[0]
        assert again.tokens.tolist() == alone.tokens.tolist()
        assert np.allclose(again.logprobs, alone.logprobs, atol=1e-5)


def test_rows_and_seeds_draw_differently_and_a_seed_repeats():
    one, other = draw([ids(1), ids(1)], max_new_tokens=20)
    again, _ = draw([ids(1), ids(1)], max_new_tokens=20)
    reseeded, _ = draw([ids(1), ids(1)], key=jax.random.key(8), max_new_tokens=20)
    assert one.tokens.tolist() == again.tokens.tolist()
    assert one.tokens.tolist() != other.tokens.tolist()
    assert one.tokens.tolist() != reseeded.tokens.tolist()


def test_a_longer_limit_goes_on_from_a_shorter_one():
    short, long = (draw([ids(1), ids(2, 3)], max_new_tokens=size) for size in (5, STRIDE + 8))
    for one, two in zip(short, long, strict=True):
        assert len(two.tokens) == STRIDE + 8
        assert one.tokens.tolist() == two.tokens[:5].tolist()


@pytest.mark.parametrize("size", [1, STRIDE - 1, STRIDE, STRIDE + 1, 2 * STRIDE + 6])
def test_the_limit_is_kept_to_the_token(size):
    one = draw([ids(3)], lm=COUNTING, params={}, max_new_tokens=size)[0]
    assert one.tokens.tolist() == [(4 + i) % (END + 1) for i in range(size)]
    assert one.tokens.dtype == np.int32
    assert not one.ended


def test_the_context_limits_what_is_drawn():
    one = draw([ids(*range(100 - 60), *range(60))], lm=COUNTING, params={}, max_new_tokens=500)[0]
    assert len(one.tokens) == COUNTING.max_length - 100
    assert not one.ended


@pytest.mark.parametrize("last", [END - 1, END - 6, END - STRIDE, END - STRIDE - 1, 0])
def test_the_end_token_ends_its_row_and_is_not_kept(last):
    ended, going = draw([ids(last), ids(END)], lm=COUNTING, params={}, end_ids=(END,), max_new_tokens=58)
    expected = list(range(last + 1, END))[:58]
    assert ended.tokens.tolist() == expected
    assert ended.logprobs.shape == (len(expected),)
    assert ended.ended == (len(expected) < 58)
    assert going.tokens.tolist() == list(range(58))
    assert not going.ended


@pytest.mark.parametrize("size", [10, STRIDE, STRIDE + 3])
def test_a_stop_at_the_very_limit_counts_as_an_end(size):
    def stopped(tokens):
        return size if len(tokens) >= size else None

    one = draw([ids(END)], lm=COUNTING, params={}, stopped=stopped, max_new_tokens=size)[0]
    assert one.tokens.tolist() == list(range(size))
    assert one.ended


def test_an_end_stops_the_work_when_all_rows_have_it():
    looks = []
    draw(
        [ids(50)],
        lm=COUNTING,
        params={},
        end_ids=(END,),
        stopped=lambda drawn: looks.append(len(drawn)),
        max_new_tokens=100,
    )
    assert looks == [8]


def test_what_cannot_be_sampled_is_refused():
    long = np.zeros(LM.max_length, np.int32)
    for wrong in ([], [ids(1), ids()], [long], [ids(VOCAB)], [ids(1), ids(-1)]):
        with pytest.raises(UserError, match="prompt"):
            draw(wrong, max_new_tokens=2)
    assert len(draw([long[1:]], max_new_tokens=2)[0].tokens) == 1


def test_decode_compiles_once_for_prompts_and_limits_of_like_size():
    lm = counting_lm()
    before = decode._cache_size()
    for prompt, size, key in ((1, 3, 0), (2, 9, 1), (5, 31, 2)):
        draw([ids(*range(prompt))] * 2, lm=lm, params={}, key=jax.random.key(key), max_new_tokens=size)
    assert decode._cache_size() == before + 1
    draw([ids(1)] * 2, lm=lm, params={}, top_k=2, max_new_tokens=3)
    assert decode._cache_size() == before + 2
