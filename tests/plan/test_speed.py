"""Times of a step from round numbers, and which chips there are."""

from dataclasses import replace

import pytest

from lmlab.core.errors import UserError
from lmlab.core.sharding import MESH_AXES
from lmlab.data.config import DataConfig
from lmlab.models.config import AttentionConfig, ExecutionConfig, MLPConfig, TransformerConfig
from lmlab.models.flops import training_flops_per_token
from lmlab.plan.memory import Memory
from lmlab.plan.speed import link_bytes, link_rate, speed, weights
from lmlab.plan.table import advice
from lmlab.recipe import Pretrain
from lmlab.train.device import CHIPS, chip_named

MODEL = TransformerConfig(
    vocab_size=100, layers=2, width=8, attention=AttentionConfig(heads=2, kv_heads=1), mlp=MLPConfig(width=16),
    execution=ExecutionConfig(compute_dtype="bfloat16"),
)  # fmt: skip
RECIPE = Pretrain(model=MODEL, data=DataConfig(length=32, batch_size=64))
WEIGHTS = 2 * (8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16) + 800
NONE = Memory(0, 0, 0, 0, 0, 0, 0)


def shape(*sizes):
    return dict(zip(MESH_AXES, sizes, strict=True))


def test_one_device_sends_nothing_and_computes_by_the_peak():
    assert weights(MODEL) == WEIGHTS
    found = speed(RECIPE, shape(1, 1, 1, 1), CHIPS["v5e"], NONE, 0.5)
    assert found.links == {}
    assert found.tokens == 2048
    assert found.at_peak == pytest.approx(2048 * training_flops_per_token(MODEL, 32) / 197e12)
    assert found.at_mfu == 2 * found.at_peak
    assert found.slowest == max(found.at_mfu, found.memory)


def test_the_forward_pass_is_done_again_under_full_rematerialisation():
    full = replace(RECIPE, model=replace(MODEL, execution=replace(MODEL.execution, remat="full")))
    once, again = (speed(config, shape(1, 1, 1, 1), CHIPS["v5e"], NONE, 0.5) for config in (RECIPE, full))
    layers = training_flops_per_token(MODEL, 32) - 6 * 800
    assert again.at_peak - once.at_peak == pytest.approx(2048 * layers / 3 / 197e12)
    assert again.at_mfu == once.at_mfu


def test_bytes_on_the_links_by_axis():
    assert link_bytes(RECIPE, shape(2, 1, 1, 1)) == {"data": 2 * 0.5 * 4 * WEIGHTS}
    assert link_bytes(RECIPE, shape(1, 4, 1, 1)) == {"fsdp": 0.75 * WEIGHTS * (2 + 2 + 4)}
    assert link_bytes(RECIPE, shape(1, 1, 1, 2)) == {"tensor": 2 * 0.5 * 2048 * 8 * 2 * 2 * 4}
    assert link_bytes(RECIPE, shape(1, 1, 2, 1)) == {"context": 3 * 0.5 * 2048 * 2 * 4 * 2 * 2}


def test_gpus_beyond_a_node_are_on_the_network():
    rates = [link_rate(CHIPS["h100"], shape(4, 2, 1, 4), axis) / 1e9 for axis in ("data", "fsdp", "tensor")]
    assert rates == [50, 450, 450]
    assert link_rate(CHIPS["v5p"], shape(64, 8, 1, 8), "data") == 200e9


def test_chips_are_found_by_name_and_the_nearest_is_told():
    assert chip_named("H100") == CHIPS["h100"]
    with pytest.raises(UserError, match="Did you mean v5p"):
        chip_named("v5pp")
    with pytest.raises(UserError, match="compute_dtype"):
        speed(
            replace(RECIPE, model=replace(MODEL, execution=ExecutionConfig())), shape(1, 1, 1, 1), CHIPS["v4"], NONE, 1
        )


def test_advice_begins_with_what_is_largest():
    activations = Memory(1, 1, 0, 1, 90, 0, 7)
    assert "--train.microbatches 2" in advice(activations, RECIPE, shape(1, 1, 1, 1))[1]
    assert "more tensor" in "".join(advice(activations, RECIPE, shape(8, 8, 1, 1)))
    assert "more fsdp" in advice(Memory(30, 60, 0, 30, 1, 1, 1), RECIPE, shape(1, 1, 1, 1))[1]
    assert advice(Memory(1, 1, 0, 1, 1, 90, 1), RECIPE, shape(1, 1, 1, 1))[1] == (
        "  --objective.chunk 32: fewer logits at once"
    )
