"""The loop: rhythm, order of writing, interruption, numbers that are not finite."""

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmlab.core.types import Ratio, Terms
from lmlab.train.config import TrainConfig
from lmlab.train.loop import Callbacks, NonFiniteLossError, Watch, fit
from lmlab.train.state import State, init_state
from lmlab.train.step import make_step

TX = optax.sgd(0.1)


def quadratic(params, batch, key):
    return Terms({"loss": Ratio(jnp.sum((params["p"] - batch["x"]) ** 2), jnp.ones(()))}, {"loss": 1.0}, {})


@dataclass
class Recorder:
    """Everything the loop does, in order."""

    events: list[tuple] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def write(self, step, kind, values):
        self.events.append((step, kind) if kind == "speed" else (step, kind, values["loss"]))

    def update(self, step, values, tokens_per_second):
        self.events.append((step, "shown"))

    def say(self, text):
        self.said.append(text)


def stream(at=lambda step: None, poison=()):
    def batches(start):
        step = start
        while True:
            at(step)
            value = np.nan if step in poison else float(step % 3)
            yield {"x": np.full((2,), value, np.float32)}
            step += 1

    return batches


def train(config, state=None, **kwargs):
    recorder = Recorder()
    batches = kwargs.pop("batches", stream())
    saved: list[tuple[int, float | None]] = []
    calls = Callbacks(
        log=recorder, display=recorder,
        evaluate=lambda params: {"loss": float(params["p"][0])},
        sample=lambda step, params: recorder.events.append((step, "sample")),
        save=lambda state, held_out: (
            saved.append((int(state.step), held_out)), recorder.events.append((int(state.step), "save"))
        ),
        describe=lambda step: [f"document of step {step}"], tokens_per_step=4,
        **kwargs,
    )  # fmt: skip
    state = state or init_state(lambda key: {"p": jnp.ones(2)}, TX, 0)
    state, stopped = fit(state, make_step(quadratic, TX), batches, config, calls)
    return state, stopped, recorder, saved


def rows(recorder, *kinds):
    return [event for event in recorder.events if event[1] in kinds]


def test_everything_happens_when_due():
    config = TrainConfig(steps=7, log_every=2, eval_every=3, sample_every=3, checkpoint_every=4)
    state, stopped, recorder, saved = train(config)
    assert (int(state.step), stopped) == (7, None)
    assert [event[0] for event in rows(recorder, "train")] == [2, 4, 6, 7]
    assert [event[0] for event in rows(recorder, "eval")] == [3, 6, 7]
    assert [event[0] for event in rows(recorder, "sample")] == [3, 6, 7]
    assert [step for step, _ in saved] == [4, 7]
    assert saved[0][1] is None
    assert saved[1][1] is not None


def test_rows_of_a_step_are_written_before_its_checkpoint():
    config = TrainConfig(steps=4, log_every=1, eval_every=2, sample_every=2, checkpoint_every=2)
    _, _, recorder, _ = train(config)
    for step in (2, 4):
        order = [event[1] for event in recorder.events if event[0] == step and event[1] != "shown"]
        assert order == ["train", "speed", "eval", "sample", "save"]


def test_metrics_are_read_one_step_late():
    config = TrainConfig(steps=3, log_every=1, eval_every=100, sample_every=0, checkpoint_every=100)
    seen: list[tuple[int, int]] = []
    recorder_events: list[tuple] = []
    train(config, batches=stream(at=lambda step: seen.append((step, len(recorder_events)))))
    assert [step for step, _ in seen] == [0, 1, 2]


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_saves_and_the_rest_gives_the_same_numbers(number, name):
    config = TrainConfig(steps=9, log_every=1, eval_every=2, sample_every=2, checkpoint_every=100)
    whole, _, all_rows, _ = train(config)
    kick = lambda step: os.kill(os.getpid(), number) if step == 3 else None
    half, stopped, first, saved = train(config, batches=stream(at=kick))
    assert stopped == name
    assert saved == [(int(half.step), first.events[-3][2] if int(half.step) % 2 == 0 else None)]
    assert "run the same command" in first.said[-1]
    rest, stopped, second, _ = train(config, state=half)
    assert stopped is None
    assert np.array_equal(rest.params["p"], whole.params["p"])
    kinds = ("train", "eval", "sample")
    assert rows(first, *kinds) + rows(second, *kinds) == rows(all_rows, *kinds)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    train(TrainConfig(steps=1))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_loss_that_is_not_finite_stops_with_step_and_documents():
    config = TrainConfig(steps=9, log_every=1, eval_every=100, checkpoint_every=2)
    saved: list[int] = []
    with pytest.raises(NonFiniteLossError, match=r"step 4 .*document of step 3.*lower optim.schedule.peak") as caught:
        train(
            config,
            batches=stream(poison=(3,)),
        )
    assert np.isnan(caught.value.value)
    assert saved == []


def test_nothing_of_a_poisoned_step_is_saved():
    config = TrainConfig(steps=9, log_every=1, eval_every=100, checkpoint_every=4)
    steps: list[int] = []
    recorder = Recorder()
    calls = Callbacks(log=recorder, display=recorder, save=lambda state, _: steps.append(int(state.step)))
    state = init_state(lambda key: {"p": jnp.ones(2)}, TX, 0)
    with pytest.raises(NonFiniteLossError):
        fit(state, make_step(quadratic, TX), stream(poison=(3,)), config, calls)
    assert steps == []


