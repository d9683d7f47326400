"""Keys are pure functions of seed, use and step, the same in every process."""

import itertools
import zlib

import jax
import numpy as np

from lmlab.core.rng import key_for


def data(*args):
    return tuple(np.asarray(jax.random.key_data(key_for(*args))).tolist())


def test_every_seed_use_and_step_has_its_own_key():
    cases = [
        (jax.random.key(seed), use, step)
        for seed, use, step in itertools.product((0, 1), ("init", "objective", "eval"), (0, 1, 2))
    ]
    assert len({data(*case) for case in cases}) == len(cases)


def test_the_key_is_the_same_in_every_process():
    # Python's own hash of a text differs between processes; this one must not.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), zlib.crc32(b"objective")), 5)
    assert data(jax.random.key(3), "objective", 5) == tuple(np.asarray(jax.random.key_data(key)).tolist())
    assert zlib.crc32(b"objective") == 0xB996F101


def test_a_traced_step_gives_the_same_key():
    traced = jax.jit(lambda step: jax.random.key_data(key_for(jax.random.key(0), "eval", step)))(4)
    assert tuple(np.asarray(traced).tolist()) == data(jax.random.key(0), "eval", 4)
