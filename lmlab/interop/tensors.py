"""Which tensor of transformers is which block of which parameter, as tables of names and patterns.

A pattern reads as in einops: `(n h) d -> d n h` says that the rows of a tensor are heads times their size, and in what
order the parameter has them. A digit is a place in an axis that the other side does not have: among three, query, key
and value, of a fused tensor; in the axis `stack` of a parameter. Layers have a tensor each and are stacked here.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FUSED = 3
"""Query, key and value."""

Rules = tuple[tuple[str, str, str], ...]
"""Path of the parameter, name of the tensor with {} for the layer, pattern."""

_DECODER: Rules = (
    ("embedding", "model.embed_tokens.weight", "v d -> v d"),
    ("layers.attention_norm.scale", "model.layers.{}.input_layernorm.weight", "d -> d"),
    ("layers.attention.query.kernel", "model.layers.{}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    ("layers.attention.query.bias", "model.layers.{}.self_attn.q_proj.bias", "(n h) -> n h"),
    ("layers.attention.key_value.kernel", "model.layers.{}.self_attn.k_proj.weight", "(k h) d -> d 0 k h"),
    ("layers.attention.key_value.bias", "model.layers.{}.self_attn.k_proj.bias", "(k h) -> 0 k h"),
    ("layers.attention.key_value.kernel", "model.layers.{}.self_attn.v_proj.weight", "(k h) d -> d 1 k h"),
    ("layers.attention.key_value.bias", "model.layers.{}.self_attn.v_proj.bias", "(k h) -> 1 k h"),
    ("layers.attention.query_norm.scale", "model.layers.{}.self_attn.q_norm.weight", "h -> h"),
    ("layers.attention.key_norm.scale", "model.layers.{}.self_attn.k_norm.weight", "h -> h"),
    ("layers.attention.out.kernel", "model.layers.{}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    ("layers.attention.out.bias", "model.layers.{}.self_attn.o_proj.bias", "d -> d"),
    ("layers.mlp_norm.scale", "model.layers.{}.post_attention_layernorm.weight", "d -> d"),
    ("layers.mlp.gate_up.kernel", "model.layers.{}.mlp.gate_proj.weight", "f d -> d 0 f"),
    ("layers.mlp.gate_up.bias", "model.layers.{}.mlp.gate_proj.bias", "f -> 0 f"),
    ("layers.mlp.gate_up.kernel", "model.layers.{}.mlp.up_proj.weight", "f d -> d 1 f"),
    ("layers.mlp.gate_up.bias", "model.layers.{}.mlp.up_proj.bias", "f -> 1 f"),
    ("layers.mlp.down.kernel", "model.layers.{}.mlp.down_proj.weight", "d f -> f d"),
    ("layers.mlp.down.bias", "model.layers.{}.mlp.down_proj.bias", "d -> d"),
    ("final_norm.scale", "model.norm.weight", "d -> d"),
    ("unembedding", "lm_head.weight", "v d -> v d"),
)
_GPT2: Rules = (
    ("embedding", "transformer.wte.weight", "v d -> v d"),
    ("position_embedding", "transformer.wpe.weight", "p d -> p d"),
    ("layers.attention_norm.scale", "transformer.h.{}.ln_1.weight", "d -> d"),
    ("layers.attention_norm.bias", "transformer.h.{}.ln_1.bias", "d -> d"),
    ("layers.attention.query.kernel", "transformer.h.{}.attn.c_attn.weight", "d (0 n h) -> d n h"),
    ("layers.attention.key_value.kernel", "transformer.h.{}.attn.c_attn.weight", "d (1 k h) -> d 0 k h"),
    ("layers.attention.key_value.kernel", "transformer.h.{}.attn.c_attn.weight", "d (2 k h) -> d 1 k h"),
    ("layers.attention.query.bias", "transformer.h.{}.attn.c_attn.bias", "(0 n h) -> n h"),
    ("layers.attention.key_value.bias", "transformer.h.{}.attn.c_attn.bias", "(1 k h) -> 0 k h"),
    ("layers.attention.key_value.bias", "transformer.h.{}.attn.c_attn.bias", "(2 k h) -> 1 k h"),
    ("layers.attention.out.kernel", "transformer.h.{}.attn.c_proj.weight", "(n h) d -> n h d"),
    ("layers.attention.out.bias", "transformer.h.{}.attn.c_proj.bias", "d -> d"),
    ("layers.mlp_norm.scale", "transformer.h.{}.ln_2.weight", "d -> d"),
    ("layers.mlp_norm.bias", "transformer.h.{}.ln_2.bias", "d -> d"),
    ("layers.mlp.up.kernel", "transformer.h.{}.mlp.c_fc.weight", "d f -> d f"),
    ("layers.mlp.up.bias", "transformer.h.{}.mlp.c_fc.bias", "f -> f"),
    ("layers.mlp.down.kernel", "transformer.h.{}.mlp.c_proj.weight", "f d -> f d"),
    ("layers.mlp.down.bias", "transformer.h.{}.mlp.c_proj.bias", "d -> d"),
    ("final_norm.scale", "transformer.ln_f.weight", "d -> d"),
    ("final_norm.bias", "transformer.ln_f.bias", "d -> d"),
    ("unembedding", "lm_head.weight", "v d -> v d"),
)
_NEOX_QKV = "gpt_neox.layers.{}.attention.query_key_value"
_NEOX: Rules = (
    ("embedding", "gpt_neox.embed_in.weight", "v d -> v d"),
    ("layers.attention_norm.scale", "gpt_neox.layers.{}.input_layernorm.weight", "d -> d"),
    ("layers.attention_norm.bias", "gpt_neox.layers.{}.input_layernorm.bias", "d -> d"),
    ("layers.mlp_norm.scale", "gpt_neox.layers.{}.post_attention_layernorm.weight", "d -> d"),
    ("layers.mlp_norm.bias", "gpt_neox.layers.{}.post_attention_layernorm.bias", "d -> d"),
    ("layers.attention.query.kernel", f"{_NEOX_QKV}.weight", "(n 0 h) d -> d n h"),
    ("layers.attention.key_value.kernel", f"{_NEOX_QKV}.weight", "(k 1 h) d -> d 0 k h"),
    ("layers.attention.key_value.kernel", f"{_NEOX_QKV}.weight", "(k 2 h) d -> d 1 k h"),
    ("layers.attention.query.bias", f"{_NEOX_QKV}.bias", "(n 0 h) -> n h"),
    ("layers.attention.key_value.bias", f"{_NEOX_QKV}.bias", "(k 1 h) -> 0 k h"),
    ("layers.attention.key_value.bias", f"{_NEOX_QKV}.bias", "(k 2 h) -> 1 k h"),
    ("layers.attention.out.kernel", "gpt_neox.layers.{}.attention.dense.weight", "d (n h) -> n h d"),
    ("layers.attention.out.bias", "gpt_neox.layers.{}.attention.dense.bias", "d -> d"),
    ("layers.mlp.up.kernel", "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "f d -> d f"),
    ("layers.mlp.up.bias", "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "f -> f"),
    ("layers.mlp.down.kernel", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "d f -> f d"),
    ("layers.mlp.down.bias", "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "d -> d"),
    ("final_norm.scale", "gpt_neox.final_layer_norm.weight", "d -> d"),
    ("final_norm.bias", "gpt_neox.final_layer_norm.bias", "d -> d"),
    ("unembedding", "embed_out.weight", "v d -> v d"),
)
RULES: Mapping[str, Rules] = {"gpt2": _GPT2, "gpt_neox": _NEOX}
"""By model_type; all others are named as Llama is."""
BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
"""Tensors of old files that are no weights: causal masks and rotary frequencies."""


@dataclass(frozen=True)
class Factor:
    """A factor of an axis of a tensor: a letter of its pattern, or one place."""

    letter: str
    size: int
    place: int | None = None


@dataclass(frozen=True)
class Part:
    """A block of a parameter that is a tensor, or lies in one."""

    leaf: str
    block: tuple[int | None, ...]
    """Index of the block in the parameter; None: the whole axis."""
    letters: str
    """Letters of the axes of the block."""
    tensor: str
    axes: tuple[tuple[Factor, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(math.prod(factor.size for factor in axis) for axis in self.axes)


def base_prefix(model_type: str) -> str:
    """What the names of all tensors but the head begin with; files of the bare model lack it."""
    return RULES.get(model_type, _DECODER)[0][1].split(".")[0] + "."


def head_name(model_type: str) -> str:
    """The tensor of the unembedding, which some files hold although it is tied."""
    return RULES.get(model_type, _DECODER)[-1][1]


def parts_of(model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
    """Every part of a model, layer by layer. shapes: of its parameters by path."""
    rules = [rule for rule in RULES.get(model_type, _DECODER) if rule[0] in shapes]
    missing = set(shapes) - {leaf for leaf, _, _ in rules}
    assert not missing, f"{model_type} has no tensors for {missing}: its config should not have been accepted"
    runs: list[list[Part]] = [[]]
    in_layers = False
    for rule in rules:
        if ("{}" in rule[1]) != in_layers:
            in_layers = not in_layers
            runs.append([])
        runs[-1] += _instances(rule, shapes[rule[0]])
    # Within a run of rules for layers, all of the first layer comes before the second.
    order = lambda part: part.block[0] if part.leaf.startswith("layers.") else 0
    return [part for run in runs for part in sorted(run, key=order)]


def _instances(rule: tuple[str, str, str], shape: tuple[int, ...]) -> list[Part]:
    leaf, tensor, pattern = rule
    left, right = pattern.split(" -> ")
    names = right.split()
    stacked = "{}" in tensor
    layers, sizes = (shape[0], shape[1:]) if stacked else (1, shape)
    size_of = dict(zip(names, sizes, strict=True))
    axes = tuple(
        tuple(
            Factor(name, FUSED, int(name)) if name.isdigit() else Factor(name, size_of[name])
            for name in group.strip("()").split()
        )
        for group in re.findall(r"\([^)]*\)|\S+", left)
    )
    inner = tuple(int(name) if name.isdigit() else None for name in names)
    letters = "".join(name for name in names if not name.isdigit())
    block = lambda layer: (layer, *inner) if stacked else inner
    return [Part(leaf, block(layer), letters, tensor.format(layer), axes) for layer in range(layers)]


def read_part(
    part: Part, read: Callable[[str, tuple[slice, ...]], np.ndarray], window: Mapping[str, slice]
) -> np.ndarray:  # fmt: skip
    """The part, or of each of its axes what `window` says by letter, in the order of the parameter.

    Of the tensor is read what a contiguous range of each axis allows, and no more.
    """
    ranges, shape, trims = [], [], []
    for axis in part.axes:
        wanted, covered, trim = _cover(axis, window)
        ranges.append(wanted)
        shape += covered
        trims += trim
    block = read(part.tensor, tuple(ranges)).reshape(shape)[tuple(trims)]
    order = _letters(part)
    return block.transpose([order.index(letter) for letter in part.letters])


def _cover(axis: Sequence[Factor], window: Mapping[str, slice]) -> tuple[slice, list[int], list[int | slice]]:
    """The range of an axis to read, the sizes of its factors within, and the index of what is wanted there."""
    start, stride, whole = 0, math.prod(factor.size for factor in axis), False
    covered: list[int] = []
    trims: list[int | slice] = []
    for factor in axis:
        stride //= factor.size
        wanted = window.get(factor.letter, slice(0, factor.size))
        if factor.place is not None:
            wanted = slice(factor.place, factor.place + 1)
        if whole:
            covered.append(factor.size)
            trims.append(wanted if factor.place is None else factor.place)
            continue
        start += wanted.start * stride
        covered.append(wanted.stop - wanted.start)
        trims.append(slice(None) if factor.place is None else 0)
        # Of the factors within a longer range all is covered.
        whole = covered[-1] != 1
    return slice(start, start + math.prod(covered)), covered, trims


def write_tensor(parts: Iterable[Part], fetch: Callable[[Part], np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The tensor that the parts make up. `fetch` gives a block in the order of the parameter."""
    parts = list(parts)
    tensor = np.empty(parts[0].shape, dtype)
    for part in parts:
        factors = [factor for axis in part.axes for factor in axis]
        view = tensor.reshape([factor.size for factor in factors])
        place = tuple(slice(None) if factor.place is None else factor.place for factor in factors)
        view[place] = fetch(part).transpose([part.letters.index(letter) for letter in _letters(part)])
    return tensor


def _letters(part: Part) -> str:
    return "".join(factor.letter for axis in part.axes for factor in axis if factor.place is None)
