"""What every language model owes: the generic tests over the table of models."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.types import Params
from lmlab.models.build import language_model
from lmlab.models.lm import LM
from lmlab.optim.groups import is_names
from lmlab.testing.tables import LMS
from lmlab.testing.tiny import VOCAB, lively

T = 6


@pytest.fixture(scope="module", params=LMS)
def made(request: pytest.FixtureRequest) -> tuple[LM, Params]:
    lm = compiled(LMS[request.param]())
    return lm, lively(lm.init(jax.random.key(0)))


def compiled(lm: LM) -> LM:
    """The same model, each function one program: compiling every operation for itself takes most of the time here."""
    names = ("init", "apply", "embed", "logits", "take_rows", "put_rows", "rewind")
    functions = {name: jax.jit(getattr(lm, name)) for name in names}
    return replace(lm, **functions, resize=jax.jit(lm.resize, static_argnums=1))


def tokens(rows: int = 2, length: int = T, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, VOCAB)


def logits(lm: LM, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return lm.logits(params, lm.apply(params, tokens_BT)[0])


def alone(lm: LM, params: Params, text_N: jax.Array) -> jax.Array:
    """Hidden vectors [N, D] of a text by itself, in rows of the length all tests share; what follows is not seen."""
    row_T = jnp.zeros(T, jnp.int32).at[: len(text_N)].set(text_N)
    return lm.apply(params, jnp.stack([row_T, row_T]))[0][0, : len(text_N)]


def test_axes_name_every_axis(made):
    lm, params = made
    names = jax.tree.map(len, lm.axes, is_leaf=is_names)
    chex.assert_trees_all_equal(names, jax.tree.map(jnp.ndim, params))


def test_logits_are_float32_and_read_only_the_head(made):
    lm, params = made
    hidden_BTD, _ = lm.apply(params, tokens())
    full = lm.logits(params, hidden_BTD)
    chex.assert_shape(full, (2, T, lm.vocab_size))
    assert full.dtype == jnp.float32
    chex.assert_trees_all_equal(lm.logits(lm.head(params), hidden_BTD), full)


def test_tokens_and_their_embeddings_give_the_same(made):
    lm, params = made
    chex.assert_trees_all_close(
        lm.apply(params, tokens())[0], lm.apply(params, lm.embed(params, tokens()))[0], atol=1e-6
    )


def test_a_token_moves_what_follows_and_nothing_before(made):
    lm, params = made
    # Gradient of the output at each place with respect to each input embedding: exactly lower triangular.
    embeddings = lm.embed(params, tokens(1))
    slope = jax.jit(jax.jacobian(lambda x: lm.apply(params, x)[0].sum(-1)[0]))(embeddings)
    size_TT = np.asarray(jnp.abs(slope).sum(-1)[:, 0])
    assert np.all(size_TT[np.triu_indices(T, 1)] == 0)
    window = lm.config.attention.window or T
    near = [(i, j) for i in range(T) for j in range(i + 1) if i - j < window]
    assert all(size_TT[i, j] > 0 for i, j in near)


@pytest.mark.parametrize("prefill", [1, 4])
def test_cache_is_exact(made, prefill):
    lm, params = made
    full = logits(lm, params, tokens())
    cache = lm.init_cache(2, T + 2)
    hidden, cache = lm.apply(params, tokens()[:, :prefill], cache=cache)
    pieces = [hidden]
    for i in range(prefill, T):
        hidden, cache = lm.apply(params, tokens()[:, i : i + 1], cache=cache)
        pieces.append(hidden)
    chex.assert_trees_all_close(lm.logits(params, jnp.concatenate(pieces, axis=1)), full, atol=2e-5)


def test_cache_ignores_padding_and_gathers_rows(made):
    lm, params = made
    # Row 0 holds 2 tokens and padding, row 1 holds 4; then one more token each, rows swapped and repeated.
    lengths = jnp.asarray([2, 4])
    segments = (jnp.arange(4)[None] < lengths[:, None]).astype(jnp.int32)
    _, cache = lm.apply(params, tokens()[:, :4], segments_BT=segments, cache=lm.init_cache(2, 8))
    rows = jnp.asarray([1, 0, 1])
    cache = lm.take_rows(cache, rows)
    following = tokens(3, 1, seed=5)
    hidden, _ = lm.apply(params, following, cache=cache)
    for place, row in enumerate(rows):
        expected = alone(lm, params, jnp.concatenate([tokens()[row, : lengths[row]], following[place]]))[-1]
        chex.assert_trees_all_close(hidden[place, 0], expected, atol=2e-5)


def test_cache_takes_rows_in_and_forgets(made):
    lm, params = made
    _, cache = lm.apply(params, tokens()[:, :4], cache=lm.init_cache(2, 8))
    _, other = lm.apply(params, tokens(2, 4, seed=6), cache=lm.init_cache(2, 8))
    # Row 1 becomes the first of the others; the second goes nowhere. Then row 0 forgets two tokens, row 1 its last one.
    cache = lm.rewind(lm.put_rows(cache, jnp.asarray([1, 2]), other), jnp.asarray([2, 3]))
    following = tokens(2, 1, seed=5)
    hidden, _ = lm.apply(params, following, cache=cache)
    for row, before in enumerate((tokens()[0, :2], tokens(2, 4, seed=6)[0, :3])):
        expected = alone(lm, params, jnp.concatenate([before, following[row]]))[-1]
        chex.assert_trees_all_close(hidden[row, 0], expected, atol=2e-5)


def test_cache_drops_padding_beyond_its_room_and_grows(made):
    lm, params = made
    # Row 0 holds 3 tokens and row 1 fills all 4 places; padding goes beyond them. Then more room, and two tokens more.
    lengths, following = jnp.asarray([3, 4]), tokens(2, 2, seed=5)
    held_BT = jnp.arange(6)[None] < lengths[:, None]

    @jax.jit
    def both(params):
        _, cache = lm.apply(params, tokens(), segments_BT=held_BT.astype(jnp.int32), cache=lm.init_cache(2, 4))
        cache = lm.resize(cache, 7)
        chex.assert_trees_all_equal_shapes(cache, lm.init_cache(2, 7))
        cache = lm.resize(lm.resize(cache, 4), 6)  # no fewer than are held
        places = jnp.arange(2)[:, None], lengths[:, None] + jnp.arange(2)[None]
        whole, _ = lm.apply(params, tokens().at[places].set(following))
        return lm.apply(params, following, cache=cache)[0], whole[places]

    chex.assert_trees_all_close(*both(params), atol=2e-5)


def test_rows_put_in_leave_the_others_as_they_are(made):
    lm, _ = made

    def number(rows, start):
        count = lambda x: jnp.arange(start, start + x.size).reshape(x.shape).astype(x.dtype)
        return jax.tree.map(count, lm.init_cache(rows, 5))

    cache, other = number(3, 0), number(4, 7)
    # Many rows beyond the last, and the only one that is not.
    found = lm.put_rows(cache, jnp.asarray([3, 3, 1, 4]), other)
    chex.assert_trees_all_equal(lm.take_rows(found, jnp.asarray([0, 2])), lm.take_rows(cache, jnp.asarray([0, 2])))
    chex.assert_trees_all_equal(lm.take_rows(found, jnp.asarray([1])), lm.take_rows(other, jnp.asarray([2])))


def test_packed_documents_do_not_see_each_other(made):
    lm, params = made
    first, second = tokens(1, 3, seed=1), tokens(1, 2, seed=2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 1), jnp.int32)], axis=1)
    segments, positions = jnp.asarray([[1, 1, 1, 2, 2, 0]]), jnp.asarray([[0, 1, 2, 0, 1, 0]])
    hidden, _ = lm.apply(params, packed, positions_BT=positions, segments_BT=segments)
    chex.assert_tree_all_finite(hidden)
    apart = [alone(lm, params, part[0]) for part in (first, second)]
    chex.assert_trees_all_close(hidden[0, :5], jnp.concatenate(apart), atol=2e-5)


def test_init_is_a_function_of_the_key(made):
    lm, _ = made
    one, again, other = (lm.init(jax.random.key(seed)) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(one, again)
    assert any(bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_bfloat16_stays_near_float32(made):
    lm, params = made
    half = compiled(
        language_model(replace(lm.config, execution=replace(lm.config.execution, compute_dtype="bfloat16")))
    )
    hidden, cache = half.apply(params, tokens(), cache=half.init_cache(2, T))
    assert hidden.dtype == jnp.bfloat16
    assert all(part.dtype == jnp.bfloat16 for part in jax.tree.leaves(cache.keys))
    exact = logits(lm, params, tokens())
    error = jnp.abs(half.logits(params, hidden) - exact).max() / jnp.abs(exact).max()
    assert 0 < error < 0.1


def test_gradients_of_bfloat16_parameters_are_those_of_float32_rounded(made):
    # Many tokens share a row of the embedding, a bias and a scale: their sum must not be made in bfloat16.
    lm, params = made
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def loss(params, tokens_BT):
        logprobs_BTV = jax.nn.log_softmax(lm.logits(params, lm.apply(params, tokens_BT)[0]))
        return -jnp.mean(jnp.take_along_axis(logprobs_BTV[:, :-1], tokens_BT[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))
    batch_BT = tokens(256, 16)
    rounded, exact = gradient(half, batch_BT), gradient(jax.tree.map(lambda x: x.astype(jnp.float32), half), batch_BT)
    for ours, wanted in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert ours.dtype == jnp.bfloat16
        error = jnp.max(jnp.abs(ours.astype(jnp.float32) - wanted))
        assert float(error) <= 2**-7 * float(jnp.max(jnp.abs(wanted)))  # both 0 for what this loss does not read
