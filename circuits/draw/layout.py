"""Where the nodes and edges of a circuit go, in units of one node; nothing here has a colour.

Layers are rows, `embed` lowest. A circuit with a node for each place (`circuits.draw.lanes`) has a
column for each position as well, its lane.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import numpy as np

from circuits.graph import check_circuit, has_lanes, height, place_label, real_edges, size

__all__ = [
    *("BOX", "PORTS", "Curve", "Point", "bands", "bezier", "crossings", "frame", "lanes"),
    *("layout", "routes"),
]

BOX = (0.78, 0.42)
"""Width and height of a node."""
PORTS = {"q": -0.23, "k": 0.0, "v": 0.23}
"""Where edges into the slots of a head end, as shares of its width from the middle."""
_ENTRIES = PORTS | {"kv": (PORTS["k"] + PORTS["v"]) / 2}

Point = tuple[float, float]
Curve = tuple[Point, Point, Point, Point]
"""The control points of a Bezier curve."""
Row = tuple[float, int, int]
"""Layer, which row of it (key/value heads and places that only read, heads, MLPs), and which line
of that row, if it is broken into several."""
Rows = dict[Row, dict[int, list[str]]]
"""Row -> lane (-1 if there are none) -> its nodes from left to right."""

_COUNTED = 500
"""Edges whose crossings are counted, the strongest: the time grows with the square."""
_ASPECT = 1.2
"""Width by height, in units of layout, that rows are broken for: wider than high on paper."""
_APART = 0.3
"""Between lanes."""


def layout(graph: nx.MultiDiGraph) -> dict[str, Point]:
    """Where each node goes, with `embed` lowest and `logits` highest; y grows upwards.

    >>> from circuits.draw.layout import layout
    >>> layout(circuit)["embed"][1] < layout(circuit)["logits"][1]
    True

    Rows are layers: key/value heads and places that only read, then query heads, then MLP and
    neurons above them. Nodes with a `pos` stay in the lane of that position, lanes are in order
    from left to right. Within a row nodes are at least 1 apart, ordered and placed near the mean of
    their neighbours (weighted by |score|), which keeps edges short and crossings few. Rows that
    hold nothing take no room; long ones are broken into lines if the picture gets too wide, and
    rows of tall pictures are closer together.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    check_circuit(graph)
    if len(graph) == 0:
        raise ValueError(
            "a circuit must have a node to be drawn; this one is empty (no edge lies on a path "
            "from embed to logits); ask for more edges or pass connected=False"
        )
    rows = _broken(_rows(graph))
    heights, room = _heights(rows), _room(rows)
    y = {n: heights[row] for row, cells in rows.items() for nodes in cells.values() for n in nodes}
    sweeps = list(_sweeps(rows, room, _pull(graph)))
    part = graph.edge_subgraph(_strongest(graph, _COUNTED)) if size(graph) > _COUNTED else graph
    best = min(sweeps, key=lambda x: crossings(part, {n: (x[n], y[n]) for n in part}))
    middle = (max(best.values()) + min(best.values())) / 2
    ordered = sorted(graph, key=lambda node: (y[node], best[node]))
    return {node: (best[node] - middle, y[node]) for node in ordered}


def _lane(graph: nx.MultiDiGraph) -> dict[str, int]:
    """The lane of each node, -1 if the circuit has none."""
    laned = has_lanes(graph)
    return {node: data["pos"] if laned else -1 for node, data in graph.nodes(data=True)}


