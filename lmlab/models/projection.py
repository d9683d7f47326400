"""Products of activations with weights, and look-ups in tables, on one device as on many.

A weight is stored in parts, brought together in the compute type where it is used, and again in the backward pass, so
that no device holds more than one layer whole (arXiv 1910.02054, stage 3). Gradients of weights are summed in float32
whatever the compute type, over devices too, and go back to the parts.
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from lmlab.core.sharding import STORED, constrain, devices_in_mesh, sum_over_tokens
from lmlab.core.types import Array

Names: TypeAlias = tuple[str, ...]


class End(NamedTuple):
    """Which axes of an operand are contracted: its first or last `number`."""

    first: bool
    number: int

    def axes(self, x: Array) -> tuple[int, ...]:
        """Their numbers in x."""
        return tuple(range(self.number) if self.first else range(x.ndim - self.number, x.ndim))

    def kept(self, x: Array) -> tuple[int, ...]:
        """Sizes of the others."""
        return x.shape[self.number :] if self.first else x.shape[: x.ndim - self.number]

    def matrix(self, x: Array) -> Array:
        """X with the contracted axes as one, and the others as one."""
        return x.reshape(-1, math.prod(self.kept(x))) if self.first else x.reshape(math.prod(self.kept(x)), -1)


def _dot(a: Array, a_end: End, b: Array, b_end: End, dtype: Any = None) -> Array:
    """Contract an end of a with an end of b; the other axes of a, then those of b, stay."""
    if devices_in_mesh() > 1:
        # Axes that are divided over devices must not be merged with others.
        dims = ((a_end.axes(a), b_end.axes(b)), ((), ()))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)
    # Two plain matrices. With more axes than two, XLA on the CPU transposes activations to form a kernel's gradient:
    # the whole layer then takes 1.7 times as long.
    flat = (((int(not a_end.first),), (int(not b_end.first),)), ((), ()))
    out = jax.lax.dot_general(a_end.matrix(a), b_end.matrix(b), flat, preferred_element_type=dtype)
    return out.reshape(*a_end.kept(a), *b_end.kept(b))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(x: Array, kernel: Array, names: Names, inputs: int, dtype: Any = None) -> Array:
    """X [..., *ins] times kernel [*ins, *outs] -> [..., *outs], in `dtype` or the type of x.

    names: logical axes of the kernel; its first `inputs` axes are contracted with the last ones of x.
    """
    return _dot(x, End(False, inputs), constrain(kernel.astype(x.dtype), names), End(True, inputs), dtype)


def _project_forward(
    x: Array, kernel: Array, names: Names, inputs: int, dtype: Any
) -> tuple[Array, tuple[Array, Array]]:  # fmt: skip
    return project(x, kernel, names, inputs, dtype), (x, kernel)


def _project_backward(
    names: Names, inputs: int, dtype: Any, residuals: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:  # fmt: skip
    del dtype
    x, kernel = residuals
    slope = slope.astype(x.dtype)
    weights = constrain(kernel.astype(x.dtype), names)
    outputs = End(False, kernel.ndim - inputs)
    x_slope = _dot(slope, outputs, weights, outputs)

    def over_tokens(_: None, x: Array, slope: Array) -> Array:
        leading = End(True, x.ndim - inputs)
        return _dot(x, leading, slope, leading, jnp.float32)

    if x.ndim == inputs + 2:  # [B, T, *ins]
        over_tokens = sum_over_tokens(over_tokens, names=names, divided=(names[:inputs], names[inputs:]))
    kernel_slope = over_tokens(None, x, slope)
    return x_slope, constrain(kernel_slope, names, STORED).astype(kernel.dtype)


project.defvjp(_project_forward, _project_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table_VD: Array, ids: Array, names: Names, dtype: Any) -> Array:
    """Rows of a table: ids [...] -> [..., D] in `dtype`. Ids outside the table are clamped."""
    return constrain(table_VD.astype(dtype), names)[ids]


def _look_up_forward(
    table_VD: Array, ids: Array, names: Names, dtype: Any
) -> tuple[Array, tuple[Array, Array]]:  # fmt: skip
    # An empty slice remembers shape and type of the table without holding it.
    return look_up(table_VD, ids, names, dtype), (table_VD[:, :0], ids)


def _look_up_backward(
    names: Names, dtype: Any, residuals: tuple[Array, Array], slope: Array
) -> tuple[Array, None]:  # fmt: skip
    del dtype
    like_V0, ids = residuals

    def scatter(zeros_VD: Array, ids: Array, slope: Array) -> Array:
        return zeros_VD.at[ids].add(slope.astype(jnp.float32))

    zeros_VD = constrain(jnp.zeros((len(like_V0), slope.shape[-1]), jnp.float32), names)
    table_slope = sum_over_tokens(scatter, names=names)(zeros_VD, ids, slope)
    return constrain(table_slope, names, STORED).astype(like_V0.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)
