"""What is particular to several heads: who sees what, who gets which gradient, how heads come and go."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmlab.core.errors import UserError
from lmlab.inference import engine
from lmlab.inference.engine import read_prompts
from lmlab.models import decoder, heads
from lmlab.models.config import ExecutionConfig, RotaryConfig
from lmlab.models.heads import add_heads, drop_heads, multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.testing.tiny import VOCAB, lively, tiny_config, tiny_lm, tiny_tokenformer_config

CHAINS = ("parallel", "causal", "linear", "sequential")
T = 6
TOKENS = jax.random.randint(jax.random.key(1), (2, T + 3), 0, VOCAB)


def config(chain="parallel", heads=3, layers=4, **changes):
    return MultiTokenConfig(tiny_config(layers=layers, **changes), heads, chain)


def made(chain="parallel", heads=3, **changes):
    model = multi_token_lm(config(chain, heads, **changes))
    return model, lively(model.lm.init(jax.random.key(0)))


def hidden_of(model, params, tokens=TOKENS):
    """Hidden states [M, B, T, D] of all heads on the first T tokens."""

    @jax.jit
    def run(params, tokens):
        reading, found = model.read(params, tokens[:, :T]), []
        for i in range(1, model.heads + 1):
            hidden, reading = model.head(params, i, reading, tokens[:, i - 1 : i - 1 + T])
            found.append(hidden)
        return jnp.stack(found)

    return run(params, tokens)


def count(params):
    return sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("chain", ["parallel", "causal"])
def test_heads_that_are_layers_cost_nothing(chain, heads):
    plain = tiny_lm(layers=4)
    assert count(made(chain, heads)[1]) == count(plain.init(jax.random.key(0)))


@pytest.mark.parametrize("chain", CHAINS)
def test_no_head_sees_what_it_predicts(chain):
    model, params = made(chain)
    known = model.lm.embed(params, TOKENS[:1])

    def total(embeddings):
        reading, out = model.read(params, embeddings[:, :T]), []
        for i in range(1, 4):
            hidden, reading = model.head(params, i, reading, embeddings[:, i - 1 : i - 1 + T])
            out.append(hidden[0].sum(-1))
        return jnp.stack(out)

    size_MTS = np.asarray(jnp.abs(jax.jit(jax.jacobian(total))(known)).sum(-1)[:, :, 0])
    for i in range(3):
        # A sequential module also reads the tokens up to the one before its label.
        last = i if chain == "sequential" else 0
        for t in range(T):
            assert np.all(size_MTS[i, t, t + last + 1 :] == 0)
            assert size_MTS[i, t, t + last] > 0


@pytest.mark.parametrize("chain", CHAINS)
def test_a_head_teaches_those_that_it_is_made_of(chain):
    model, params = made(chain)
    third = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(hidden_of(model, p)[2]))))(params)
    moved = {name: any(bool(jnp.any(x)) for x in jax.tree.leaves(third[name])) for name in ("head_2", "head_3")}
    assert moved == {"head_2": chain in ("causal", "sequential"), "head_3": True}
    own = jax.tree.map(lambda x: bool(jnp.any(x[-1])), third["layers"])
    # The last layer is head 1's, where heads are layers; else it is the trunk's.
    assert any(jax.tree.leaves(own)) == (chain != "parallel")


@pytest.mark.parametrize("chain", CHAINS)
def test_the_cache_of_all_heads_is_exact(chain):
    model, params = made(chain)
    full = hidden_of(model, params)
    cache, pieces = model.whole.init_cache(2, T + 2), []

    @partial(jax.jit, static_argnums=(2, 3))
    def piece(params, cache, start, stop):
        reading, found = model.read(params, TOKENS[:, start:stop], cache=cache), []
        for i in range(1, 4):
            hidden, reading = model.head(params, i, reading, TOKENS[:, start + i - 1 : stop + i - 1])
            found.append(hidden)
        return jnp.stack(found), reading.cache

    for start, stop in ((0, 3), (3, 4), (4, 6)):
        hidden, cache = piece(params, cache, start, stop)
        pieces.append(hidden)
    chex.assert_trees_all_close(jnp.concatenate(pieces, axis=2), full, atol=2e-5)


@pytest.mark.parametrize("chain", ["causal", "sequential"])
def test_prompts_read_in_pieces_leave_the_cache_that_one_reading_leaves(chain, monkeypatch):
    model, params = made(chain)
    prompts = [np.asarray(TOKENS[0, :n]) for n in (9, 4, 1, 7)]

    def held():
        logits, cache = read_prompts(model.whole, params, prompts, 12, again=2)
        # Of the last places the third head does not know yet what follows them.
        length = jnp.asarray([len(prompt) for prompt in prompts])
        known = jnp.arange(12)[None] < length[:, None] - 2
        keys, values = (jnp.where(known[None, :, None, :, None], x, 0) for x in (cache.keys, cache.values))
        chex.assert_trees_all_equal(cache.length_B, length)
        return logits, keys, values, cache.segments_BS, jnp.where(known, cache.positions_BS, 0)

    whole = held()
    for width in (4, 3):
        monkeypatch.setattr(engine, "CHUNK", width)
        chex.assert_trees_all_close(held(), whole, atol=2e-5)


@pytest.mark.parametrize("chain", CHAINS)
def test_forms_and_layouts_are_the_same_model(chain):
    model, params = made(chain)
    full = hidden_of(model, params)
    apart, laid = model.for_decoding(params)
    assert apart is not model
    assert model.for_decoding(params)[0] is apart
    assert apart.for_decoding(laid) == (apart, laid)
    whole, same = model.whole.for_decoding(params)
    assert whole is apart.whole
    chex.assert_trees_all_equal(same, laid)
    assert whole.for_decoding(laid) == (whole, laid)
    chex.assert_trees_all_close(hidden_of(apart, laid), full, atol=2e-5)
    first, _ = model.lm.apply(params, TOKENS[:, :T])
    chex.assert_trees_all_close(first, full[0], atol=2e-5)
    lm, alone = model.lm.for_decoding(params)
    assert not any(name.startswith("head_") for name in alone)
    chex.assert_trees_all_close(lm.apply(alone, TOKENS[:, :T])[0], full[0], atol=2e-5)
    value = lambda m: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(hidden_of(m, p)))))(params)
    remat, _ = made(chain, execution=ExecutionConfig(remat="full"))
    chex.assert_trees_all_close(value(model), value(remat), rtol=1e-4, atol=1e-4)


def test_a_form_that_is_the_fastest_already_costs_nothing(monkeypatch):
    monkeypatch.setattr(decoder, "platform", lambda: "tpu")
    monkeypatch.setattr(heads, "lay_apart", pytest.fail)
    monkeypatch.setattr(decoder, "lay_apart", pytest.fail)
    model, params = made()
    assert model.for_decoding(params) == (model, params)
    assert model.whole.for_decoding(params) == (model.whole, params)
    monkeypatch.undo()
    # And the copy is made once, not of head 1 first.
    monkeypatch.setattr(decoder, "lay_apart", pytest.fail)
    assert model.for_decoding(params)[0] is not model


@pytest.mark.parametrize("chain", CHAINS)
def test_heads_are_dropped_and_added(chain):
    model, params = made(chain)
    alone = drop_heads(params)
    plain = tiny_lm(layers=config(chain).depth)
    chex.assert_trees_all_equal_shapes(alone, jax.eval_shape(plain.init, jax.random.key(0)))
    chex.assert_trees_all_close(plain.apply(alone, TOKENS)[0], model.lm.apply(params, TOKENS)[0], atol=1e-6)
    again = add_heads(config(chain), alone, jax.random.key(2))
    chex.assert_trees_all_equal_shapes(again, params)
    chex.assert_trees_all_equal(drop_heads(again), alone)
    found = hidden_of(model, again)
    if chain == "parallel":  # copies of the last layer predict what it predicts
        chex.assert_trees_all_close(found, jnp.broadcast_to(found[:1], found.shape), atol=1e-6)


def test_the_gradients_of_all_heads_are_added_up_in_float32():
    half = ExecutionConfig(compute_dtype="bfloat16")
    model, params = made(heads=3, execution=half)
    reading = model.read(params, TOKENS[:, :T])

    def through(trunk_BTD):
        again, total = reading.replace(trunk_BTD=trunk_BTD), 0.0
        for i in range(1, 4):
            hidden, again = model.head(params, i, again, TOKENS)
            total += jnp.sum(jnp.sin(hidden.astype(jnp.float32)))
        return total

    slope = jax.grad(through)(reading.trunk_BTD)
    assert slope.dtype == jnp.float32
    assert jnp.any(slope != slope.astype(jnp.bfloat16))


def test_a_tokenformer_has_heads_too():
    tokenformer = tiny_tokenformer_config(layers=3)
    model = multi_token_lm(MultiTokenConfig(tokenformer, 2))
    params = lively(model.lm.init(jax.random.key(0)))
    full = hidden_of(model, params)
    assert full.shape == (2, 2, T, 16)
    chex.assert_trees_all_close(full[0], model.lm.apply(params, TOKENS[:, :T])[0], atol=2e-5)


@pytest.mark.parametrize("chain", ["parallel", "causal", "sequential"])
@pytest.mark.parametrize("skipped", [(1,), (2,)])
def test_all_heads_rotate_or_none_does(chain, skipped):
    """Head 1's model has three layers here; numbers beyond them mean nothing."""
    layers = {"sequential": 3}.get(chain, 4)
    model, params = made(chain, 2, layers=layers, rotary=RotaryConfig(skipped_layers=skipped))
    plain = tiny_lm(layers=3, rotary=RotaryConfig(skipped_layers=skipped))
    full = hidden_of(model, params)
    chex.assert_trees_all_close(full[0], plain.apply(params, TOKENS[:, :T])[0], atol=2e-5)
    # A model that never rotates has the same heads on the same trunk if and only if these do not.
    still, _ = made(chain, 2, layers=layers, positions="none")
    reading = model.read(params, TOKENS[:, :T])
    _, reading = model.head(params, 1, reading, TOKENS[:, :T])
    bare = replace(reading, table=None)
    following = TOKENS[:, 1 : T + 1]
    found = model.head(params, 2, reading, following)[0]
    chex.assert_trees_all_close(found, full[1], atol=2e-5)
    alike = np.allclose(found, still.head(params, 2, bare, following)[0], atol=2e-5)
    assert alike == (skipped == (2,))


