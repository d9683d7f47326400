"""A flax.linen decoder with the shape of google-deepmind/nanodo: 12,292,992 parameters.

Written from scratch; no line is nanodo's. Taken from its `nanodo/model.py`: learned positions added to
the token embedding; blocks of bias-free LayerNorm (epsilon 1e-6, scale but no shift) before each branch;
separate query, key and value DenseGeneral onto (head, size); queries scaled before the product; a dense
lower-triangular mask filled with the lowest float; a GELU MLP (tanh form) without gate; Xavier-uniform
kernels; a final LayerNorm and the tied embedding as output, logits whole in float32. Taken from its
`nanodo/train.py` and `nanodo/loss.py`: a flax TrainState, donated to one jitted step, over optax AdamW and
optax's integer-label cross-entropy.

Chosen here: the sizes of this benchmark, with an MLP of 4 x width = 1536, which is nanodo's own default
ratio and, having two matrices, weighs what the Llama's three of 1024 do; the position table then makes the
98,304 parameters it has over the Llama; and this benchmark's AdamW numbers and precision (nanodo's defaults
are b2 0.98, eps 1e-9, weight decay 0.1, a warmed-up cosine, bfloat16 activations). Left out, all of which
could only slow it: sharding annotations, optax.MultiSteps, per-layer statistics, weights for padding.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from benchmarks import peers

MLP_WIDTH = 4 * peers.WIDTH

_norm = partial(nn.LayerNorm, use_bias=False)
_dense = partial(nn.DenseGeneral, use_bias=False, kernel_init=nn.initializers.xavier_uniform())


class Attention(nn.Module):
    """Causal self-attention; x_BTD -> (B, T, D)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Attend from each position to itself and the ones before."""
        T, D = x_BTD.shape[1:]
        heads = (peers.N_HEADS, peers.HEAD_SIZE)
        q_BTNH = _dense(heads, name="query")(x_BTD) / peers.HEAD_SIZE**0.5
        k_BTNH = _dense(heads, name="key")(x_BTD)
        v_BTNH = _dense(heads, name="value")(x_BTD)
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)
        mask_TT = jnp.tril(jnp.ones((T, T), dtype=bool))
        scores_BNTS = jnp.where(mask_TT, scores_BNTS, jnp.finfo(jnp.float32).min)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
        out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)
        return _dense(D, axis=(-2, -1), name="out")(out_BTNH)


class Block(nn.Module):
    """Attention and MLP, each a residual branch behind its norm; x_BTD -> (B, T, D)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Add both branches to the stream."""
        x_BTD = x_BTD + Attention(name="attention")(_norm(name="attention_norm")(x_BTD))
        hidden_BTF = nn.gelu(_dense(MLP_WIDTH, name="up")(_norm(name="mlp_norm")(x_BTD)))
        return x_BTD + _dense(peers.WIDTH, name="down")(hidden_BTF)


class Decoder(nn.Module):
    """The whole model; tokens_BT -> logits (B, T, V)."""

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Predict the token after each position."""
        embed = nn.Embed(peers.VOCAB, peers.WIDTH, name="embed")
        positions = nn.Embed(peers.SEQ_LEN, peers.WIDTH, name="positions")
        x_BTD = embed(tokens_BT) + positions(jnp.arange(tokens_BT.shape[1]))
        for i in range(peers.N_LAYERS):
            x_BTD = Block(name=f"block_{i}")(x_BTD)
        return embed.attend(_norm(name="final_norm")(x_BTD))


def init_state(seed: int) -> TrainState:
    """Draw the weights and start the optimizer's state."""
    model = Decoder()
    tokens_BT = jnp.zeros((1, peers.SEQ_LEN), dtype=jnp.int32)
    optimizer = optax.adamw(
        peers.LEARNING_RATE,
        b1=peers.BETA_1,
        b2=peers.BETA_2,
        eps=peers.ADAM_EPS,
        weight_decay=peers.WEIGHT_DECAY,
    )
    params = jax.jit(model.init)(jax.random.key(seed), tokens_BT)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


def make_step(seed: int) -> peers.Step:
    """Build the model from `seed` and give its step; tokens_BT (8, 257) -> loss."""

    def update(state: TrainState, tokens_BT: jax.Array) -> tuple[TrainState, jax.Array]:
        def loss_fn(params):
            logits_BTV = state.apply_fn({"params": params}, tokens_BT[:, :-1])
            labels_BT = tokens_BT[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, labels_BT).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    jitted_update = jax.jit(update, donate_argnums=0)
    state = init_state(seed)

    def step(tokens_BT: np.ndarray) -> float:
        nonlocal state
        # The loss alone may be ready before the weights are; a timing must hold the whole step.
        state, loss = jax.block_until_ready(jitted_update(state, tokens_BT))
        return float(loss)

    return step