def test_mfu_only_where_the_peak_is_known():
    config = TrainConfig(steps=2, log_every=1)
    values: list[dict] = []

    class Log(Recorder):
        def write(self, step, kind, row):
            if kind == "speed":
                values.append(dict(row))

    state: State = init_state(lambda key: {"p": jnp.ones(2)}, TX, 0)
    for peak in (None, 1e12):
        log = Log()
        fit(state, make_step(quadratic, TX), stream(), config,
            Callbacks(log=log, display=log, tokens_per_step=4, flops_per_step=1e6, peak_flops=peak))  # fmt: skip
    assert "mfu" not in values[0]
    assert values[-1]["mfu"] > 0
    assert values[-1]["data_wait_seconds"] >= 0


class Watched(Recorder):
    """A recorder that also notes when steps are given out and when it begins and ends to watch."""

    def watch(self, first, last, seconds=0.0):
        @contextmanager
        def context():
            self.events.append((None, "begins"))
            time.sleep(seconds)
            try:
                yield
            finally:
                time.sleep(seconds)
                self.events.append((None, "ends"))

        return Watch(first, last, context)

    def train(self, config, watch, state=None, batches=None):
        step = make_step(quadratic, TX)

        def noted(state, batch):
            self.events.append((int(state.step) + 1, "given out"))
            return step(state, batch)

        calls = Callbacks(
            log=self, display=self, watch=watch, tokens_per_step=4,
            evaluate=lambda params: {"loss": 0.0}, save=lambda state, _: self.events.append((int(state.step), "save")),
        )  # fmt: skip
        state = state or init_state(lambda key: {"p": jnp.ones(2)}, TX, 0)
        return fit(state, noted, batches or stream(), config, calls)

    def order(self):
        return [
            (step, what) for step, what, *_ in self.events if what in ("begins", "given out", "shown", "ends", "eval")
        ]


def test_the_watch_begins_and_ends_with_nothing_in_flight_and_holds_nothing_but_its_steps():
    recorder = Watched()
    recorder.train(TrainConfig(steps=6, eval_every=2, checkpoint_every=100), recorder.watch(3, 4))
    order = recorder.order()
    begins, ends = order.index((None, "begins")), order.index((None, "ends"))
    assert order[begins - 2 : begins] == [(2, "shown"), (2, "eval")]
    # Between them the loop runs as ever: a step is given out before the metrics of the last are read.
    assert order[begins + 1 : ends] == [(3, "given out"), (4, "given out"), (3, "shown"), (4, "shown")]
    assert order[ends + 1 : ends + 3] == [(4, "eval"), (5, "given out")]
    assert order.count((None, "begins")) == order.count((None, "ends")) == 1


@pytest.mark.parametrize(("first", "watched"), [(1, [1, 2, 3]), (3, [3]), (6, [6])])
def test_the_watch_may_begin_at_once_hold_one_step_and_end_with_the_run(first, watched):
    recorder = Watched()
    recorder.train(TrainConfig(steps=6, eval_every=100), recorder.watch(first, watched[-1]))
    order = recorder.order()
    begins, ends = order.index((None, "begins")), order.index((None, "ends"))
    assert order[:begins][-1:] == [(first - 1, "shown")] * (first > 1)
    assert [step for step, what in order[begins:ends] if what == "given out"] == watched
    assert order[ends - 1] == (watched[-1], "shown")


@pytest.mark.parametrize(("steps", "watched"), [(2, [3, 4]), (3, [4]), (4, None)])
def test_a_run_that_goes_on_watches_what_is_left(steps, watched):
    recorder = Watched()
    state, _ = recorder.train(TrainConfig(steps=steps), None)
    recorder.events.clear()
    recorder.train(TrainConfig(steps=6), recorder.watch(2, 4), state=state)
    order = recorder.order()
    assert ((None, "begins") in order) == (watched is not None)
    if watched:
        inside = order[order.index((None, "begins")) : order.index((None, "ends"))]
        assert [step for step, what in inside if what == "given out"] == watched


def test_the_watch_ends_when_the_run_does():
    recorder = Watched()
    kick = lambda step: signal.raise_signal(signal.SIGTERM) if step == 2 else None
    recorder.train(TrainConfig(steps=9), recorder.watch(2, 8), batches=stream(at=kick))
    assert [what for _, what, *_ in recorder.events][-2:] == ["ends", "save"]
    recorder = Watched()
    with pytest.raises(NonFiniteLossError):
        recorder.train(TrainConfig(steps=9), recorder.watch(2, 8), batches=stream(poison=(3,)))
    assert recorder.events[-1] == (None, "ends")


def test_the_time_of_beginning_and_ending_is_not_that_of_a_step():
    seconds = []

    class Log(Watched):
        def write(self, step, kind, values):
            seconds.extend([values["step_seconds"]] if kind == "speed" else [])

    log = Log()
    log.train(TrainConfig(steps=5, log_every=1, eval_every=100), log.watch(3, 3, seconds=1.0))
    assert len(seconds) == 5
    assert max(seconds[2:]) < 0.9
