"""The tree of particles as SVG, and what the page tells of the node under the pointer."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import escape

from lmlab.inference.text import TextCodec, continuation
from lmlab.steering.layout import MOST_ROWS, Node, columns
from lmlab.steering.rounds import Outcome, Round
from lmlab.steering.told import visible

ROW, LETTER, EDGE, TOP = 18, 6.7, 34, 26
"""Height of a row, width of a letter and of the lines between columns, height of the heading; in pixels."""
LABEL, BLOCK_LABEL = 9, 24
"""Letters of a label at most, where a round writes one token and where it writes several."""


@dataclass(frozen=True)
class Tree:
    """A drawing, and its nodes for the script of the page."""

    svg: str
    width: int
    height: int
    nodes: list[list[list[Any]]]
    """Of each column: [x, y, parent, text that is added, letters of the parent's text that it takes back, share,
    state, children], and each child [piece, share, whether it went on]."""
    pieces: list[str]
    """Texts of the tokens of children."""


def draw_tree(outcome: Outcome, codec: TextCodec, prompt: np.ndarray) -> Tree:
    """The tree of the rounds that are drawn; column 0 is the prompt."""
    drawn = columns(outcome.rounds)
    added = _added_texts(outcome, codec, prompt, drawn)
    labels = [[_label(text, outcome.moves_TPK is None) for text, _ in column] for column in added]
    widest = max((len(label) for column in labels for label in column), default=0)
    rows = min(len(outcome.share_P), MOST_ROWS)
    pen = _Pen(int(EDGE + 10 + LETTER * widest), labels, rows)
    pieces = _Pieces(codec)
    # Where particles have several children, some are left in every round.
    anew, branching = outcome.anew, outcome.child_weight_TPK.shape[2] > 1
    nodes: list[list[list[Any]]] = []
    for t, column in enumerate(drawn):
        pen.head(t, anew[t] and not branching)
        following = drawn[t + 1] if t + 1 < len(drawn) else []
        after = outcome.rounds[min(t + 1, len(drawn) - 1)]
        lines = _by_parent(after, (node.particle for node in following))
        chosen = _by_parent(after, np.flatnonzero(after.log_weight_P > -np.inf).tolist())
        share_P = outcome.rounds[t].share_P
        nodes.append([])
        for i, node in enumerate(column):
            share = float(share_P[node.particle])
            pen.node(t, i, node, drawn[t - 1][node.parent] if t else None, share)
            children: list[list[Any]] = []
            if node.state == "going" and t + 1 < len(drawn):
                children = _children(outcome, t + 1, chosen.get(node.particle, set()), node.particle, pieces)
                drawn_on = lines.get(node.particle, set())
                pen.stubs(t, i, node, [child[1] for k, child in enumerate(children) if k not in drawn_on])
            nodes[-1].append(
                [pen.x(t), pen.y(node.row), node.parent, *added[t][i], _digits(share), node.state, children]
            )
    return Tree(pen.svg(), pen.x(len(drawn)) + 20, pen.y(rows), nodes, pieces.texts)


def _digits(value: float) -> float:
    return float(f"{float(value):.3g}")


def _added_texts(
    outcome: Outcome, codec: TextCodec, prompt: np.ndarray, drawn: list[list[Node]]
) -> list[list[tuple[str, int]]]:  # fmt: skip
    """Of each node: the text that it adds to that of its parent, and how many letters of it it takes back first.

    Letters of several tokens are unreadable until the last is there, and are then another text.
    """
    added: list[list[tuple[str, int]]] = []
    old: list[tuple[list[int], str]] = []
    for t, column in enumerate(drawn):
        new = []
        added.append([])
        for node in column:
            tokens, text = old[node.parent] if t else ([], "")
            tokens = tokens + outcome.rounds[t].tokens[node.particle]
            whole = continuation(codec, prompt, np.asarray(tokens, np.int32))
            same = next((i for i, pair in enumerate(zip(text, whole, strict=False)) if pair[0] != pair[1]),
                        min(len(text), len(whole)))  # fmt: skip
            added[-1].append((whole[same:], _units(text[same:])))
            new.append((tokens, whole))
        old = new
    return added


def _units(text: str) -> int:
    # What JavaScript counts.
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _label(text: str, block: bool) -> str:
    most, shown = BLOCK_LABEL if block else LABEL, visible(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _by_parent(one: Round, particles: Iterable[int]) -> dict[int, set[int]]:
    """Of each particle before the round, which of its children these particles are."""
    found: dict[int, set[int]] = defaultdict(set)
    for p in particles:
        found[int(one.parent_P[p])].add(int(one.child_P[p]))
    return found


class _Pieces:
    def __init__(self, codec: TextCodec) -> None:
        self.texts: list[str] = []
        self._codec, self._at = codec, dict[int, int]()

    def __call__(self, token: int) -> int:
        if token not in self._at:
            self._at[token] = len(self.texts)
            self.texts.append(self._codec.decode([token]))
        return self._at[token]


def _children(outcome: Outcome, t: int, chosen_K: set[int], parent: int, piece: _Pieces) -> list[list[Any]]:
    """What a particle has proposed for round t: [piece, share, whether it went on] of each child."""
    weight_PK = outcome.child_weight_TPK[t]
    top = float(weight_PK.max())
    total = float(np.exp(weight_PK - top).sum()) if top > -math.inf else 1.0
    found = []
    for k, weight in enumerate(weight_PK[parent].tolist()):
        token = -1 if outcome.moves_TPK is None else piece(int(outcome.moves_TPK[t, parent, k]))
        share = math.exp(weight - top) / total if weight > -math.inf else 0.0
        found.append([token, _digits(share), int(k in chosen_K)])
    return found


class _Pen:
    """Collects what is drawn, lines of one look in one path."""

    def __init__(self, step: int, labels: list[list[str]], rows: int) -> None:
        self._step, self._labels, self._rows = step, labels, rows
        self._lines: dict[tuple[float, float, str], list[str]] = defaultdict(list)
        self._dots: dict[str, list[str]] = defaultdict(list)
        self._stubs: dict[str, list[str]] = defaultdict(list)
        self._texts: list[str] = []

    def x(self, t: int) -> int:
        """Of a column."""
        return 70 + t * self._step

    def y(self, row: float) -> int:
        """Of a row."""
        return round(TOP + 12 + row * ROW)

    @property
    def _middle(self) -> float:
        return (self._rows - 1) / 2

    def head(self, t: int, resampled: bool) -> None:
        """The number of a round, and whether particles were drawn anew in it."""
        mark = "r" if resampled else "h"
        self._texts.append(f"<text x={self.x(t) - 4} y=12 class={mark}>{t + 1}{' ↻' if resampled else ''}</text>")

    def end(self, t: int, i: int) -> int:
        """Where the label of a node ends."""
        label = self._labels[t][i]
        return round(self.x(t) + (10 + LETTER * len(label) if label else 0))

    def node(self, t: int, i: int, node: Node, parent: Node | None, share: float) -> None:
        """A particle, its token, and the line from its parent."""
        x, y, label = self.x(t), self.y(node.row), self._labels[t][i]
        x0 = 14 if parent is None else self.end(t - 1, node.parent)
        y0 = self.y(self._middle if parent is None else parent.row)
        bend = f"H{x}" if y0 == y else f"C{x - 16} {y0} {x0 + 14} {y} {x} {y}"
        width = round(2 * (0.7 + 7 * math.sqrt(share))) / 2
        strength = 0.3 if node.state == "dead" else round(min(1.0, 0.35 + 0.5 * share * self._rows), 1)
        self._lines[width, strength, "d" if node.state == "dead" else ""].append(f"M{x0} {y0}{bend}")
        if node.state == "dead":
            self._dots["dead"].append(f"M{x - 3} {y - 3}l6 6m0-6l-6 6")
        else:
            self._dots[node.state].append(f"M{x} {y}h.1")
        if label:
            self._texts.append(f"<text x={x + 6} y={y + 4}>{escape(label)}</text>")

    def stubs(self, t: int, i: int, node: Node, shares: list[float]) -> None:
        """Its children that did not go on, by their shares: beginnings of lines."""
        x, y = self.end(t, i), self.y(node.row)
        for k, share in enumerate(shares):
            slope = round(14 * ((k + 0.5) / len(shares) - 0.5)) or 3
            self._stubs["" if share > 0 else "d"].append(f"M{x} {y}l12 {slope}")

    def svg(self) -> str:
        """What stands inside of the svg element."""
        stubs = [f'<path class="stub {kind}" d="{"".join(parts)}"/>' for kind, parts in self._stubs.items()]
        lines = [
            f'<path class="line {kind}" stroke-width="{width:g}" opacity="{strength:g}" d="{"".join(parts)}"/>'
            for (width, strength, kind), parts in sorted(self._lines.items())
        ]
        dots = [f'<path class="dot {kind}" d="{"".join(parts)}"/>' for kind, parts in self._dots.items()]
        y = self.y(self._middle)
        root = f'<path class="dot going" d="M14 {y}h.1"/><text x=4 y=12 class=h>prompt</text>'
        return "".join([*stubs, *lines, *dots, root, *self._texts])