@pytest.mark.parametrize("skipped", [(1,), (2,), (1, 3)])
def test_copies_of_a_layer_that_does_not_rotate_begin_as_it(skipped):
    some = config("parallel", 2, rotary=RotaryConfig(skipped_layers=skipped))
    model, params = multi_token_lm(some), lively(multi_token_lm(some).lm.init(jax.random.key(0)))
    first, second = hidden_of(model, add_heads(some, drop_heads(params), jax.random.key(2)))
    chex.assert_trees_all_close(first, second, atol=1e-6)


def test_a_sequential_head_is_its_equation():
    """arXiv 2412.19437, eq. 21-23: h' = M [RMSNorm(h) ; RMSNorm(Emb(x))], then a block, then the shared norm."""
    model, params = made("sequential", 3, layers=2, execution=ExecutionConfig(stacked=False))

    def normed(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.lm.config.norm_eps) * scale[None, None]

    block = tiny_lm(layers=1, execution=ExecutionConfig(stacked=False))
    end, reading = params["final_norm"], model.read(params, TOKENS[:, :T])
    h = reading.trunk_BTD
    _, reading = model.head(params, 1, reading, TOKENS[:, :T])
    for i in (2, 3):
        following = TOKENS[:, i - 1 : i - 1 + T]
        found, reading = model.head(params, i, reading, following)
        own = params[f"head_{i}"]
        both = jnp.concatenate([
            normed(h, own["hidden_norm"]["scale"]),
            normed(params["embedding"][following], own["embedding_norm"]["scale"]),
        ], axis=-1)  # fmt: skip
        merged = both @ own["merge"]["kernel"].reshape(32, 16)
        rest = {"embedding": params["embedding"], "layers_0": own["block"]}
        chex.assert_trees_all_close(found, block.apply({**rest, "final_norm": end}, merged)[0], atol=2e-5)
        h = reading.chain_BTD
        chex.assert_trees_all_close(normed(h, end["scale"]), found, atol=2e-5)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"heads = 4: expected less than model\.layers = 4"):
        config(heads=4)
    with pytest.raises(UserError, match="heads = 0"):
        config(heads=0)
    assert replace(config("linear"), heads=9).depth == 4
