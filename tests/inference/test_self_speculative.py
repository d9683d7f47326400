"""What the heads draft leaves head 1's text and distribution as they are; acceptance is counted right."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import END, counting_lm

from lmlab.core.errors import UserError
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.self_speculative import self_speculate
from lmlab.inference.speculative import acceptance, residual
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import MultiTokenLM
from lmlab.testing.tiny import all_sequences, lively, sequence_logprobs, tiny_config

CHAINS = ("parallel", "causal", "linear", "sequential")
KEY = jax.random.key(11)
GREEDY = SamplingConfig(max_new_tokens=14, temperature=0)


def ids(*tokens):
    return np.asarray(tokens, np.int32)


PROMPTS = [ids(2), ids(0, 1), ids(1, 2, 2, 0, 1, 0, 2)]


def made(chain="parallel", heads=4, layers=5, **changes):
    config = tiny_config(layers=layers, **{"vocab_size": 3, "max_length": 32, **changes})
    model = multi_token_lm(MultiTokenConfig(config, heads, chain))
    return model, lively(jax.jit(model.lm.init)(jax.random.key(3)), seed=3)


def counting_heads(heads, vocab=END + 1):
    """After token i comes i + 1, and every head knows what follows."""
    lm = counting_lm(vocab)

    def read(params, inputs, *, cache):
        del params
        return SimpleNamespace(inputs=inputs, cache=cache)

    def head(params, number, reading, following):
        del params, following
        return jax.nn.one_hot((reading.inputs + number) % vocab, vocab), reading

    model = MultiTokenLM(lm, heads, read, head, lm, lambda params: (model, params))
    return model


@pytest.mark.parametrize("chain", CHAINS)
def test_greedy_text_is_that_of_plain_decoding(chain):
    model, params = made(chain)
    plain = sample(model.lm, params, PROMPTS, KEY, GREEDY)
    for ahead in range(4):
        drawn = self_speculate(model, params, PROMPTS, KEY, GREEDY, ahead=ahead)
        assert [one.tokens.tolist() for one in drawn.samples] == [one.tokens.tolist() for one in plain]
        assert [one.ended for one in drawn.samples] == [one.ended for one in plain]
        for one, other in zip(drawn.samples, plain, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert self_speculate(model, params, PROMPTS[:1], KEY, GREEDY, ahead=0).passes == 14


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.7, "top_k": 2}])
@pytest.mark.parametrize("chain", ["parallel", "sequential"])
def test_samples_follow_the_distribution_of_head_1(chain, filters):
    model, params = made(chain, heads=3, layers=4)
    rows, config = 8192, SamplingConfig(max_new_tokens=3, **filters)
    drawn = self_speculate(model, params, [ids(1, 0)] * rows, KEY, config)
    number = lambda one: int(one.tokens @ np.asarray([9, 3, 1]))
    found = np.bincount([number(one) for one in drawn.samples], minlength=27)
    if filters:
        plain = sample(model.lm, params, [ids(1, 0)] * rows, jax.random.key(5), config, rows=rows)
        expected = np.bincount([number(one) for one in plain], minlength=27)
        both = found + expected
        distance = np.sum(np.where(both > 0, (found - expected) ** 2 / np.maximum(both, 1), 0))
    else:
        whole = jnp.concatenate([jnp.tile(jnp.asarray([[1, 0]], jnp.int32), (27, 1)), all_sequences(3, 3)], axis=1)
        expected = rows * np.exp(np.asarray(sequence_logprobs(model.lm, params, whole, 2), np.float64))
        distance = np.sum((found - expected) ** 2 / expected)
    # Chi-square of 26 degrees of freedom exceeds 60 once in 6000 times.
    assert distance < 60
    assert 0 < drawn.accepted < 1


def test_blocks_follow_the_distribution_too_and_keep_more():
    model, params = made(heads=3, layers=4)
    rows, config = 8192, SamplingConfig(max_new_tokens=3)
    prompts = [ids(1, 0)] * rows
    block, token = (self_speculate(model, params, prompts, KEY, config, verify=how) for how in ("block", "token"))
    found = np.bincount([int(one.tokens @ np.asarray([9, 3, 1])) for one in block.samples], minlength=27)
    whole = jnp.concatenate([jnp.tile(jnp.asarray([[1, 0]], jnp.int32), (27, 1)), all_sequences(3, 3)], axis=1)
    expected = rows * np.exp(np.asarray(sequence_logprobs(model.lm, params, whole, 2), np.float64))
    assert np.sum((found - expected) ** 2 / expected) < 60
    assert block.accepted > token.accepted
    blocks, tokens = (
        [one.tokens.tolist() for one in self_speculate(model, params, PROMPTS, KEY, GREEDY, verify=how).samples]
        for how in ("block", "token")
    )
    assert blocks == tokens


def test_a_round_gives_the_sequences_of_head_1_exactly():
    # Every draft of two tokens by heads 2 and 3, every way that it can be cut, whatever head 1 says after it.
    model, params = made(heads=3, layers=4)
    prompt = (1, 0)
    reading = model.read(params, jnp.asarray([prompt[:1]]))
    drafts = []
    for i in (1, 2, 3):
        hidden, reading = model.head(params, i, reading, None)
        drafts.append(np.asarray(jax.nn.softmax(model.lm.logits(params, hidden[0, 0])), np.float64))
    drafts = drafts[1:]  # at the token before the last of the prompt: of the two tokens after it

    every = jnp.concatenate([jnp.tile(jnp.asarray([prompt], jnp.int32), (27, 1)), all_sequences(3, 3)], axis=1)
    hidden, _ = model.lm.apply(params, every)
    probs = np.asarray(jax.nn.softmax(model.lm.logits(params, hidden)), np.float64)

    def next_probs(tokens):
        return probs[sum(token * 3 ** (2 - i) for i, token in enumerate(tokens)), 1 + len(tokens)]

    found = dict.fromkeys(itertools.product(range(3), repeat=3), 0.0)
    for draft in itertools.product(range(3), repeat=2):
        drafted, reached = float(np.prod([drafts[i][token] for i, token in enumerate(draft)])), 1.0
        for cut in range(3):
            p = next_probs(draft[:cut])
            stay, following = 0.0, p
            if cut < 2:
                stay = float(acceptance(jnp.asarray(p), jnp.asarray(drafts[cut]))[draft[cut]])
                following = np.asarray(residual(jnp.asarray(p), jnp.asarray(drafts[cut])))
            for token, *rest in itertools.product(range(3), repeat=3 - cut):
                whole = (*draft[:cut], token, *rest)
                then = [next_probs(whole[:i])[whole[i]] for i in range(cut + 1, 3)]
                found[whole] += drafted * reached * (1 - stay) * following[token] * float(np.prod(then))
            reached *= stay
    exact = np.exp(sequence_logprobs(model.lm, params, every, 2))
    np.testing.assert_allclose([found[tuple(row[2:])] for row in every.tolist()], exact, atol=1e-5)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_heads_that_know_what_follows_take_as_few_passes_as_there_can_be(ahead):
    drawn = self_speculate(counting_heads(4), {}, [ids(4, 5)], KEY, SamplingConfig(max_new_tokens=21), ahead=ahead)
    assert drawn.samples[0].tokens.tolist() == list(range(6, 27))
    assert drawn.passes == -(-21 // (ahead + 1))
    assert drawn.accepted == (1 if ahead else 0)


def test_ends_and_limits_are_kept():
    prompts = [ids(49, 50), ids(3)]
    drawn = self_speculate(counting_heads(3), {}, prompts, KEY, SamplingConfig(max_new_tokens=20), end_ids=(END,))
    assert drawn.samples[0].tokens.tolist() == list(range(51, END))
    assert drawn.samples[1].tokens.tolist() == list(range(4, 24))
    assert [one.ended for one in drawn.samples] == [True, False]


def test_rows_do_not_disturb_each_other():
    model, params = made()
    config = SamplingConfig(max_new_tokens=9)
    alone = self_speculate(model, params, PROMPTS[:1], KEY, config).samples[0]
    among = self_speculate(model, params, PROMPTS, KEY, config).samples[0]
    assert alone.tokens.tolist() == among.tokens.tolist()


def test_what_cannot_draft_is_refused():
    model, params = made(heads=2)
    for ahead in (-1, 2):
        with pytest.raises(UserError, match=r"ahead = .*0 to 1: the model has 2 heads"):
            self_speculate(model, params, PROMPTS, KEY, GREEDY, ahead=ahead)
