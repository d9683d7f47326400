"""Attention inside of documents or across them, and positions that begin anew or do not, each for itself."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.models.config import AttentionConfig
from lmlab.models.rows import read_rows, read_rows_with_heads
from lmlab.objectives.multi_token import hidden_of_heads
from lmlab.objectives.next_token import next_token
from lmlab.testing.tiny import lively, random_batch, tiny_lm, tiny_multi_token_lm

KINDS = {"rotary": {}, "learned": {"positions": "learned"}}
WAYS = [(attend, positions) for attend in ("document", "row") for positions in ("document", "row")]


@partial(jax.jit, static_argnums=0)
def hidden(lm, params, tokens_BT, segments_BT, positions_BT):
    return lm.apply(params, tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("attend", "positions"), WAYS)
def test_what_a_document_depends_on(kind, attend, positions):
    """Two rows that share their second document: with the mask it reads as it does alone, whatever its neighbour."""
    lm = tiny_lm(**KINDS[kind])
    params = lively(lm.init(jax.random.key(0)))
    tokens_BT = jnp.asarray([[1, 2, 3, 4, 5, 6, 0, 0], [6, 5, 3, 4, 5, 6, 0, 0]])
    segments_BT = jnp.asarray([[1, 1, 2, 2, 2, 2, 0, 0]] * 2)
    positions_BT = jnp.asarray([[0, 1, 0, 1, 2, 3, 0, 1]] * 2)
    found_BTD = hidden(read_rows(lm, attend, positions), params, tokens_BT, segments_BT, positions_BT)
    alone_BTD = hidden(lm, params, tokens_BT[:1, 2:6], segments_BT[:1, 2:6], positions_BT[:1, 2:6])
    same = lambda a, b: np.allclose(a, b, atol=1e-5)
    assert same(found_BTD[0, 2:6], found_BTD[1, 2:6]) == (attend == "document")
    # Rotary positions are relative: where they begin does not matter inside of one document.
    kept = attend == "document" and (positions == "document" or kind == "rotary")
    assert same(found_BTD[0, 2:6], alone_BTD[0]) == kept
    if attend == positions == "row":
        whole_BTD = lm.apply(params, tokens_BT[:, :6])[0]
        np.testing.assert_allclose(found_BTD[:, :6], whole_BTD, atol=1e-5)


@pytest.mark.parametrize(("attend", "positions"), WAYS)
def test_no_token_sees_what_comes_after_it(attend, positions):
    lm = tiny_lm()
    params = lively(lm.init(jax.random.key(0)))
    batch = random_batch(length=8)
    read = read_rows(lm, attend, positions)
    changed_BT = batch.tokens_BT.at[:, 5:].set((batch.tokens_BT[:, 5:] + 1) % 7)
    for tokens_BT in (batch.tokens_BT, changed_BT):
        found_BTD = hidden(read, params, tokens_BT, batch.segments_BT, batch.positions_BT)[:, :5]
        first_BTD = hidden(read, params, tokens_BT[:, :5], batch.segments_BT[:, :5], batch.positions_BT[:, :5])
        np.testing.assert_allclose(found_BTD, first_BTD, atol=1e-5)


def test_a_window_holds_across_documents():
    lm = tiny_lm(layers=1, attention=AttentionConfig(heads=4, window=2))
    params = lively(lm.init(jax.random.key(0)))
    tokens_BT, segments_BT = jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([[1, 1, 2, 2]])
    positions_BT = jnp.asarray([[0, 1, 0, 1]])
    read = read_rows(lm, "row", "document")
    found = hidden(read, params, tokens_BT, segments_BT, positions_BT)
    other = hidden(read, params, tokens_BT.at[0, 0].set(5), segments_BT, positions_BT)
    assert not np.allclose(found[0, 1], other[0, 1], atol=1e-4)
    np.testing.assert_allclose(found[0, 2:], other[0, 2:], atol=1e-6)


def test_labels_and_whatever_has_no_segments_stay():
    lm = tiny_lm()
    params = lively(lm.init(jax.random.key(0)))
    batch = random_batch()
    terms = [next_token(read_rows(lm, *way))(params, batch, jax.random.key(0)) for way in WAYS]
    assert len({float(term.losses["next_token"].weight) for term in terms}) == 1
    assert len({round(float(term.losses["next_token"].sum), 3) for term in terms[1:]} | {0.0}) > 2
    read = read_rows(lm, "row", "row")
    chex.assert_trees_all_equal(read.apply(params, batch.tokens_BT)[0], lm.apply(params, batch.tokens_BT)[0])
    cache = lm.init_cache(len(batch.tokens_BT), 16)
    chex.assert_trees_all_equal(
        read.apply(params, batch.tokens_BT, cache=cache, segments_BT=batch.segments_BT),
        lm.apply(params, batch.tokens_BT, cache=cache, segments_BT=batch.segments_BT),
    )
    assert read_rows(lm).apply is lm.apply


@pytest.mark.parametrize(("attend", "positions"), WAYS)
def test_all_heads_read_as_the_first_one_does(attend, positions):
    model = tiny_multi_token_lm("parallel")
    params, batch = lively(model.lm.init(jax.random.key(0))), random_batch()
    scoped = read_rows_with_heads(model, attend, positions)
    hidden_BMTD = jax.jit(partial(hidden_of_heads, scoped))(params, batch)
    length = hidden_BMTD.shape[2]
    cut = [x[:, :length] for x in (batch.tokens_BT, batch.segments_BT, batch.positions_BT)]
    chex.assert_trees_all_close(hidden_BMTD[:, 0], hidden(read_rows(model.lm, attend, positions), params, *cut))
    usual_BMTD = jax.jit(partial(hidden_of_heads, model))(params, batch)
    differs = attend != "document"
    assert np.allclose(hidden_BMTD[:, 1], usual_BMTD[:, 1], atol=1e-5) != differs
