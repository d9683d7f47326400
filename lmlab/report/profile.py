"""Where the time of some steps goes: a trace by jax.profiler, and a table of the operations that took longest."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData, ProfileOptions

from lmlab.core.errors import check

PROFILE, OPERATIONS = "profile", "operations.txt"
TOP = 20
"""Operations in the table."""
HLO_TEXT = re.compile(r"^%?(\S+) = .*? ([a-z][a-z0-9-]*)\(")
"""Name and opcode in the line of HLO by which traces of TPUs call an operation."""
NUMBERING = re.compile(r"([._]\d+|\.clone|\.remat\d*)+$")
"""What XLA appends to the name of an instruction to keep names apart."""

Event = tuple[str, str, float, float]
"""Program, name, start and duration in nanoseconds."""


@dataclass(frozen=True)
class Operation:
    """All executions of the instructions of one name in one compiled program."""

    program: str
    name: str
    category: str
    self_ns: float
    """Time in it, less that in operations inside it on the same line: a loop does not count its body."""
    count: int


def parse_steps(text: str, steps: int) -> tuple[int, int] | None:
    """First and last step of "FIRST:LAST"; None for "". Raises `UserError` if a run of so many steps lacks them."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    check(1 <= first <= last <= steps, "profile", text,
          f"FIRST:LAST, two steps of the run with 1 <= FIRST <= LAST <= {steps}",
          "Such as 10:15; step 1 would also show the compilation.")  # fmt: skip
    return first, last


@contextmanager
def traced(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Trace what runs inside into `folder`, then write and say the table. Only on the first process of a job.

    The folder opens in TensorBoard with XProf, its *.trace.json.gz in Perfetto. A trace that cannot be written is
    told of and nothing more: it is not worth the run.
    """
    if jax.process_index() != 0:
        yield
        return
    options = ProfileOptions()
    # Calls of Python functions would outweigh the operations and slow the steps down.
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        yield
    finally:
        say(_finish(folder))


def _finish(folder: Path) -> str:
    """End the trace and write the table; what to tell of it."""
    try:
        jax.profiler.stop_trace()
        data = ProfileData.from_file(str(newest_trace(folder)))
        table = format_table(read_operations(data), read_steps(data))
        (folder / OPERATIONS).write_text(table, encoding="utf-8")
    except (OSError, jax.errors.JaxRuntimeError) as error:
        return f"no profile, since {folder} cannot be written to: {error}"
    return f"{table}trace  {folder}"


def newest_trace(folder: Path) -> Path:
    """The last xplane file that was written below a folder. Raises `UserError` if there is none."""
    found = list(folder.rglob("*.xplane.pb"))
    check(bool(found), "profile", str(folder), "a folder with a trace (*.xplane.pb)")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def read_steps(data: ProfileData) -> list[int]:
    """Numbers of the steps that `jax.profiler.StepTraceAnnotation` marked, in order."""
    events = (event for plane in data.planes if not _is_device(plane) for line in plane.lines for event in line.events)
    return sorted({number for event in events for name, number in event.stats if name == "step_num"})


def read_operations(data: ProfileData) -> list[Operation]:
    """Operations of a trace, that with the most time first; times are summed over devices and threads."""
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for line in operation_lines(data):
        for (program, name, _, _), self_ns in self_times(line):
            sums[program, *name_and_category(name)].append(self_ns)
    rows = [Operation(*key, sum(times), len(times)) for key, times in sums.items()]
    return sorted(rows, key=lambda row: (-row.self_ns, row.program, row.name))


def operation_lines(data: ProfileData) -> Iterator[list[Event]]:
    """Events that are operations of compiled programs, line by line.

    On an accelerator: of its line "XLA Ops", or where it has none (GPUs), of its streams. Without one: those events
    on the host's threads that name an instruction; the others are the runtime.
    """
    devices = [line for plane in data.planes if _is_device(plane) for line in device_lines(plane)]
    for line in devices:
        yield [_event(event) for event in line.events]
    if not devices:
        for line in (line for plane in data.planes for line in plane.lines):
            yield [_event(event) for event in line.events if any(name == "hlo_op" for name, _ in event.stats)]


def device_lines(plane: Any) -> list[Any]:
    """Lines of a device's plane on which every operation stands once."""
    lines = list(plane.lines)
    operations = [line for line in lines if line.name == "XLA Ops"]
    return operations or [line for line in lines if line.name.startswith("Stream")]


def _is_device(plane: Any) -> bool:
    return plane.name.startswith("/device:")


def _event(event: Any) -> Event:
    stats = dict(event.stats)
    return str(stats.get("hlo_module", "")), str(stats.get("hlo_op", event.name)), event.start_ns, event.duration_ns


def self_times(events: Iterable[Event]) -> list[tuple[Event, float]]:
    """The events of one line, each with its duration less that of the events directly inside it, in nanoseconds."""
    # Outer before inner, also where both begin at once.
    ordered = sorted(events, key=lambda event: (event[2], -event[3]))
    inside = [0.0] * len(ordered)
    around: list[int] = []
    for number, event in enumerate(ordered):
        while around and _end(ordered[around[-1]]) <= event[2]:
            around.pop()
        if around:
            inside[around[-1]] += min(_end(event), _end(ordered[around[-1]])) - event[2]
        around.append(number)
    return [(event, event[3] - inner) for event, inner in zip(ordered, inside, strict=True)]


def _end(event: Event) -> float:
    return event[2] + event[3]


def name_and_category(text: str) -> tuple[str, str]:
    """An operation's name and kind: the opcode where the text is a line of HLO, else the name without its number."""
    if found := HLO_TEXT.match(text):
        return found[1], found[2]
    base = NUMBERING.sub("", text)
    return text, "fusion" if base.endswith("fusion") or base.startswith("wrapped_") else base


def format_table(rows: Sequence[Operation], steps: Sequence[int] = (), top: int = TOP) -> str:
    """Time by category, by operation and in all, each with the longest first, as lines of text."""
    which = f"steps {steps[0]} to {steps[-1]}" if steps else "all operations"
    blocks = [
        _block("category", rows, lambda row: row.category, top),
        _block("operation", rows, lambda row: f"{row.category:20}  {row.name}  {row.program}".rstrip(), top),
        _block("in all", rows, lambda row: which, top),
    ]
    return "\n".join(blocks)


def _block(title: str, rows: Sequence[Operation], label: Callable[[Operation], str], top: int) -> str:
    groups: dict[str, list[Operation]] = defaultdict(list)
    for row in rows:
        groups[label(row)].append(row)
    listed = sorted(groups.items(), key=lambda item: -_total(item[1]))
    shown, rest = listed[:top], listed[top:]
    if rest:
        shown.append((f"{len(rest)} others", [row for _, part in rest for row in part]))
    whole = _total(rows) or 1.0
    lines = [
        f"{_total(part) / 1e6:12.3f}  {_total(part) / whole:6.1%}  {sum(row.count for row in part):7d}  {name}\n"
        for name, part in shown
    ]
    return "".join([f"{'self ms':>12}  {'share':>6}  {'count':>7}  {title}\n", *lines])


def _total(rows: Sequence[Operation]) -> float:
    return sum(row.self_ns for row in rows)
