"""Floating-point operations by count, not by compiler: XLA counts the body of a scan once."""

from lmlab.models.config import DecoderConfig
from lmlab.models.heads_config import MultiTokenConfig, of_depth


def training_flops_per_token(config: DecoderConfig, length: int) -> float:
    """Forward and backward pass of one token in a row of `length`: 6 per weight of a matmul, and attention.

    Causal attention is counted once: a query sees (length + 1) / 2 keys on average, or the window.
    The embedding is a look-up and costs nothing; the unembedding is a matmul. Recomputation is not counted.
    """
    seen = (length + 1) / 2
    if config.attention.window:
        seen = min(seen, config.attention.window)
    scores = 2 * config.attention.heads * config.head_dim * seen
    return 6 * (config.layers * (config.layer_weights + scores) + config.vocab_size * config.width)


def further_heads_flops_per_token(config: MultiTokenConfig, length: int) -> float:
    """What the heads beyond the first add to `training_flops_per_token(config.model, length)`.

    An unembedding each; heads that are layers are among those of the model already.
    """
    model = config.model
    layer = training_flops_per_token(of_depth(model, 1), length) - 6 * model.vocab_size * model.width
    own = {"parallel": 0.0, "causal": 0.0, "linear": 6 * model.width**2, "sequential": layer + 12 * model.width**2}
    return (config.heads - 1) * (own[config.chain] + 6 * model.vocab_size * model.width)
