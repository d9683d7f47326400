"""What the parts of the experiment share: all seeds of an arm at once, each on rows of a pool of its own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from lmlab.core.rng import key_for
from lmlab.core.types import Batch, Objective, Params
from lmlab.data.distillation import Example, distillation_of, lay_out_examples
from lmlab.models.lm import LM
from lmlab.objectives.distill import TEACHER
from lmlab.optim.chain import build_optimizer
from lmlab.optim.config import OptimConfig, ScheduleConfig
from lmlab.train.state import State, new_state
from lmlab.train.step import make_step

Score: TypeAlias = Callable[[Params, Any], dict[str, jax.Array]]
"""`score(params, seed's number) -> values`, of one seed."""
Curves: TypeAlias = dict[str, list[list[float]]]
"""By name, of every look the values of all seeds."""


def member(tree: Any, seed: int) -> Any:
    """The part of one seed."""
    return jax.tree.map(lambda x: x[seed], tree)


def pools(examples: Sequence[Sequence[Example]], teacher_length: int, student_length: int) -> Batch:
    """Rows [S, N, ...] of one example each; N is the least number of a seed."""
    count = min(map(len, examples))
    made = [lay_out_examples(some[:count], teacher_length, student_length, shared=False, per_row=1)
            for some in examples]  # fmt: skip
    return stacked([distillation_of(rows, range(count), count) for rows in made])


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of the same shape as one with a first axis."""
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *trees)


class Arm:
    """Trainings [S] of one model on one objective, in pieces; the parameters of teachers stand still."""

    def __init__(
        self, lm: LM, objective: Objective, params: Params, steps: int, rows: int, peak: float,
        draw: Callable[[Any, Any, int], Batch] | None = None,
    ) -> None:  # fmt: skip
        schedule = ScheduleConfig(peak=peak, warmup=0.1, end=0.1)
        tx = build_optimizer(OptimConfig(schedule=schedule, weight_decay=0.0), lm.axes, steps)
        step, draw = make_step(objective, tx), draw or _rows
        still = (TEACHER,) if TEACHER in params else ()

        def one(pool: Any, state: State, _: None) -> tuple[State, None]:
            return step(state, draw(pool, key_for(state.key, "rows", state.step), rows))[0], None

        self._new = jax.jit(jax.vmap(lambda params, key: new_state(params, tx, key, still=still)))
        self._advance = jax.jit(
            lambda states, pool, count: jax.vmap(
                lambda state, pool: jax.lax.scan(partial(one, pool), state, length=count)[0]
            )(states, pool),
            static_argnums=2,
        )  # fmt: skip
        self.begin(params)

    def begin(self, params: Params) -> None:
        """Begin anew, with parameters [S, ...]."""
        keys = jax.vmap(jax.random.key)(jnp.arange(len(jax.tree.leaves(params)[0])))
        self.states = self._new(params, keys)

    def advance(self, pool: Any, count: int) -> Params:
        """Parameters [S, ...] after so many steps more."""
        self.states = self._advance(self.states, pool, count)
        return self.students

    @property
    def students(self) -> Params:
        """Parameters [S, ...] without those of the teachers."""
        return {name: part for name, part in self.states.params.items() if name != TEACHER}


def _rows(pool: Any, key: Any, rows: int) -> Batch:
    """So many rows of a pool, at random."""
    chosen = jax.random.randint(key, (rows,), 0, len(jax.tree.leaves(pool)[0]))
    return jax.tree.map(lambda x: x[chosen], pool)


def curves_of(
    arm: Arm, pool: Any, steps: int, every: int, score: Callable[[Params], dict[str, np.ndarray]],
    refresh: Callable[[Params], Any] | None = None,
) -> tuple[Params, Curves]:  # fmt: skip
    """Train and look every so many steps. refresh: a new pool from the students, made after each look."""
    curves: Curves = {}
    params = arm.students
    for now in range(0, steps + 1, every):
        if now:
            params = arm.advance(pool, every)
        for name, values in score(params).items():
            curves.setdefault(name, []).append(np.asarray(values).round(4).tolist())
        if refresh is not None and now < steps:
            pool = refresh(params)
    return params, curves


def recovery(curve: Sequence[Sequence[float]], ceiling: Sequence[float]) -> list[float]:
    """(after - floor) / (ceiling - floor) of every seed; the floor is the first look."""
    floor, after = np.asarray(curve[0]), np.asarray(curve[-1])
    return ((after - floor) / np.maximum(np.asarray(ceiling) - floor, 1e-9)).round(4).tolist()
