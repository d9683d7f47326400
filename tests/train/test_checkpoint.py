"""Checkpoints: exact, partial, verified; damage and foreign states are told apart."""

import json
import random
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lmlab.core.errors import UserError
from lmlab.testing.tiny import lively, tiny_lm
from lmlab.train.checkpoint import digests, finish, open_checkpoints, restore, restore_params, save
from lmlab.train.state import State, new_state

# orbax leaves the reads that were under way when one failed; Python says so when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LM = tiny_lm()
TX = optax.adam(1e-2)


def state_at(step: int, tx=TX, lm=LM) -> State:
    params = lively(lm.init(jax.random.key(0)), seed=step)
    return new_state(params, tx, jax.random.key(7)).replace(step=jnp.asarray(step, jnp.int32))


def write(folder: Path, steps=(1, 2, 3), **kwargs) -> None:
    checkpoints = open_checkpoints(folder, keep_last=3, **kwargs)
    for step in steps:
        save(checkpoints, state_at(step), {"note": step})
    finish(checkpoints)


def read(folder: Path, like: State | None = None) -> tuple[State | None, list[str]]:
    said: list[str] = []
    checkpoints = open_checkpoints(folder, say=said.append)
    state = restore(checkpoints, like or state_at(0))
    finish(checkpoints)
    return state, said


def same(one: State, two: State) -> None:
    plain = lambda state: state.replace(key=jax.random.key_data(state.key))
    chex.assert_trees_all_equal(plain(one), plain(two))


def test_round_trip_is_bit_for_bit(tmp_path):
    write(tmp_path)
    state, said = read(tmp_path)
    same(state, state_at(3))
    assert said == []


def test_an_empty_folder_holds_none(tmp_path):
    assert read(tmp_path)[0] is None


def test_params_come_alone_whatever_the_optimiser(tmp_path):
    write(tmp_path)
    checkpoints = open_checkpoints(tmp_path)
    step, params = restore_params(checkpoints, jax.eval_shape(LM.init, jax.random.key(0)))
    assert step == 3
    chex.assert_trees_all_equal(params, state_at(3).params)


def damage(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncate":
        data = data[: len(data) // 2]
    elif how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "flip many":
        # A single one may hit a place that nothing reads.
        for place in range(0, len(data), 16):
            data[place] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(data))


def largest(folder: Path, item: str) -> Path:
    return max((p for p in (folder / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("how", ["truncate", "flip many", "remove"])
@pytest.mark.parametrize("item", ["params", "rest", "meta"])
def test_damage_falls_back_with_a_line_and_keeps_the_pieces(tmp_path, how, item):
    write(tmp_path)
    damage(largest(tmp_path / "3", item), how, random.Random(0))
    state, said = read(tmp_path)
    same(state, state_at(2))
    assert len(said) == 1
    assert "checkpoint 3 is damaged" in said[0]
    assert (tmp_path / "damaged-3").is_dir()


def test_any_flipped_bit_in_the_arrays_is_noticed(tmp_path):
    write(tmp_path, steps=(1,))
    path = largest(tmp_path / "1", "params")
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(6):
        path.write_bytes(whole)
        damage(path, "flip", rng)
        checkpoints = open_checkpoints(tmp_path, say=lambda text: None)
        try:
            state = restore(checkpoints, state_at(0))
        except UserError:
            # Noticed; put it back for the next try.
            (tmp_path / "damaged-1").rename(tmp_path / "1")
            path = largest(tmp_path / "1", "params")
        else:
            same(state, state_at(1))  # a bit that carries nothing
        finish(checkpoints)


def test_all_damaged_is_said_not_started_over(tmp_path):
    write(tmp_path, steps=(1, 2))
    for step in (1, 2):
        damage(largest(tmp_path / str(step), "params"), "truncate", random.Random(0))
    for _ in range(2):
        with pytest.raises(UserError, match="at least one intact checkpoint"):
            read(tmp_path)


def test_a_checkpoint_of_another_model_or_optimiser_is_refused_untouched(tmp_path):
    write(tmp_path, steps=(1,))
    wide = tiny_lm(width=32)
    with pytest.raises(UserError, match=r"float32\[7, 32\] at params/embedding"):
        read(tmp_path, state_at(0, lm=wide))
    with pytest.raises(UserError, match="at opt_state"):
        read(tmp_path, state_at(0, tx=optax.sgd(0.1)))
    same(read(tmp_path)[0], state_at(1))


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpoints = open_checkpoints(tmp_path, keep_last=2, keep_best=1)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)]:
        save(checkpoints, state_at(step), {}, held_out=loss)
    finish(checkpoints)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]


def test_saving_a_step_twice_is_once(tmp_path):
    write(tmp_path, steps=(1, 1))
    assert read(tmp_path)[0] is not None


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    state = state_at(1)
    expected = jax.tree.map(lambda x: jnp.array(x, copy=True), state.params)
    save(checkpoints, state, {})
    overwrite = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda x: x * 0 - 1, s.params)), donate_argnums=0)
    overwrite(state)
    finish(checkpoints)
    chex.assert_trees_all_equal(read(tmp_path)[0].params, expected)


def test_digest_sees_every_element_and_ignores_the_mesh():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    base = digests({"x": x})["x"]
    changed = [digests({"x": x.at[i, j].add(1e-6)})["x"] for i in range(8) for j in range(6)]
    assert base not in changed
    assert digests({"x": x.T})["x"] != base
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert digests({"x": spread})["x"] == base
    for other in (jnp.arange(5), jnp.ones(3, jnp.bfloat16), jnp.asarray([True, False]), jax.random.key(0)):
        assert isinstance(digests({"x": other})["x"], int)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run folder"):
        open_checkpoints(tmp_path / "file" / "checkpoints")


def test_meta_holds_what_the_caller_adds(tmp_path):
    write(tmp_path, steps=(1,))
    found = [json.loads(p.read_text()) for p in (tmp_path / "1" / "meta").iterdir() if p.name == "metadata"]
    assert found[0]["extra"] == {"note": 1}