def bands(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> dict[int, Point]:
    """From where to where the band behind each layer goes upwards, from the lowest layer."""
    found = _extents(
        (graph.nodes[node]["layer"], y, BOX[1] / 2) for node, (_, y) in positions.items()
    )
    gaps = [above - below for (_, below), (above, _) in pairwise(found.values())]
    reach = min([0.24, *(0.38 * gap for gap in gaps)])
    return {layer: (low - reach, high + reach) for layer, (low, high) in found.items()}


def lanes(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> dict[str, Point]:
    """From where to where each lane goes across, by what figures call it; empty without lanes."""
    lane = _lane(graph)
    found = _extents((lane[node], x, BOX[0] / 2) for node, (x, _) in positions.items())
    if not found:
        return {}
    ends = list(found.values())
    edge = (1 - BOX[0] + _APART) / 2  # neighbours meet in the middle of what is between them
    borders = [(before[1] + behind[0]) / 2 for before, behind in pairwise(ends)]
    borders = [ends[0][0] - edge, *borders, ends[-1][1] + edge]
    return dict(zip((place_label(graph, pos) for pos in found), pairwise(borders), strict=True))


def frame(
    positions: dict[str, Point], curves: dict[tuple[str, str, str], Curve]
) -> tuple[Point, Point]:
    """The lower left and the upper right corner of all that is drawn, with a little room."""
    # A Bezier curve stays within its control points, and uses about 3/4 of a sideways bow.
    reach = [0.75 * x + 0.25 * x0 for (x0, _), *inner, _ in curves.values() for x, _ in inner]
    xs, ys = zip(*positions.values(), strict=True)
    sides = [x + side for x in xs for side in (-0.6, 0.6)] + reach
    return (min(sides), min(ys) - 0.4), (max(sides), max(ys) + 0.4)


def _extents(reach: Iterable[tuple[int, float, float]]) -> dict[int, Point]:
    """Of `(group, middle, half)`: the lowest and the highest end of each group with a number."""
    found: dict[int, Point] = {}
    for group, middle, half in reach:
        if group >= 0:
            low, high = found.get(group, (math.inf, -math.inf))
            found[group] = min(low, middle - half), max(high, middle + half)
    return dict(sorted(found.items()))


# -- rows and lanes --------------------------------------------------------------------------------


def _rows(graph: nx.MultiDiGraph) -> Rows:
    """Nodes by row and lane, in the order of their heads."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    lane = _lane(graph)
    for node, data in sorted(graph.nodes(data=True), key=lambda item: item[1]["head"]):
        layer = math.inf if data["kind"] == "logits" else float(data["layer"])
        row = height(data.get("name", node), data["kind"])
        if row == 1 and lane[node] >= 0 and data["kind"] not in ("embed", "logits"):
            # what is read for other places comes from below, as from key/value heads
            onward = [d["structural"] for *_, d in graph.out_edges(node, data=True)]
            row = int(not onward or not all(onward))
        rows[layer, row, 0][lane[node]].append(node)
    return dict(rows)


def _broken(rows: Rows) -> Rows:
    """Rows broken into lines of as many nodes as give the picture a good shape."""
    laned = any(lane >= 0 for cells in rows.values() for lane in cells)
    longest = max(len(nodes) for cells in rows.values() for nodes in cells.values())
    broken = [_lines(rows, most) for most in range(1 if laned else min(8, longest), longest + 1)]

    def shape(lines: Rows) -> float:
        wide = max(right for _, right in _room(lines, free=False).values())
        return abs(math.log((wide + 1) / (max(_heights(lines).values()) + 1) / _ASPECT))

    return min(broken, key=shape)


def _lines(rows: Rows, most: int) -> Rows:
    """Each row broken into lines with at most `most` nodes in a lane, evenly."""
    result: Rows = {}
    for (layer, row, _), cells in rows.items():
        for lane, nodes in cells.items():
            count = math.ceil(len(nodes) / most)
            for line in range(count):
                part = nodes[line * len(nodes) // count : (line + 1) * len(nodes) // count]
                result.setdefault((layer, row, line), {})[lane] = part
    return result


def _heights(rows: Rows) -> dict[Row, float]:
    """From the lowest row up; closer together within a layer, and in tall pictures."""
    gaps = 0.16, 0.38, 0.73  # above a line of this row, a row of this layer, another layer
    squeeze = min(1.0, max(0.5, 18 / len(rows)))
    heights: dict[Row, float] = {}
    for row in sorted(rows):
        if heights:
            below = list(heights)[-1]
            gap = gaps[0] if below[:2] == row[:2] else gaps[1 + (below[0] != row[0])] * squeeze
            heights[row] = heights[below] + BOX[1] + gap
        else:
            heights[row] = 0.0
    return heights


def _room(rows: Rows, *, free: bool = True) -> dict[int, Point]:
    """Where the first and the last node of each lane can be; anywhere if there are no lanes, and
    they are `free`."""
    widest: dict[int, float] = {}
    for (*_, line), cells in rows.items():
        for lane, nodes in cells.items():
            # every other line of a broken row stands half a node aside
            widest[lane] = max(widest.get(lane, 0.0), len(nodes) + 0.5 * (line % 2))
    if free and set(widest) == {-1}:
        return {-1: (-math.inf, math.inf)}
    room, left = {}, 0.0
    for lane in sorted(widest):
        room[lane] = left, left + widest[lane] - 1
        left += widest[lane] + _APART
    return room


def _pull(graph: nx.MultiDiGraph) -> dict[str, dict[str, float]]:
    """How strongly each node's neighbours want it near."""
    peak = max((abs(d["score"]) for *_, d in real_edges(graph)), default=0.0) or 1.0
    pull: dict[str, dict[str, float]] = {node: defaultdict(float) for node in graph}
    for u, v, data in graph.edges(data=True):
        # equal scores would leave weights of 0; the small constant keeps every edge in the mean
        weight = 0.05 + abs(data["score"]) / peak
        pull[u][v] += weight
        pull[v][u] += weight
    return pull


def _sweeps(
    rows: Rows, room: dict[int, Point], pull: dict[str, dict[str, float]]
) -> Iterator[dict[str, float]]:
    """Where nodes are in their rows, at first and after each way up or down through the rows."""
    order = {(row, lane): nodes for row, cells in rows.items() for lane, nodes in cells.items()}

    def place(key: tuple[Row, int], wishes: list[float]) -> list[float]:
        (layer, row, line), lane = key
        if line or ((layer, row, 1), lane) in order:
            return _bricks(wishes, line, room[lane])
        return _apart(wishes, room[lane])

    x: dict[str, float] = {}
    for key, nodes in order.items():
        middle = sum(room[key[1]]) / 2 if math.isfinite(room[key[1]][0]) else 0.0
        start = middle - (len(nodes) - 1) / 2
        places = place(key, [start + i for i in range(len(nodes))])
        x |= dict(zip(nodes, places, strict=True))
    yield dict(x)
    for sweep in range(12):
        for key in sorted(order, reverse=bool(sweep % 2)):
            wish = {
                node: sum(w * x[other] for other, w in pull[node].items()) / total
                if (total := sum(pull[node].values()))
                else x[node]
                for node in order[key]
            }
            nodes = order[key] = sorted(order[key], key=lambda node: wish[node])
            x |= dict(zip(nodes, place(key, [wish[node] for node in nodes]), strict=True))
        yield dict(x)


def _apart(wishes: list[float], room: Point) -> list[float]:
    """The places nearest to the wishes (least squares) that keep the order, the room, and 1 between
    them."""
    blocks: list[tuple[float, int]] = []  # mean and number of nodes that are pushed together
    for i, wish in enumerate(wishes):
        mean, count = wish - i, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    starts = [mean for mean, count in blocks for _ in range(count)]
    first, last = room[0], room[1] - len(wishes) + 1
    return [min(max(start, first), last) + i for i, start in enumerate(starts)]


def _bricks(wishes: list[float], line: int, room: Point) -> list[float]:
    """The places of a line of a broken row: side by side, and where the gaps of the next line are,
    so that edges find their way up."""
    left = (room[0] if math.isfinite(room[0]) else 0.0) + 0.5 * (line % 2)
    start = left + round(sum(wish - i for i, wish in enumerate(wishes)) / len(wishes) - left)
    first, last = room[0], room[1] - len(wishes) + 1
    while start > last + 1e-9:
        start -= 1.0
    while start < first - 1e-9:
        start += 1.0
    return [start + i for i in range(len(wishes))]


# -- edges -----------------------------------------------------------------------------------------


def crossings(graph: nx.MultiDiGraph, positions: dict[str, Point]) -> int:
    """How many pairs of edges cross when each is drawn as a straight line."""
    lines = sorted({(u, v) for u, v in graph.edges()})
    if not lines:
        return 0
    a = np.array([positions[u] for u, _ in lines])  # [edge, xy]
    b = np.array([positions[v] for _, v in lines])

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        """On which side of each line p -> q each point r lies: [line, point]."""
        d, e = (q - p)[:, None], r[None] - p[:, None]
        turn = d[..., 0] * e[..., 1] - d[..., 1] * e[..., 0]
        return np.where(np.abs(turn) < 1e-9, 0, np.sign(turn))

    split = (side(a, b, a) * side(a, b, b)) < 0  # the ends of one lie on both sides of the other
    return int((split & split.T).sum()) // 2


def bezier(curves: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Points `[curve, t, xy]` of curves with control points `[4, curve, xy]`, at each `t`."""
    (p, q, r, s), t = curves[:, :, None], t[:, None]
    return (1 - t) ** 3 * p + 3 * t * (1 - t) ** 2 * q + 3 * t**2 * (1 - t) * r + t**3 * s


def routes(
    graph: nx.MultiDiGraph, positions: dict[str, Point]
) -> dict[tuple[str, str, str], Curve]:
    """The four control points of each edge's Bezier curve, in the units of `layout`.

    Edges leave at the top of a box and enter at the bottom, q, k and v side by side. Each one bows
    as far to the side as it needs to pass by the boxes in between, and stays in its lane; the
    strongest have the most ways to choose from, and the weakest of thousands none.
    """
    grid, lane = _Grid.of(graph, positions), _lane(graph)
    strong, others = (_strongest(graph, count) for count in (_STRONG, _BOWED))
    result: dict[tuple[str, str, str], Curve] = {}
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    for u, v, key, data in graph.edges(keys=True, data=True):
        (x0, y0), (x1, y1) = positions[u], positions[v]
        start = x0, y0 + BOX[1] / 2
        end = x1 + _ENTRIES.get(data["slot"], 0.0) * BOX[0], y1 - BOX[1] / 2
        # The same slot at another position would lie exactly on top: fan those out a little.
        nth = seen[u, v, data["slot"]]
        seen[u, v, data["slot"]] += 1
        fan = 0.14 * ((nth + 1) // 2) * (1 if nth % 2 else -1)
        lean, land = 0.0, 0.0
        if (u, v, key) in others or data["structural"]:
            bows = _BOWS[(u, v, key) in strong]
            lean, land = grid.bow(start, end, bows, lane[u])
        rise = _RISE * max(end[1] - start[1], 0.4)
        result[u, v, key] = (
            start, (start[0] + lean + fan, start[1] + rise),
            (end[0] + land + fan, end[1] - rise), end,
        )  # fmt: skip
    return result


def _strongest(graph: nx.MultiDiGraph, count: int) -> set[tuple[str, str, str]]:
    """The edges of largest |score|."""
    ranked = sorted(real_edges(graph), key=lambda edge: -abs(edge[3]["score"]))
    return {edge[:3] for edge in ranked[:count]}


def _ways(steps: Sequence[float]) -> np.ndarray:
    """How far a curve can be pulled aside at its start and at its end, and how much that disturbs
    the eye (its size, and more if it turns both ways): [bow, 3], the straightest first."""
    ways = [(a, b, max(abs(a), abs(b)) + 0.3 * abs(a - b)) for a in steps for b in steps]
    return np.array(sorted(ways, key=lambda way: way[2]))


_STRONG, _BOWED = 60, 3000
"""How many edges, the strongest, may choose from many ways, and from some."""
_BOWS = (
    _ways((0.0, 0.4, -0.4, 0.9, -0.9, 1.6, -1.6, 2.6, -2.6)),
    _ways([step / 5 for step in range(-15, 16)]),
)
_RISE = 0.45
"""How steeply curves start and end: where their inner control points are on the way up."""
_T = np.linspace(0, 1, 101)
_UP = 3 * _T * (1 - _T) ** 2 * _RISE + 3 * _T**2 * (1 - _T) * (1 - _RISE) + _T**3
"""How far up each curve is at `_T`, whichever way it bows."""


@dataclass(frozen=True)
class _Grid:
    """Which boxes are at which height, to find ways between them."""

    heights: np.ndarray  # [row], upwards
    across: np.ndarray  # [row, box], nan where a row has fewer boxes than others
    sides: dict[int, Point]
    """How far edges of a lane may reach."""

    @classmethod
    def of(cls, graph: nx.MultiDiGraph, positions: dict[str, Point]) -> _Grid:
        rows: dict[float, list[float]] = defaultdict(list)
        lanes: dict[int, list[float]] = defaultdict(list)
        lane = _lane(graph)
        for node, (x, y) in positions.items():
            rows[y].append(x)
            lanes[lane[node]].append(x)
        lanes.pop(-1, None)
        heights = sorted(rows)
        across = np.full((len(rows), max(map(len, rows.values()))), np.nan)
        for i, y in enumerate(heights):
            across[i, : len(rows[y])] = rows[y]
        sides = {pos: (min(xs) - 0.6, max(xs) + 0.6) for pos, xs in lanes.items()}
        return cls(np.array(heights), across, sides)

    def bow(self, start: Point, end: Point, bows: np.ndarray, lane: int) -> Point:
        """The cheapest bow: it bends little, runs behind few boxes and leaves its lane seldom."""
        (x0, y0), (x1, y1) = start, end
        # Bow outwards on the side where the edge already is, so that left and right balance.
        low, high = self.sides.get(lane, (-math.inf, math.inf))
        middle = (low + high) / 2 if math.isfinite(low) else 0.0
        aside, bend = math.copysign(1.0, (x0 + x1) / 2 - middle) * bows[:, :2], bows[:, 2]
        rows = ((self.heights > y0) & (self.heights < y1)).nonzero()[0]
        if not len(rows):
            return 0.0, 0.0
        # at the lower end, the middle and the upper end of the boxes of each row
        up = (self.heights[rows] + np.array([[-0.5], [0.0], [0.5]]) * BOX[1]).ravel()
        t = np.interp((up - y0) / (y1 - y0), _UP, _T)
        x = (1 - t) ** 2 * (1 + 2 * t) * x0 + t**2 * (3 - 2 * t) * x1  # [point], without a bow
        x = x + 3 * t * (1 - t) * (aside[:, :1] * (1 - t) + aside[:, 1:] * t)  # [bow, point]
        near = np.abs(x[..., None] - self.across[np.tile(rows, 3)]) < BOX[0] / 2 + 0.04
        outside = (x < low) | (x > high)
        best = aside[(near.any(-1).sum(-1) + 0.3 * outside.sum(-1) + 0.2 * bend).argmin()]
        return float(best[0]), float(best[1])
