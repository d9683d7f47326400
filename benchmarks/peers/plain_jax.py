"""A Llama as one would first write it in JAX: a dict of weights, one jitted step; 12,194,688 parameters.

No projection is fused with another, attention stays in (batch, time, head, size) order under a dense
mask, and the logits are formed whole.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import peers

INIT_SCALE = 0.02


def init_params(key: jax.Array) -> dict:
    """Draw the weights; kernels are (in, out), so that activations multiply from the left."""
    D, F = peers.WIDTH, peers.FFN
    kernels = dict.fromkeys("qkvo", (D, D)) | {"gate": (D, F), "up": (D, F), "down": (F, D)}
    embed_key, *layer_keys = jax.random.split(key, 1 + peers.N_LAYERS)
    layers = []
    for layer_key in layer_keys:
        keys = jax.random.split(layer_key, len(kernels))
        layer = {
            name: INIT_SCALE * jax.random.normal(k, shape)
            for k, (name, shape) in zip(keys, kernels.items(), strict=True)
        }
        layers.append(layer | {"attn_norm": jnp.ones(D), "ffn_norm": jnp.ones(D)})
    embed_VD = INIT_SCALE * jax.random.normal(embed_key, (peers.VOCAB, D))
    return {"embed": embed_VD, "layers": layers, "final_norm": jnp.ones(D)}


def loss_fn(params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy; tokens_BT (B, T+1) -> scalar."""
    inputs_BT, labels_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    T = inputs_BT.shape[1]
    mask_TT = jnp.tril(jnp.ones((T, T), dtype=bool))
    x_BTD = params["embed"][inputs_BT]
    for layer in params["layers"]:
        x_BTD = x_BTD + _attention(layer, _rms_norm(x_BTD, layer["attn_norm"]), mask_TT)
        x_BTD = x_BTD + _ffn(layer, _rms_norm(x_BTD, layer["ffn_norm"]))
    logits_BTV = _rms_norm(x_BTD, params["final_norm"]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, labels_BT).mean()


def make_step(seed: int) -> peers.Step:
    """Build the model from `seed` and give its step; tokens_BT (8, 257) -> loss."""
    optimizer = optax.adamw(
        peers.LEARNING_RATE,
        b1=peers.BETA_1,
        b2=peers.BETA_2,
        eps=peers.ADAM_EPS,
        weight_decay=peers.WEIGHT_DECAY,
    )

    def update(state, tokens_BT):
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BT)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    jitted_update = jax.jit(update, donate_argnums=0)
    params = init_params(jax.random.key(seed))
    state = (params, optimizer.init(params))

    def step(tokens_BT: np.ndarray) -> float:
        nonlocal state
        # The loss alone may be ready before the weights are; a timing must hold the whole step.
        state, loss = jax.block_until_ready(jitted_update(state, tokens_BT))
        return float(loss)

    return step


def _rms_norm(x_BTD: jax.Array, scale_D: jax.Array) -> jax.Array:
    mean_square_BT1 = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
    return x_BTD * jax.lax.rsqrt(mean_square_BT1 + peers.NORM_EPS) * scale_D


def _rotate(x_BTNH: jax.Array) -> jax.Array:
    # The half split: dimension i of a head turns together with dimension i + H/2.
    T, half = x_BTNH.shape[1], peers.HEAD_SIZE // 2
    frequency_h = peers.ROPE_BASE ** (-jnp.arange(half) / half)
    angle_T1h = jnp.arange(T)[:, None, None] * frequency_h
    cos_T1h, sin_T1h = jnp.cos(angle_T1h), jnp.sin(angle_T1h)
    left, right = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([left * cos_T1h - right * sin_T1h, right * cos_T1h + left * sin_T1h], axis=-1)


def _attention(layer: dict, x_BTD: jax.Array, mask_TT: jax.Array) -> jax.Array:
    heads = (*x_BTD.shape[:2], peers.N_HEADS, peers.HEAD_SIZE)
    q_BTNH = _rotate((x_BTD @ layer["q"]).reshape(heads))
    k_BTNH = _rotate((x_BTD @ layer["k"]).reshape(heads))
    v_BTNH = (x_BTD @ layer["v"]).reshape(heads)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / peers.HEAD_SIZE**0.5
    weights_BNTS = jax.nn.softmax(jnp.where(mask_TT, scores_BNTS, -jnp.inf), axis=-1)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)
    return out_BTNH.reshape(x_BTD.shape) @ layer["o"]


def _ffn(layer: dict, x_BTD: jax.Array) -> jax.Array:
    return (jax.nn.silu(x_BTD @ layer["gate"]) * (x_BTD @ layer["up"])) @ layer["down"]
