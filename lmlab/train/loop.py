"""The one loop: dispatch step n, then read the metrics of step n - 1; evaluate, sample and save when due."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Protocol

import jax

from lmlab.core.errors import UserError
from lmlab.core.types import Batch, Params
from lmlab.train.config import TrainConfig
from lmlab.train.state import State
from lmlab.train.step import Step

Values = Mapping[str, float]


class Log(Protocol):
    """Where rows of metrics go."""

    def write(self, step: int, kind: str, values: Values) -> None:
        """Add a row; kind is train, eval, or speed (whatever depends on the clock)."""


class Display(Protocol):
    """What the user watches."""

    def update(self, step: int, values: Values, tokens_per_second: float) -> None:
        """Show the newest step."""

    def say(self, text: str) -> None:
        """Show a line."""


class Silent:
    """Log and display of the processes of a job that write nothing."""

    def write(self, step: int, kind: str, values: Values) -> None:
        """See `Log`."""

    def update(self, step: int, values: Values, tokens_per_second: float) -> None:
        """See `Display`."""

    def say(self, text: str) -> None:
        """See `Display`."""


def ignore(*_: Any) -> None:
    """Do nothing: the default of everything optional here."""


@dataclass(frozen=True)
class Watch:
    """A context that is held around some steps, for whoever looks at them from outside (a profiler)."""

    first: int
    """Entered before this step is given out, or the first after it where the run goes on from beyond it."""
    last: int
    """Left when this step is finished."""
    context: Callable[[], AbstractContextManager[Any]]
    """Entered and left with nothing in flight, at most once; its own time does not count as that of a step."""


@dataclass(frozen=True)
class Callbacks:
    """What the loop calls; it knows no model, objective or data."""

    log: Log
    display: Display
    evaluate: Callable[[Params], Values] | None = None
    """Held-out values; `loss` among them decides which checkpoint is best."""
    sample: Callable[[int, Params], None] = ignore
    """Called with the step and the parameters when a sample is due."""
    save: Callable[[State, float | None], None] = ignore
    """Called with the state and, where just evaluated, its held-out loss."""
    describe: Callable[[int], list[str]] = lambda step: []
    """Names of the documents in the batch of a step, for the message of a run that stops."""
    agree: Callable[[int], int] = lambda number: number
    """Given the number of the signal that this process received (0: none), that of the whole job."""
    watch: Watch | None = None
    """Who looks at some of the steps; None: nobody."""
    before: bool = False
    """Whether a new run evaluates and samples before its first step, too: the parameters are a model already."""
    tokens_per_step: int = 0
    flops_per_step: float = 0.0
    peak_flops: float | None = None
    """Peak of all devices together, in FLOP/s; None: unknown, and then no MFU is reported."""


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite."""


def fit(
    state: State,
    step_fn: Step,
    batches: Callable[[int], Iterator[Batch]],
    config: TrainConfig,
    calls: Callbacks,
) -> tuple[State, str | None]:
    """Train from `state.step` to `config.steps`; returns the state, and the signal that ended it early or None.

    batches: `batches(first_step)` yields the batch of every step from there on. The first SIGINT or SIGTERM
    ends the step in hand and saves; a second SIGINT raises KeyboardInterrupt. Raises `NonFiniteLossError`
    when a loss is not finite; nothing of that step is saved.
    """
    first = int(state.step)
    if calls.before and first == 0:
        _visit(state, 0, Due(evaluate=True, sample=config.sample_every > 0, save=False, leave=False), calls)
    clock = Clock()
    pending: tuple[int, Mapping[str, Any]] | None = None
    feed = batches(first)
    begins, ends = _watched(calls.watch, first)
    with stop_signals() as asked, ExitStack() as watching:
        for done in range(first + 1, config.steps + 1):
            if calls.watch and done == begins:
                with clock.paused():
                    watching.enter_context(calls.watch.context())
            with jax.profiler.StepTraceAnnotation("train", step_num=done):
                batch = clock.timed(lambda: next(feed))
                state, metrics = step_fn(state, batch)
            if pending:
                _record(*pending, config, calls, clock)
            pending = (done, metrics)
            stop = calls.agree(signal.Signals[asked[0]].value if asked else 0)
            due = _due(done, config, asked=bool(stop))
            if any(due) or done in (begins - 1, ends):
                _record(*pending, config, calls, clock)
                pending = None
                # A watch may not begin or end while the new state is still being made: its metrics can come first.
                jax.block_until_ready(state)
                with clock.paused():
                    if done == ends or due.leave:
                        watching.close()
                    _visit(state, done, due, calls)
            if due.leave:
                name = signal.Signals(stop).name
                calls.display.say(f"stopped by {name} after step {done}; run the same command to go on")
                return state, name
    return state, None


