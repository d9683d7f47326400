"""What the heads draft leaves head 1's text and distribution as they are; acceptance is counted right."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import END, counting_lm

from lmlab.core.errors import UserError
from lmlab.inference import engine
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.self_speculative import self_speculate
from lmlab.inference.speculative import probabilities
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
    return model, lively(model.lm.init(jax.random.key(3)), seed=3)


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
        assert ahead or drawn.passes == 14


FILTERS = {"temperature": 0.7, "top_k": 2}


@pytest.mark.parametrize(
    ("chain", "filters", "verify"),
    [*((chain, {}, "token") for chain in CHAINS), ("sequential", {}, "block"), ("parallel", FILTERS, "token")],
)
def test_samples_follow_the_distribution_of_head_1(chain, filters, verify):
    """Rounds of two drafted tokens, in all texts of three: of every chain, by every way that a draft can be cut."""
    model, params = made(chain, heads=3, layers=4)
    rows, config = 8192, SamplingConfig(max_new_tokens=3, **filters)
    drawn = self_speculate(model, params, [ids(1, 0)] * rows, KEY, config, verify=verify)
    found = np.bincount([int(one.tokens @ np.asarray([9, 3, 1])) for one in drawn.samples], minlength=27)
    whole = jnp.concatenate([jnp.tile(jnp.asarray([[1, 0]], jnp.int32), (27, 1)), all_sequences(3, 3)], axis=1)
    hidden, _ = model.lm.apply(params, whole[:, :-1])
    probs = np.asarray(probabilities(model.lm.logits(params, hidden[:, 1:]), config), np.float64)
    expected = rows * np.prod(np.take_along_axis(probs, np.asarray(whole)[:, 2:, None], axis=2)[..., 0], axis=1)
    some = expected > 0
    assert not found[~some].any()
    # Chi-square of 26 degrees of freedom exceeds 60 once in 6000 times.
    assert np.sum((found - expected)[some] ** 2 / expected[some]) < 60
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


def test_prompts_read_in_pieces_are_followed_by_the_same_drafts(monkeypatch):
    model, params = made("sequential", heads=3, layers=2)
    prompts = [ids(*np.random.default_rng(i).integers(0, 3, 13)) for i in range(32)]
    config = SamplingConfig(max_new_tokens=9)
    whole = self_speculate(model, params, prompts, KEY, config)
    monkeypatch.setattr(engine, "CHUNK", 5)
    pieces = self_speculate(model, params, prompts, KEY, config)
    assert (pieces.passes, pieces.accepted) == (whole.passes, whole.accepted)
    assert [one.tokens.tolist() for one in pieces.samples] == [one.tokens.tolist() for one in whole.samples]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_heads_that_know_what_follows_take_as_few_passes_as_there_can_be(ahead):
    drawn = self_speculate(counting_heads(4), {}, [ids(4, 5)], KEY, SamplingConfig(max_new_tokens=21), ahead=ahead)
    assert drawn.samples[0].tokens.tolist() == list(range(6, 27))
    assert drawn.passes == -(-21 // (ahead + 1))
    assert drawn.accepted == (1 if ahead else 0)


def test_ends_and_limits_are_kept():
    prompts = [ids(49, 50), ids(2, 3)]
    drawn = self_speculate(counting_heads(3), {}, prompts, KEY, SamplingConfig(max_new_tokens=20), end_ids=(END,))
    assert drawn.samples[0].tokens.tolist() == list(range(51, END))
    assert drawn.samples[1].tokens.tolist() == list(range(4, 24))
    assert [one.ended for one in drawn.samples] == [True, False]
    # Heads that are always right are kept wholly: what lies beyond the end or the limit was not on offer.
    assert drawn.accepted == 1


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
    with pytest.raises(UserError, match="verify = 'blok': expected token or block"):
        self_speculate(model, params, PROMPTS, KEY, GREEDY, verify="blok")
