"""A TokenFormer on meshes: the numbers of one device, and parameter tokens that are never brought together."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec
from meshes import BATCHES, INVOLUNTARY, TX, placed, trained

from lmlab.models.config import AttentionConfig, ParameterTokens
from lmlab.objectives.next_token import next_token
from lmlab.testing.tiny import tiny_tokenformer
from lmlab.train import parallel
from lmlab.train.config import ParallelConfig

COUNTS = ParameterTokens(44, 52, 92)
"""Sizes that no other dimension has."""
LM = tiny_tokenformer(vocab_size=8, attention=AttentionConfig(heads=4), parameter_tokens=COUNTS)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 4), (1, 4, 1, 2), (1, 2, 2, 2)], ids=str)
def test_meshes_give_the_numbers_of_one_device(sizes):
    few, objective = BATCHES[:5], next_token(LM)
    alone, on_mesh = trained(objective, lm=LM, batches=few), trained(objective, sizes, lm=LM, batches=few)
    chex.assert_trees_all_close(on_mesh, alone, atol=3e-5, rtol=1e-4)


def test_parameter_tokens_stay_where_they_are_stored(capfd):
    mesh = parallel.make_mesh(ParallelConfig(1, 2, 1, 4))
    with jax.set_mesh(mesh):
        step, state = placed(LM, TX, mesh, next_token(LM))
        hlo = step.lower(state, parallel.place_batch(BATCHES[0], mesh)).compile().as_text()
    assert INVOLUNTARY not in capfd.readouterr().err
    keys, values = (state.params["layers"]["ffn"][name] for name in ("keys", "values"))
    assert keys.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert values.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    sizes = {int(size) for shape in re.findall(r"\w\d*\[([\d,]+)\]", hlo) for size in shape.split(",")}
    # A quarter of each is everywhere, the whole of one nowhere.
    for count in (COUNTS.qkv, COUNTS.proj, COUNTS.ffn):
        assert count // 4 in sizes
        assert count not in sizes


def test_the_norm_of_scores_is_a_sum_over_devices():
    mesh = parallel.make_mesh(ParallelConfig(1, 1, 1, 4))
    lm = tiny_tokenformer(vocab_size=8, layers=1, parameter_tokens=COUNTS)
    with jax.set_mesh(mesh):
        _, state = placed(lm, optax.sgd(0.1), mesh)
        forward = jax.jit(lambda params, tokens: lm.apply(params, tokens)[0])
        hlo = forward.lower(state.params, jnp.zeros((5, 9), jnp.int32)).compile().as_text()
    reduced = re.findall(r"= (.*) all-reduce\(", hlo)
    one_number_a_token = [shape for shape in reduced if re.search(r"f32\[5,9(,1)*\]", shape)]
    assert len(one_number_a_token) >= 3
