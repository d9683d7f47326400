"""Buffers of small programs, counted by hand. Arrays of n float32 have 4n bytes."""

import jax
import jax.numpy as jnp
import pytest

from lmlab.plan.liveness import Buffer, buffers_of, peak

N = 64
MATRIX, VECTOR = 4 * N * N, 4 * N
X, M = jnp.zeros(N), jnp.zeros((N, N))


def most(function, *args, donated=False):
    return peak(buffers_of(jax.make_jaxpr(function)(*args).jaxpr, donated=donated))[0]


def test_the_fullest_moment_of_buffers_given():
    buffers = [Buffer(5, 0, 1, 3, ()), Buffer(7, 2, 2, 4, ()), Buffer(9, 4, 5, 6, ())]
    assert peak(buffers) == (16, 4)


def test_pointwise_operations_that_are_read_once_fuse():
    assert most(lambda x: jnp.exp(x * 2 + 1) / 3, X) == VECTOR
    assert most(lambda x: jnp.sum(jnp.exp(x * 2)), X) == 4


def test_what_a_matmul_reads_is_a_buffer():
    assert most(lambda m: m @ m, M) == MATRIX
    assert most(lambda m: jnp.exp(m) @ m, M) == 2 * MATRIX


def test_a_result_read_twice_is_kept():
    def twice(m):
        e = jnp.exp(m)
        return jnp.sum(e), e @ m

    assert most(twice, M) == 2 * MATRIX + 4


def test_views_cost_nothing():
    assert most(lambda m: (m.T.reshape(-1).reshape(N, N)) @ m, M) == MATRIX


def test_what_dies_is_overwritten_where_the_operation_can():
    assert most(lambda m: jnp.exp(m @ m) + 1, M) == MATRIX
    assert most(lambda m: (m @ m) @ m, M) == 2 * MATRIX


def test_a_donated_input_takes_the_result():
    assert most(lambda x: x + 1, X, donated=True) == 0
    assert most(lambda x: x + 1, X) == VECTOR


def test_a_loop_holds_one_turn_and_all_its_stacked_results():
    def turns(m, xs):
        return jax.lax.scan(lambda c, x: (c, jnp.exp(m @ m)[0] + x), 0.0, xs)[1]

    # The stack, and in the body the product; the counter of the loop is not an array of the jaxpr.
    assert most(turns, M, jnp.zeros((10, N))) == pytest.approx(10 * VECTOR + MATRIX, abs=VECTOR)


def test_a_carry_is_updated_in_place():
    add = lambda m: jax.lax.scan(lambda c, _: (c + m, None), jnp.zeros((N, N)), None, length=9)[0]
    assert most(add, M) == MATRIX


def test_rematerialisation_keeps_inputs_alone():
    def loss(m, policy):
        layer = lambda x, _: (jnp.sin(jnp.sin(x @ m) @ m), None)
        layer = jax.checkpoint(layer) if policy else layer
        return jnp.sum(jax.lax.scan(layer, M, None, length=20)[0])

    kept = [most(jax.grad(lambda m, p=policy: loss(m, p)), M) for policy in (False, True)]
    assert kept[1] > 20 * MATRIX
    assert kept[0] > 1.9 * kept[1]
