"""Models and batches small enough to check by hand or by enumeration."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.types import Array, Distillation, Params, Preferences, TokenBatch
from lmlab.data.answers import lay_out_pairs, preferences_of
from lmlab.data.cache import TokenCache
from lmlab.data.distillation import Example, distillation_of, lay_out_examples
from lmlab.data.preferences import EncodedPair
from lmlab.models.config import (
    AttentionConfig,
    MLPConfig,
    ParameterTokens,
    RotaryConfig,
    TokenFormerConfig,
    TransformerConfig,
)
from lmlab.models.heads import multi_token_lm
from lmlab.models.heads_config import MultiTokenConfig
from lmlab.models.lm import LM, MultiTokenLM
from lmlab.models.tokenformer import tokenformer
from lmlab.models.transformer import transformer
from lmlab.objectives.divergence import top_k

VOCAB = 7


def tiny_config(**changes: object) -> TransformerConfig:
    """Two layers of width 16 over a vocabulary of 7."""
    fields = {
        "vocab_size": VOCAB, "layers": 2, "width": 16, "max_length": 32,
        "attention": AttentionConfig(heads=4, kv_heads=2), "mlp": MLPConfig(width=24),
    }  # fmt: skip
    return TransformerConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_lm(**changes: object) -> LM:
    """The LM of `tiny_config`."""
    return transformer(tiny_config(**changes))


def tiny_tokenformer_config(**changes: object) -> TokenFormerConfig:
    """Two layers of width 16 over a vocabulary of 7, no two numbers of parameter tokens alike."""
    fields = {
        "vocab_size": VOCAB, "layers": 2, "width": 16, "max_length": 32, "rotary": RotaryConfig(fraction=0.5),
        "attention": AttentionConfig(heads=4), "parameter_tokens": ParameterTokens(12, 8, 24),
    }  # fmt: skip
    return TokenFormerConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_tokenformer(**changes: object) -> LM:
    """The LM of `tiny_tokenformer_config`."""
    return tokenformer(tiny_tokenformer_config(**changes))


def tiny_multi_token_lm(chain: Any) -> MultiTokenLM:
    """Two heads, over three layers in all where they are layers."""
    return multi_token_lm(MultiTokenConfig(tiny_config(layers=3), 2, chain))


@partial(jax.jit, static_argnames="seed")
def lively(params: Params, seed: int = 0) -> Params:
    """The parameters with noise on every leaf: fresh ones hold zeros and ones that hide mistakes."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef, [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def random_batch(rows: int = 4, length: int = 9, seed: int = 0, vocab: int = VOCAB) -> TokenBatch:
    """Rows of two or three documents with padding at the end and some tokens that are no labels."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length), size=2, replace=False))
        pieces = np.split(np.arange(length), cuts)
        padded = rng.random() < 0.5
        for number, piece in enumerate(pieces, start=1):
            segments[row, piece] = 0 if padded and number == len(pieces) else number
            positions[row, piece] = np.arange(len(piece))
    return TokenBatch(
        tokens_BT=jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32),
        segments_BT=jnp.asarray(segments),
        positions_BT=jnp.asarray(positions),
        label_mask_BT=jnp.asarray(rng.random((rows, length)) < 0.8) & (jnp.asarray(segments) > 0),
    )


def random_pairs(count: int, seed: int = 0, vocab: int = VOCAB, longest: int = 4) -> list[EncodedPair]:
    """Pairs of random tokens, of 1 to `longest` tokens each; some weigh more, one has a margin."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, vocab, rng.integers(1, longest + 1)).astype(np.int32)
    weights = rng.choice([0.5, 1.0, 2.0], count)
    return [EncodedPair(f"pair {i}", draw(), (draw(), draw()), float(weights[i]), 0.0) for i in range(count)]


def random_preferences(
    rows: int = 4, length: int = 24, seed: int = 0, vocab: int = VOCAB
) -> Preferences:  # fmt: skip
    """Rows with two pairs or one each and reference log-probabilities; the last row may be padding."""
    made = lay_out_pairs(random_pairs(2 * rows - 1, seed, vocab), length)
    # Shapes are the same for all seeds.
    made = replace(made, per_row=2, labels=16, row_starts=np.minimum(2 * np.arange(rows + 1), 2 * rows - 1))
    reference = -np.random.default_rng(seed).exponential(3.0, (len(made.pairs), 2)).astype(np.float32)
    batch = preferences_of(replace(made, reference_N2=reference), range(rows), rows)
    return jax.tree.map(jnp.asarray, batch)


def random_examples(
    count: int, seed: int = 0, vocab: int = VOCAB, contexts: int = 2, longest: int = 4
) -> list[Example]:  # fmt: skip
    """Examples of random tokens after one of some contexts of 3 tokens; the parts have up to `longest` tokens each."""
    rng = np.random.default_rng(seed)
    draw = lambda least: rng.integers(0, vocab, rng.integers(least, longest + 1)).astype(np.int32)
    before = rng.integers(0, vocab, (contexts, 3)).astype(np.int32)
    weights = rng.choice([0.5, 1.0, 2.0], count)
    return [Example(f"example {i}", before[i % contexts], draw(1), draw(1), draw(0), draw(0), float(weights[i]))
            for i in range(count)]  # fmt: skip


def random_distillation(
    rows: int = 4, seed: int = 0, vocab: int = VOCAB, k: int = 0
) -> Distillation:  # fmt: skip
    """Rows of two examples or one each after a context of the row. k: the teacher's k best tokens are stored."""
    examples = random_examples(2 * rows - 1, seed, vocab, contexts=1, longest=3)
    made = lay_out_examples(examples, 24, 24, per_row=2)
    # Shapes are the same for all seeds.
    batch = jax.tree.map(jnp.asarray, distillation_of(replace(made, labels=8), range(rows), rows))
    if not k:
        return batch
    logits = 2 * jax.random.normal(jax.random.key(seed), (*batch.weights_BA.shape, vocab))
    return batch.replace(teacher=None, stored=top_k(logits, k))


def tiny_cache(name: str = "tiny", documents: int = 30, seed: int = 0, longest: int = 40) -> TokenCache:
    """Documents of 1 to `longest` random lower-case letters as byte tokens, in memory; document i is "NAME i"."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(97, 123, rng.integers(1, longest + 1)) for _ in range(documents)]
    offsets = np.concatenate([[0], np.cumsum([len(text) + 2 for text in texts])])
    tokens_N = np.concatenate([np.pad(text, 1, constant_values=256) for text in texts]).astype(np.uint16)
    return TokenCache(tokens_N, offsets, f"{name} {{}}".format, sum(map(len, texts)), f"{name} {documents} {seed}")


def all_sequences(vocab: int, length: int) -> Array:
    """Every sequence of the given length, int32 [vocab^length, length]."""
    return jnp.asarray(list(itertools.product(range(vocab), repeat=length)), jnp.int32)


@partial(jax.jit, static_argnums=(0, 3))
def sequence_logprobs(lm: LM, params: Params, tokens_BT: Array, prompt: int) -> Array:
    """Log p(tokens after the prompt | prompt) of whole sequences [B], by one full forward pass."""
    hidden_BTD, _ = lm.apply(params, tokens_BT[:, :-1])
    logprobs_BTV = jax.nn.log_softmax(lm.logits(params, hidden_BTD))
    chosen_BT = jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(chosen_BT[:, prompt - 1 :], axis=1)
