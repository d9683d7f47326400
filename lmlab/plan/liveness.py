"""Which arrays of a program are alive when: an estimate of the buffers that XLA lays out, from the jaxpr alone.

What is assumed of the compiler, and nothing else:
- reshapes and the like are views; pointwise operations fuse into what reads them, unless several read the result, or
  something that cannot fuse (a matmul, a loop, a kernel) does: then the result is a buffer;
- a result takes over the buffer of an operand of its size that dies there, if its operation can work in place;
- stacked results of a loop are laid out before it; what depends on nothing (zeros that gradients are added to, and in a
  loop the rows of its stacked inputs) is there from the beginning;
- the order of operations is the better one of two: as written, or each as late as what reads it allows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEWS = _names(
    "reshape squeeze expand_dims transpose stop_gradient name copy copy_p sharding_constraint optimization_barrier"
)
POINTWISE = VIEWS | _names(
    "broadcast_in_dim convert_element_type slice rev split add sub mul neg max min select_n and or not xor eq ne lt le "
    "gt ge abs sign integer_pow square iota clamp floor rem add_any is_finite pad shift_left shift_right_logical "
    "reduce_precision dynamic_slice exp exp2 log log1p div rsqrt sqrt tanh logistic pow sin cos erf erfc row"
)
REPEATED = _names("broadcast_in_dim row")
"""Done again for each reader rather than kept."""
FUSING = POINTWISE | _names(
    "reduce_sum reduce_max reduce_min reduce_and reduce_or argmax concatenate dynamic_update_slice"
)
"""What takes pointwise operands without a buffer for them."""
IN_PLACE = POINTWISE | _names("dynamic_update_slice scatter scatter-add scan while")
CALLS = _names("jit pjit custom_jvp_call custom_vjp_call remat remat2 checkpoint closed_call core_call")


class Value:
    """An array of the program; each is itself only."""

    __slots__ = ("bytes", "shape")

    def __init__(self, aval: Any) -> None:
        self.shape: tuple[int, ...] = getattr(aval, "shape", ())
        self.bytes: int = math.prod(self.shape) * getattr(getattr(aval, "dtype", None), "itemsize", 8)


class Node(NamedTuple):
    """An operation. `row` is the slice of a stacked array that a turn of a loop reads."""

    name: str
    ins: frozenset[Value]
    outs: tuple[Value, ...]
    params: dict[str, Any]


class Buffer(NamedTuple):
    """Memory in use from `start` to `end`; `made` is when the operation that fills it is over."""

    bytes: float
    start: int
    made: int
    end: int
    shape: tuple[int, ...]


class Loop(NamedTuple):
    """How the inputs of a loop's body divide: constants, then what is carried, then rows of stacked arrays."""

    constants: int
    carried: int


def peak(buffers: Iterable[Buffer]) -> tuple[float, int]:
    """Bytes of all buffers at the fullest moment, and that moment."""
    events = sorted(
        [event for b in buffers for event in ((b.start, 0, b.bytes), (b.end, 1, -b.bytes))], key=lambda e: e[:2]
    )
    now, most, moment = 0.0, 0.0, 0
    for time, _, change in events:
        now += change
        if now > most:
            most, moment = now, time
    return most, moment


def buffers_of(jaxpr: Any, loop: Loop | None = None, donated: bool = False) -> list[Buffer]:
    """The buffers of a jaxpr beside its inputs. Results count as buffers, unless inputs are donated to them.

    loop: the jaxpr is the body of a loop; its stacked results are written where the loop has laid them out.
    """
    ins, nodes, outs = _flatten(jaxpr)
    written: set[Value] = set()
    overwritten: set[Value] = set()
    if loop:
        split = loop.constants + loop.carried
        written, overwritten = _values(outs[loop.carried :]), set(ins[loop.constants : split])
        nodes = [Node("row", frozenset(), (row,), {}) for row in ins[split:]] + nodes
    elif donated:
        written = _values(outs)
    kept = _values(outs) - written
    fused = _fuse(nodes, _values(outs), written)
    bodies: dict[int, list[Buffer]] = {}

    def body(node: Node) -> list[Buffer]:
        if id(node.outs) not in bodies:
            bodies[id(node.outs)] = _body(node)
        return bodies[id(node.outs)]

    orders = [_timeline(order, kept, overwritten, body) for order in (fused, _late(fused))]
    return min(orders, key=lambda buffers: peak(buffers)[0])


def _values(found: Sequence[Value | None]) -> set[Value]:
    return {value for value in found if value is not None}


def _body(node: Node) -> list[Buffer]:
    """Buffers of one turn of a loop, or of what one device does under `shard_map`."""
    if node.name == "scan":
        return buffers_of(node.params["jaxpr"].jaxpr, _loop(node.params))
    if node.name in ("while", "shard_map"):
        inner = node.params.get("body_jaxpr") or node.params["jaxpr"]
        return buffers_of(getattr(inner, "jaxpr", inner), donated=True)
    return []


def _loop(params: Mapping[str, Any]) -> "Loop":
    """What a scan is given, before and after JAX 0.11."""
    if "ft_in" not in params:
        return Loop(params["num_consts"], params["num_carry"])
    constants, carry, _ = params["ft_in"].unpack()
    return Loop(len(constants), len(carry))


