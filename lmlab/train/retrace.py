"""A second trace of a function that is to be compiled once is an error that says what changed."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


class RetraceError(TypeError):
    """A compiled function was given other shapes, dtypes or structure than before."""


def traced_once(function: Callable[P, R]) -> Callable[P, R]:
    """The function, to be given to `jax.jit`: a second trace raises `RetraceError` with the leaves that changed.

    A retrace costs a compilation each time, unseen: a last short batch, a weak type that becomes a strong one, a key
    that some batches lack. Calls that do not trace (`jax.disable_jit`) pass. What recompiles without a trace, such as
    another sharding of the arguments on Auto axes, is not seen.
    """
    signature = inspect.signature(function)
    traced: list[dict[str, str]] = []

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = signature.bind(*args, **kwargs).arguments
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return function(*args, **kwargs)
        leaves = _describe(arguments)
        if traced:
            name = getattr(function, "__name__", repr(function))
            raise RetraceError(f"{name} would be compiled a second time. {_changes(traced[0], leaves)}")
        result = function(*args, **kwargs)
        traced.append(leaves)
        return result

    return guarded


def _describe(arguments: dict[str, Any]) -> dict[str, str]:
    """Type of every leaf, and structure of every argument, by path."""
    found = {}
    for name, value in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            found[name + jax.tree_util.keystr(path)] = _type(leaf)
        found[f"structure of {name}"] = str(jax.tree.structure(value))
    return found


def _type(leaf: Any) -> str:
    """Such as "float32[2,3]"; for what is no array (a static argument), the value."""
    try:
        aval = jax.typeof(leaf)
    except TypeError:
        return repr(leaf)
    # JAX itself writes a weak type as "~float32[2,3]".
    return f"{aval} (weak type)".removeprefix("~") if getattr(aval, "weak_type", False) else str(aval)


def _changes(old: dict[str, str], new: dict[str, str]) -> str:
    """What differs, one leaf a line; the structure only where all leaves are the same."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    names = [name for name in names if not name.startswith("structure of ")] or names
    lines = [f"  {name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in names]
    if not lines:
        return "Its arguments are as before: a setting of JAX, the mesh, or its cache changed."
    return "\n".join(["What changed:", *lines])
