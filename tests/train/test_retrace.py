"""A function that is to be compiled once says which leaf made it compile again."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.types import Ratio, Terms
from lmlab.train.retrace import RetraceError, traced_once
from lmlab.train.state import init_state
from lmlab.train.step import make_step

BATCH = {"x": np.ones((4, 3), np.float32), "w": np.ones(4, np.float32)}


def quadratic(params, batch, key):
    return Terms({"loss": Ratio(jnp.sum((params["p"][None] - batch["x"]) ** 2), jnp.ones(()))}, {"loss": 1.0}, {})


def changed(**leaves):
    return {name: leaf for name, leaf in (BATCH | leaves).items() if leaf is not None}


@pytest.fixture
def step():
    """The train step, called twice."""
    tx = optax.adam(0.1)
    step = jax.jit(traced_once(make_step(quadratic, tx)))
    state = init_state(lambda key: {"p": jnp.ones(3)}, tx, 0)
    for _ in range(2):
        state, _ = step(state, BATCH)
    return lambda batch=BATCH, **changes: step(state.replace(**changes), batch)


def test_equal_calls_pass_whatever_their_values(step):
    state, _ = step(changed(x=np.zeros((4, 3), np.float32)))
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (changed(x=np.ones((2, 3), np.float32)), ["batch['x']: float32[4,3] -> float32[2,3]"]),
        (changed(x=np.ones((4, 3), np.int32)), ["batch['x']: float32[4,3] -> int32[4,3]"]),
        (changed(w=None, v=BATCH["w"]), ["batch['w']: float32[4] -> absent", "batch['v']: absent -> float32[4]"]),
        (changed(w=None), ["batch['w']: float32[4] -> absent"]),
    ],
    ids=["short batch", "dtype", "renamed key", "missing key"],
)
def test_what_changed_in_the_batch_is_named_and_nothing_else(step, batch, said):
    with pytest.raises(RetraceError, match="step would be compiled a second time") as caught:
        step(batch)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == said


def test_a_weak_type_in_the_state_is_named(step):
    with pytest.raises(RetraceError, match=re.escape("state.step: int32[] -> int32[] (weak type)")):
        step(step=2)


def test_another_structure_of_the_same_leaves_is_named():
    function = jax.jit(traced_once(lambda pair: pair[0] + pair[1]))
    function([1.0, 2.0])
    with pytest.raises(RetraceError, match=r"structure of pair: .*\[\*, \*\].* -> .*\(\*, \*\)"):
        function((1.0, 2.0))


def test_a_static_argument_is_named_with_its_values():
    function = jax.jit(traced_once(lambda x, mode: x), static_argnames="mode")
    function(1.0, mode="a")
    with pytest.raises(RetraceError, match="mode: 'a' -> 'b'"):
        function(1.0, mode="b")


def test_a_setting_that_traces_anew_is_told_from_an_argument(step):
    with jax.default_matmul_precision("float32"), pytest.raises(RetraceError, match="arguments are as before"):
        step()


def test_calls_that_do_not_trace_pass():
    function = traced_once(lambda x: 2 * x)
    with jax.disable_jit():
        assert [int(jax.jit(function)(jnp.ones(n)).sum()) for n in (1, 2)] == [2, 4]
    assert function(np.ones(3)).shape == (3,)


def test_a_trace_that_failed_does_not_count():
    function = jax.jit(traced_once(lambda x: x @ x))
    with pytest.raises(TypeError, match="dot_general"):
        function(jnp.ones((2, 3)))
    assert function(jnp.ones((2, 2))).shape == (2, 2)


def test_each_wrapper_counts_for_itself():
    functions = [jax.jit(traced_once(jnp.sum)) for _ in range(2)]
    assert [float(function(jnp.ones(n))) for n, function in enumerate(functions, start=1)] == [1, 2]
