"""Floating-point operations by count, not by compiler: XLA counts the body of a scan once."""

from lmlab.models.config import TransformerConfig


def training_flops_per_token(config: TransformerConfig, length: int) -> float:
    """Forward and backward pass of one token in a row of `length`: 6 per weight of a matmul, and attention.

    Causal attention is counted once: a query sees (length + 1) / 2 keys on average, or the window.
    The embedding is a look-up and costs nothing; the unembedding is a matmul. Recomputation is not counted.
    """
    size, width = config.head_dim, config.width
    attention = width * size * (2 * config.attention.heads + 2 * config.kv_heads)
    feed_forward = width * config.mlp_width * (3 if config.mlp.activation == "swiglu" else 2)
    seen = (length + 1) / 2
    if config.attention.window:
        seen = min(seen, config.attention.window)
    scores = 2 * config.attention.heads * size * seen
    return 6 * (config.layers * (attention + feed_forward + scores) + config.vocab_size * width)
