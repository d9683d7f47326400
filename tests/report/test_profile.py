"""Traces are read right, on made-up ones of every kind of device and on a real one of this machine."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from lmlab.core.errors import UserError
from lmlab.report.profile import (
    OPERATIONS,
    Operation,
    format_table,
    name_and_category,
    newest_trace,
    parse_steps,
    read_operations,
    read_steps,
    self_times,
    traced,
)


def plane(name, **lines):
    """Text of an XPlane. An event: name, start and duration in ns, its stats."""
    events = [event for line in lines.values() for event in line]
    names = sorted({event[0] for event in events})
    stats = sorted({stat for event in events for stat in event[3]})
    metadata = [f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(names, 1)]
    metadata += [f'stat_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in enumerate(stats, 1)]
    body = []
    for line, content in lines.items():
        shown = []
        for event, start, duration, values in content:
            kinds = {stat: "int64_value: " if isinstance(v, int) else "str_value: " for stat, v in values.items()}
            texts = {stat: v if isinstance(v, int) else f'"{v}"' for stat, v in values.items()}
            parts = [f"stats {{ metadata_id: {stats.index(s) + 1} {kinds[s]}{texts[s]} }}" for s in values]
            shown.append(
                f"events {{ metadata_id: {names.index(event) + 1} offset_ps: {start * 1000} "
                f"duration_ps: {duration * 1000} {' '.join(parts)} }}"
            )
        body.append(f'lines {{ name: "{line.replace("_", " ")}" {" ".join(shown)} }}')
    return f'planes {{ name: "{name}" {" ".join(metadata + body)} }}'


def data(*planes):
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace("\n".join(planes)))


def op(name, program="jit_step"):
    return {"hlo_op": name, "hlo_module": program}


HOST = plane(
    "/host:CPU",
    python=[("train", 0, 50, {"step_num": 4}), ("train", 50, 50, {"step_num": 5}), ("PjitFunction", 0, 9, {})],
    worker=[
        ("while.6", 10, 100, op("while.6")), ("dot.3", 20, 30, op("dot.3")), ("end: dot.3", 45, 1, {}),
        ("dot.3", 60, 30, op("dot.3")), ("Region", 0, 900, {}),
    ],
    other=[("dot.3", 30, 7, op("dot.3", "jit_eval"))],
)  # fmt: skip
WHILE = "%while.1 = (s32[], f32[8]{0:T(256)}) while((s32[], f32[8]{0:T(256)}) %tuple.2), condition=%c, body=%b"
DOT = "%convolution.7 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convolution(bf16[8,8]{1,0:T(8,128)} %a, bf16[8,128] %b)"
REDUCE = "%all-reduce.2 = f32[8]{0:T(256)} all-reduce(f32[8]{0} %p), replica_groups={{0,1}}"
TPU = [
    plane(
        f"/device:TPU:{i}",
        Steps=[("4", 0, 500, {})],
        XLA_Modules=[("jit_step(123)", 0, 400, {})],
        XLA_Ops=[(WHILE, 0, 300, {}), (DOT, 0, 100, {}), (DOT, 150, 100, {}), (REDUCE, 300, 50, {})],
        Async_XLA_Ops=[("%copy-start.1 = u32[] copy-start(f32[8] %p)", 0, 300, {})],
    )
    for i in range(2)
]
GPU = plane(
    "/device:GPU:0",
    Stream_13=[("gemm_fusion_dot_2", 0, 40, op("gemm_fusion_dot.2")), ("loop_add", 50, 5, op("loop_add_fusion"))],
    Stream_14=[("ncclDevKernel_AllReduce", 10, 30, op("all-reduce-start.1")), ("MemcpyD2H", 60, 2, {})],
)  # fmt: skip


def test_on_the_host_operations_are_what_names_an_instruction():
    assert read_operations(data(HOST)) == [
        Operation("jit_step", "dot.3", "dot", 60.0, 2),
        Operation("jit_step", "while.6", "while", 40.0, 1),
        Operation("jit_eval", "dot.3", "dot", 7.0, 1),
    ]


def test_on_a_tpu_operations_are_one_line_of_each_device():
    assert read_operations(data(HOST, *TPU)) == [
        Operation("", "convolution.7", "convolution", 400.0, 4),
        Operation("", "while.1", "while", 200.0, 2),
        Operation("", "all-reduce.2", "all-reduce", 100.0, 2),
    ]


def test_on_a_gpu_operations_are_those_of_the_streams_unless_there_is_a_line_of_them():
    assert [(row.name, row.category, row.self_ns) for row in read_operations(data(HOST, GPU))] == [
        ("gemm_fusion_dot.2", "gemm_fusion_dot", 40.0),
        ("all-reduce-start.1", "all-reduce-start", 30.0),
        ("loop_add_fusion", "fusion", 5.0),
        ("MemcpyD2H", "MemcpyD2H", 2.0),
    ]
    derived = GPU.replace('lines { name: "Stream 13"', 'lines { name: "XLA Ops"')
    assert [row.name for row in read_operations(data(HOST, derived))] == ["gemm_fusion_dot.2", "loop_add_fusion"]


def test_steps_are_those_that_were_marked():
    assert read_steps(data(HOST, *TPU)) == [4, 5]
    assert read_steps(data(*TPU)) == []


def test_self_times_add_up_to_the_time_in_which_the_line_was_busy():
    rng = np.random.default_rng(0)

    def nest(start, end, depth):
        yield ("", f"{depth}", float(start), float(end - start))
        cuts = np.sort(rng.integers(start, end + 1, 4)) if depth < 4 else []
        for left, right in zip(cuts[::2], cuts[1::2], strict=True):
            yield from nest(int(left), int(right), depth + 1)

    events = [event for start in range(0, 5000, 1000) for event in nest(start, start + 900, 0)]
    rng.shuffle(events)
    events = [(p, n, float(s), float(d)) for p, n, s, d in events]
    found = self_times(events)
    assert sorted(event for event, _ in found) == sorted(events)
    assert sum(time for _, time in found) == 5 * 900
    assert all(0 <= time <= event[3] for event, time in found)


def test_self_times_of_neighbours_of_equals_and_of_events_that_stick_out():
    event = lambda start, duration: ("", f"{start}+{duration}", start, duration)
    times = lambda *events: [time for _, time in self_times(events)]
    assert times(event(0, 10), event(10, 5)) == [10, 5]
    assert times(event(0, 10), event(0, 10)) == [0, 10]
    assert times(event(0, 10), event(2, 3), event(5, 5)) == [2, 3, 5]
    assert times(event(0, 10), event(2, 6), event(3, 2)) == [4, 4, 2]
    assert times(event(0, 10), event(8, 6)) == [8, 6]
    assert times() == []


@pytest.mark.parametrize(
    ("text", "name", "category"),
    [
        ("dot.3", "dot.3", "dot"),
        ("wrapped_broadcast", "wrapped_broadcast", "fusion"),
        ("copy_bitcast_fusion.9.clone.2", "copy_bitcast_fusion.9.clone.2", "fusion"),
        ("all-reduce.12.remat", "all-reduce.12.remat", "all-reduce"),
        ("%fusion.3 = (f32[8]{0:T(8)S(1)}, s32[]) fusion(f32[8] %copy.1), kind=kLoop", "fusion.3", "fusion"),
    ],
)
def test_names_and_categories(text, name, category):
    assert name_and_category(text) == (name, category)


def test_the_table_sums_up_and_hides_nothing():
    rows = [Operation("jit_step", f"dot.{i}", "dot", 1e6 * (10 - i), 2) for i in range(4)]
    rows.append(Operation("jit_step", "while.1", "while", 66e6, 1))
    rows.sort(key=lambda row: -row.self_ns)
    blocks = format_table(rows, [10, 11, 12], top=3).split("\n\n")
    categories, operations, whole = [[line.split() for line in block.splitlines()[1:]] for block in blocks]
    assert categories == [["66.000", "66.0%", "1", "while"], ["34.000", "34.0%", "8", "dot"]]
    assert operations == [
        ["66.000", "66.0%", "1", "while", "while.1", "jit_step"],
        ["10.000", "10.0%", "2", "dot", "dot.0", "jit_step"],
        ["9.000", "9.0%", "2", "dot", "dot.1", "jit_step"],
        ["15.000", "15.0%", "4", "2", "others"],
    ]
    assert whole == [["100.000", "100.0%", "9", "steps", "10", "to", "12"]]
    assert "others" not in format_table(rows)
    assert [line.split()[-1] for line in format_table([]).splitlines() if line] == ["category", "operation", "all"]


@pytest.mark.parametrize(
    "text", ["10", "15:10", "a:b", "0:3", "15:21", "-1:3", "1:2:3", " 1:2", "1:2\n", "\u0661:\u0662", ":"]
)
def test_bad_steps_are_refused(text):
    with pytest.raises(UserError, match=r"profile = .*1 <= FIRST <= LAST <= 20"):
        parse_steps(text, 20)


def test_good_steps():
    assert [parse_steps(text, 20) for text in ("", "1:1", "10:15", "20:20")] == [None, (1, 1), (10, 15), (20, 20)]


def square(x):
    return x @ x


def trace_steps(folder, steps):
    said = []
    square_once = jax.jit(square)
    x = square_once(jnp.ones((64, 64))).block_until_ready()
    with traced(folder, said.append):
        for number in steps:
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                square_once(x).block_until_ready()
    return said


def test_a_trace_of_this_machine(tmp_path):
    (said,) = trace_steps(tmp_path / "a", [7, 8, 9])
    found = ProfileData.from_file(str(newest_trace(tmp_path / "a")))
    assert read_steps(found) == [7, 8, 9]
    (row,) = [row for row in read_operations(found) if row.category.startswith("dot") or "fusion" in row.category]
    assert (row.program, row.count) == ("jit_square", 3)
    assert row.self_ns > 0
    names = [event.name for plane in found.planes for line in plane.lines for event in line.events]
    assert [name for name in names if name.startswith("$")] == [], "calls of Python functions are traced"
    table = (tmp_path / "a" / OPERATIONS).read_text()
    assert said == f"{table}trace  {tmp_path / 'a'}"
    assert "steps 7 to 9" in table


def test_the_newest_trace_counts(tmp_path):
    trace_steps(tmp_path, [1])
    # Folders of traces are named by the second.
    time.sleep(1.1)
    trace_steps(tmp_path, [2])
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 2
    assert "steps 2 to 2" in (tmp_path / OPERATIONS).read_text()
    with pytest.raises(UserError, match="with a trace"):
        newest_trace(tmp_path / "absent")


def test_other_processes_trace_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert trace_steps(tmp_path / "a", [1]) == []
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "error", [OSError("no space"), jax.errors.JaxRuntimeError("no space")], ids=lambda e: type(e).__name__
)
def test_a_trace_that_cannot_be_written_is_told_of_and_costs_nothing_else(tmp_path, monkeypatch, error):
    stop = jax.profiler.stop_trace

    def fails():
        stop()
        raise error

    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    (said,) = trace_steps(tmp_path, [1])
    assert said.startswith("no profile")
    assert said.endswith("no space")


def test_an_error_inside_passes_and_leaves_the_trace(tmp_path):
    said = []
    with pytest.raises(ZeroDivisionError), traced(tmp_path, said.append):
        1 / 0
    assert len(said) == 1
    assert newest_trace(tmp_path).is_file()