def _flatten(jaxpr: Any) -> tuple[list[Value], list[Node], list[Value | None]]:
    """Inputs, operations and results, with calls replaced by what they call, less what no result needs."""
    values: dict[Any, Value | None] = {var: Value(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars)}
    nodes: list[Node] = []
    read = lambda values, var: None if isinstance(var, jex.Literal) else values[var]

    def inline(jaxpr: Any, values: dict[Any, Value | None]) -> None:
        for eqn in jaxpr.eqns:
            inputs = [read(values, var) for var in eqn.invars]
            if eqn.primitive.name in CALLS:
                called = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
                called = getattr(called, "jaxpr", called)
                inner: dict[Any, Value | None] = {var: Value(var.aval) for var in called.constvars}
                inner |= dict(zip(called.invars, inputs, strict=True))
                inline(called, inner)
                results = [read(inner, var) for var in called.outvars]
            else:
                made = tuple(Value(var.aval) for var in eqn.outvars)
                nodes.append(Node(eqn.primitive.name, frozenset(_values(inputs)), made, eqn.params))
                results = list(made)
            values.update(zip(eqn.outvars, results, strict=True))

    inline(jaxpr, values)
    outs = [read(values, var) for var in jaxpr.outvars]
    needed = _values(outs)
    alive = []
    for node in reversed(nodes):
        if needed.intersection(node.outs):
            alive.append(node)
            needed |= node.ins
    return [values[var] for var in jaxpr.invars], alive[::-1], outs  # type: ignore[misc]


def _fuse(nodes: list[Node], outs: set[Value], written: set[Value]) -> list[Node]:
    """The operations that fill buffers, each with the buffers that it reads, directly or through fused ones."""
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.ins:
            readers.setdefault(value, []).append(node)

    def is_fused(node: Node, value: Value) -> bool:
        if node.name not in POINTWISE:
            return False
        reading = readers.get(value, [])
        recast = node.name == "convert_element_type" and all(x.bytes == value.bytes for x in node.ins)
        if node.name in VIEWS or recast:
            return True
        if value in outs - written:
            return False
        if value in written and not reading:
            return True
        once = len(reading) == 1 or node.name in REPEATED
        return once and all(reader.name in FUSING for reader in reading)

    reads: dict[Value, frozenset[Value]] = {}
    fused = []
    for node in nodes:
        ins = frozenset().union(*(reads.get(value, frozenset((value,))) for value in node.ins))
        gone = [value for value in node.outs if is_fused(node, value)]
        reads.update(dict.fromkeys(gone, ins))
        if len(gone) < len(node.outs) or written.intersection(gone):
            fused.append(node._replace(ins=ins, outs=tuple(value for value in node.outs if value not in gone)))
    return fused


def _late(nodes: list[Node]) -> list[Node]:
    """The operations from the last to the first, at each turn the one that lets go of most."""
    maker = {value: i for i, node in enumerate(nodes) for value in node.outs}
    sources = [{maker[value] for value in node.ins if value in maker} for node in nodes]
    waiting = [0] * len(nodes)
    for found in sources:
        for source in found:
            waiting[source] += 1
    ready, live, order = [i for i, count in enumerate(waiting) if not count], set[Value](), list[Node]()

    def growth(i: int) -> tuple[int, int]:
        new = sum(value.bytes for value in nodes[i].ins if value in maker and value not in live)
        return new - sum(value.bytes for value in nodes[i].outs), -i

    while ready:
        chosen = min(ready, key=growth)
        ready.remove(chosen)
        order.append(nodes[chosen])
        live |= {value for value in nodes[chosen].ins if value in maker}
        live -= set(nodes[chosen].outs)
        for source in sources[chosen]:
            waiting[source] -= 1
            if not waiting[source]:
                ready.append(source)
    return order[::-1]


def _timeline(
    order: list[Node], kept: set[Value], overwritten: set[Value], body: Callable[[Node], list[Buffer]]
) -> list[Buffer]:  # fmt: skip
    """Buffers of operations run in this order, those inside of loops among them.

    kept: results. overwritten: inputs whose memory may be used for others when they die.
    """
    last = {value: i for i, node in enumerate(order) for value in node.ins} | dict.fromkeys(kept, len(order))
    home: dict[Value, Value] = {}
    spans: dict[Value, list[int]] = {}  # start, made, end of the memory at home
    buffers: list[Buffer] = []
    time = 0
    for i, node in enumerate(order):
        begin = time
        inner = body(node)
        buffers += [b._replace(start=b.start + time + 1, made=b.made + time + 1, end=b.end + time + 1) for b in inner]
        time += 1 + max((b.end + 1 for b in inner), default=0)
        dying = [v for v in node.ins if last[v] == i and (v in home or v in overwritten)]
        for value in node.outs:
            donor = next((v for v in dying if v.bytes == value.bytes), None) if node.name in IN_PLACE else None
            if donor is not None:
                dying.remove(donor)
            home[value] = home.get(donor, donor) if donor is not None else value
            early = begin if node.ins else 0
            fresh = [early, early, begin]
            span = spans.setdefault(home[value], fresh)
            span[1] = max(span[1], time) if node.name not in POINTWISE else span[1]
        for value in (*node.ins, *node.outs):
            if value in home and home[value] in spans:
                spans[home[value]][2] = time
    for value in kept & home.keys():
        if home[value] in spans:
            spans[home[value]][2] = time
    buffers += [
        Buffer(v.bytes, start, made, end, v.shape) for v, (start, made, end) in spans.items() if v not in overwritten
    ]
    return buffers
