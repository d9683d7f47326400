"""Floating-point operations by count, not by compiler: XLA counts the body of a scan once."""

from lmlab.models.config import DecoderConfig


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
