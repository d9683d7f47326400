"""Scores are the model's own log-probabilities, whatever shares a row, a batch or a cache with them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted import END, counting_lm

from lmlab.core.errors import UserError
from lmlab.inference import score as scoring
from lmlab.inference.config import SamplingConfig
from lmlab.inference.sample import sample
from lmlab.inference.score import Scored, rolling, score
from lmlab.testing.tables import CACHES, LMS
from lmlab.testing.tiny import VOCAB, all_sequences, lively, sequence_logprobs, tiny_lm

LM = tiny_lm()
PARAMS = lively(jax.jit(LM.init)(jax.random.key(0)))


def ids(*tokens):
    return np.asarray(tokens, np.int32)


def random_pairs(count, seed=0, contexts=4):
    """Pairs of 2 to 33 tokens, of which several share a context."""
    rng = np.random.default_rng(seed)
    starts = [rng.integers(0, VOCAB, rng.integers(1, 25)).astype(np.int32) for _ in range(contexts)]
    return [(starts[i % contexts], rng.integers(0, VOCAB, rng.integers(1, 9)).astype(np.int32)) for i in range(count)]


def by_full_passes(lm, params, pairs):
    """Each pair alone, without segments, caches or chunks: what `score` must give."""

    @jax.jit
    def logprobs_of(tokens_T):
        hidden_BTD, _ = lm.apply(params, tokens_T[None])
        return jax.nn.log_softmax(lm.logits(params, hidden_BTD))[0]

    found = []
    for context, continuation in pairs:
        whole = np.concatenate([context, continuation])
        # One shape, so one compilation: what pads the end is not seen from before it.
        logprobs_TV = np.asarray(logprobs_of(np.pad(whole[:-1], (0, 32 - len(whole[:-1])))))
        after_NV = logprobs_TV[len(context) - 1 : len(whole) - 1]
        greedy = np.array_equal(after_NV.argmax(-1), continuation)
        found.append(Scored(after_NV[np.arange(len(continuation)), continuation], greedy))
    return found


def assert_same(found, wanted, atol=1e-5):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs.dtype == np.float32
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)
        assert one.total == pytest.approx(other.logprobs.sum(), abs=10 * atol)
        assert one.greedy == other.greedy


@pytest.mark.parametrize("share_contexts", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("name", CACHES)
def test_every_model_scores_as_by_full_passes(name, share_contexts):
    lm = LMS[name]()
    params = lively(lm.init(jax.random.key(0)))
    pairs = random_pairs(10)
    assert_same(score(lm, params, pairs, share_contexts=share_contexts), by_full_passes(lm, params, pairs))


@pytest.mark.parametrize("share_contexts", [False, True], ids=["packed", "shared"])
def test_continuations_of_a_length_have_all_the_probability(share_contexts):
    lm = tiny_lm(vocab_size=3, max_length=8)
    params = lively(lm.init(jax.random.key(0)), seed=3)
    prompt, every = ids(1, 0), all_sequences(3, 4)
    found = score(lm, params, [(prompt, row) for row in np.asarray(every)], share_contexts=share_contexts)
    totals = np.asarray([one.total for one in found])
    assert np.exp(totals).sum() == pytest.approx(1, abs=1e-5)
    whole = jnp.concatenate([jnp.tile(jnp.asarray([prompt]), (81, 1)), every], axis=1)
    np.testing.assert_allclose(totals, sequence_logprobs(lm, params, whole, 2), atol=1e-5)
    # Greedy decoding writes one of them.
    greedy = sample(lm, params, [prompt], jax.random.key(0), SamplingConfig(temperature=0.0, max_new_tokens=4))[0]
    assert [tuple(row) for row, one in zip(every.tolist(), found, strict=True) if one.greedy] == [tuple(greedy.tokens)]


@pytest.mark.parametrize("name", CACHES)
def test_what_is_sampled_has_the_logprobs_of_the_scorer(name):
    lm = LMS[name]()
    params = lively(lm.init(jax.random.key(0)))
    prompts = [ids(1, 2), ids(3), ids(6, 5, 4, 3)]
    drawn = sample(lm, params, prompts, jax.random.key(1), SamplingConfig(temperature=0.8, max_new_tokens=9))
    for share_contexts in (False, True):
        pairs = [(prompt, one.tokens) for prompt, one in zip(prompts, drawn, strict=True)]
        for one, other in zip(drawn, score(lm, params, pairs, share_contexts=share_contexts), strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("share_contexts", [False, True], ids=["packed", "shared"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_neither_order_nor_company_nor_batches_change_a_score(batch_tokens, share_contexts):
    pairs = random_pairs(12, contexts=3)
    wanted = score(LM, PARAMS, pairs)
    order = np.random.default_rng(1).permutation(12)
    options = {"batch_tokens": batch_tokens, "share_contexts": share_contexts}
    assert_same(score(LM, PARAMS, [pairs[i] for i in order], **options), [wanted[i] for i in order])
    assert_same(score(LM, PARAMS, pairs[:1], **options), wanted[:1])


def test_the_same_pair_twice_is_scored_twice():
    pair = random_pairs(1)[0]
    one, other = score(LM, PARAMS, [pair, pair])
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_short_pairs_share_rows_and_no_row_overflows():
    sizes = np.random.default_rng(0).integers(1, 700, 200)
    pieces = [scoring._Piece(i, np.zeros(size, np.int32), np.zeros(1, np.int32)) for i, size in enumerate(sizes)]
    packed = scoring._pack(pieces, limit=600)
    for width, rows in packed.items():
        assert width in {256, 512, 600}
        for row in rows:
            assert sum(len(piece.tokens) for piece in row) <= max(width, len(row[0].tokens))
    assert sorted(piece.pair for rows in packed.values() for row in rows for piece in row) == list(range(200))
    held = sum(width * len(rows) for width, rows in packed.items())
    assert held < 1.35 * sizes.sum()


def test_few_shapes_are_compiled_for_many_pairs():
    lm = counting_lm()
    before = scoring.score_places._cache_size()
    for count in (40, 37, 33):
        score(lm, {}, [(ids(*range(i % 7 + 3)), ids(1, 2)) for i in range(count)])
    # One width; as many rows as a power of two.
    assert scoring.score_places._cache_size() <= before + 2


def test_more_places_than_a_chunk_are_scored(monkeypatch):
    pairs = random_pairs(20)
    wanted = score(LM, PARAMS, pairs)
    monkeypatch.setattr(scoring, "CHUNK", 7)
    scoring.score_places.clear_cache()
    try:
        assert_same(score(LM, PARAMS, pairs), wanted)
    finally:
        scoring.score_places.clear_cache()


def test_greedy_is_what_the_model_would_write():
    lm = counting_lm()
    found = score(lm, {}, [(ids(3), ids(4, 5, 6)), (ids(3), ids(4, 6)), (ids(END), ids(0))])
    assert [one.greedy for one in found] == [True, False, True]
    assert found[0].total == pytest.approx(0, abs=1e-5)
    assert found[1].logprobs.tolist() == pytest.approx([0, -100], abs=1e-4)


def test_no_pairs_have_no_scores():
    assert score(LM, PARAMS, []) == []


def test_what_cannot_be_scored_is_refused():
    whole = np.zeros(LM.max_length, np.int32)
    for wrong in ((ids(), ids(1)), (ids(1), ids()), (whole, ids(1, 2)), (ids(VOCAB), ids(1)), (ids(1), ids(-1))):
        with pytest.raises(UserError, match=r"context|continuation|tokens"):
            score(LM, PARAMS, [(ids(1), ids(1)), wrong])
    assert len(score(LM, PARAMS, [(whole, ids(1))])[0].logprobs) == 1


@pytest.mark.parametrize(("size", "prefix", "limit", "stride"), list(itertools.product(
    [0, 1, 3, 4, 5, 9, 10], [1, 2], [4, 7], [0, 1, 3])))  # fmt: skip
def test_windows_score_every_token_once_with_the_most_context(size, prefix, limit, stride):
    text, before = np.arange(size) + 10, list(range(prefix))
    whole = [*before, *text.tolist()]
    windows = rolling(text, before, limit, stride)
    assert [token for _, continuation in windows for token in continuation] == text.tolist()
    done = prefix
    for i, (context, continuation) in enumerate(windows):
        stop = done + len(continuation)
        read = [*context, *continuation][:-1]
        # All that the window has room for, and no more.
        assert read == whole[max(0, stop - 1 - limit) : stop - 1]
        assert i == 0 or stop == len(whole) or len(continuation) == (stride or limit)
        done = stop


def test_windows_are_those_of_the_harness():
    # The example in the documentation of lm_eval.api.model.LM.loglikelihood_rolling.
    windows = rolling(np.arange(10), [99], 4)
    assert [(context.tolist(), continuation.tolist()) for context, continuation in windows] == [
        ([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9]),
    ]  # fmt: skip
    for wrong in ({"prefix": []}, {"prefix": [0] * 5}, {"stride": 5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            rolling(np.arange(10), **{"prefix": [99], "max_length": 4, **wrong})