def _watched(watch: Watch | None, first: int) -> tuple[int, int]:
    """First and last step to watch in a run that goes on after step `first`; (0, 0), which are no steps: none."""
    if watch is None or watch.last <= first:
        return 0, 0
    return max(watch.first, first + 1), watch.last


class Due(NamedTuple):
    """What comes after a step."""

    evaluate: bool
    sample: bool
    save: bool
    leave: bool


def _due(done: int, config: TrainConfig, asked: bool) -> Due:
    """Evaluations and samples depend on the step alone, so that an interrupted run leaves the same rows."""
    end = done == config.steps
    return Due(
        evaluate=end or done % config.eval_every == 0,
        sample=config.sample_every > 0 and (end or done % config.sample_every == 0),
        save=end or asked or done % config.checkpoint_every == 0,
        leave=asked and not end,
    )


def _visit(state: State, done: int, due: Due, calls: Callbacks) -> None:
    """Evaluate, sample and save, those of the three that are due."""
    held_out = None
    if due.evaluate and calls.evaluate is not None:
        values = calls.evaluate(state.params)
        calls.log.write(done, "eval", values)
        held_out = values.get("loss")
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        calls.display.say(f"step {done}  held-out  {shown}")
    if due.sample:
        calls.sample(done, state.params)
    if due.save:
        calls.save(state, held_out)


def _record(done: int, metrics: Mapping[str, Any], config: TrainConfig, calls: Callbacks, clock: "Clock") -> None:
    """Read the metrics of a step (which waits for it), check them, log and show them."""
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values.get("grad_norm", 0.0)):
        documents = ", ".join(calls.describe(done - 1)[:8]) or "unknown"
        raise NonFiniteLossError(
            "loss", values["loss"], f"a finite number at step {done} (gradient norm {values.get('grad_norm')})",
            f"Documents in its batch: {documents}. The last checkpoint is from before. Try a lower "
            "optim.schedule.peak, a longer warm-up, a smaller optim.clip, or float32 compute.",
        )  # fmt: skip
    speed = clock.lap(calls.tokens_per_step)
    calls.display.update(done, values, speed["tokens_per_second"])
    if done % config.log_every == 0 or done == config.steps:
        calls.log.write(done, "train", values)
        if calls.peak_flops and calls.tokens_per_step:
            steps_per_second = speed["tokens_per_second"] / calls.tokens_per_step
            speed["mfu"] = calls.flops_per_step * steps_per_second / calls.peak_flops
        calls.log.write(done, "speed", speed)


@dataclass
class Clock:
    """Time between metrics, less what evaluations and checkpoints took; time spent waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    mark: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def timed(self, get: Callable[[], Any]) -> Any:
        """The result of `get`, whose time counts as waiting for data."""
        start = time.perf_counter()
        result = get()
        self.waited += time.perf_counter() - start
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def lap(self, tokens: int) -> dict[str, float]:
        """Speed since the last lap."""
        now = time.perf_counter()
        seconds = max(now - self.mark, 1e-9)
        lap = {
            "tokens_per_second": tokens / seconds, "step_seconds": seconds, "data_wait_seconds": self.waited,
            "elapsed_seconds": now - self.started,
        }  # fmt: skip
        self.mark, self.waited = now, 0.0
        return lap


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that receives the name of the signal that asks to stop. Only the main thread can listen."""
    asked: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals go elsewhere
        pass
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
