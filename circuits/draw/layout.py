"""Where the nodes and edges of a circuit go, in units of one node; nothing here has a colour."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import networkx as nx
import numpy as np

from circuits.graph import check_circuit, real_edges

__all__ = ["BOX", "PORTS", "Curve", "Point", "bezier", "crossings", "layout", "routes"]

BOX = (0.78, 0.42)
"""Width and height of a node."""
PORTS = {"q": -0.23, "k": 0.0, "v": 0.23}
"""Where edges into the slots of a head end, as shares of its width from the middle."""

Point = tuple[float, float]
Curve = tuple[Point, Point, Point, Point]
"""The control points of a Bezier curve."""
Rows = dict[tuple[float, int], list[str]]
"""(layer, which row of it) -> its nodes from left to right."""

_LARGEST_TIDY = 1500
"""Edges up to which crossings are counted, and edges bow around boxes."""


def layout(graph: nx.MultiDiGraph) -> dict[str, Point]:
    """Where each node goes, with `embed` lowest and `logits` highest; y grows upwards.

    Rows are layers: key/value heads, then query heads, then MLP and neurons above them. Within a
    row nodes are at least 1 apart, ordered and placed near the mean of their neighbours (weighted
    by |score|), which keeps edges short and crossings few. Rows that hold nothing take no room.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    check_circuit(graph)
    if len(graph) == 0:
        raise ValueError(
            "a circuit must have a node to be drawn; this one is empty (no edge lies on a path "
            "from embed to logits); ask for more edges or pass connected=False"
        )
    rows = _rows(graph)
    heights = _heights(rows)
    y = {node: heights[key] for key, nodes in rows.items() for node in nodes}
    sweeps = list(_sweeps(rows, _pull(graph)))
    last = best = sweeps[-1]
    if graph.number_of_edges() <= _LARGEST_TIDY:
        best = min(sweeps, key=lambda x: crossings(graph, {n: (x[n], y[n]) for n in graph}))
    middle = (max(best.values()) + min(best.values())) / 2
    return {
        node: (best[node] - middle, y[node])
        for key in heights
        for node in sorted(rows[key], key=lambda node: last[node])
    }


def _rows(graph: nx.MultiDiGraph) -> Rows:
    """Nodes by row, in the order of their heads."""
    rows: Rows = defaultdict(list)
    for node, data in graph.nodes(data=True):
        layer = math.inf if data["kind"] == "logits" else float(data["layer"])
        rows[layer, {"kv": 0, "neuron": 2, "mlp": 2}.get(data["kind"], 1)].append(node)
    return {
        key: sorted(nodes, key=lambda node: graph.nodes[node]["head"])
        for key, nodes in rows.items()
    }


def _heights(rows: Rows) -> dict[tuple[float, int], float]:
    """From the lowest row up; rows of one layer are closer together."""
    heights: dict[tuple[float, int], float] = {}
    for above in sorted(rows):
        below = list(heights)[-1] if heights else above
        step = 0.0 if below == above else 0.8 if below[0] == above[0] else 1.15
        heights[above] = (heights[below] if heights else 0.0) + step
    return heights


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


def _sweeps(rows: Rows, pull: dict[str, dict[str, float]]) -> Iterator[dict[str, float]]:
    """Where nodes are in their rows, at first and after each way up or down through the rows."""
    order = dict(rows)
    x = {node: i - (len(nodes) - 1) / 2 for nodes in rows.values() for i, node in enumerate(nodes)}
    yield dict(x)
    for sweep in range(12):
        for key in sorted(order, reverse=bool(sweep % 2)):
            wish = {
                node: sum(w * x[other] for other, w in pull[node].items()) / total
                if (total := sum(pull[node].values()))
                else x[node]
                for node in order[key]
            }
            order[key] = sorted(order[key], key=lambda node: wish[node])
            x |= _apart([(node, wish[node]) for node in order[key]])
        yield dict(x)


def _apart(wishes: list[tuple[str, float]]) -> dict[str, float]:
    """The places nearest to the wishes (least squares) that keep the order and 1 between them."""
    blocks: list[tuple[float, int]] = []  # mean and number of nodes that are pushed together
    for i, (_, wish) in enumerate(wishes):
        mean, count = wish - i, 1
        while blocks and blocks[-1][0] > mean:
            other, others = blocks.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        blocks.append((mean, count))
    starts = [mean for mean, count in blocks for _ in range(count)]
    return {
        node: start + i for i, ((node, _), start) in enumerate(zip(wishes, starts, strict=True))
    }


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
    as far to the side as it needs to pass by the boxes in between.
    """
    boxes = np.array(list(positions.values()))  # [node, xy]
    w, h = BOX
    # How far the curve is pulled aside at its start and at its end: [bow, 2], cheapest first.
    steps = (0.0, 0.4, -0.4, 0.9, -0.9, 1.6, -1.6, 2.6, -2.6)
    bows = np.array(sorted(((a, b) for a in steps for b in steps), key=_bend))
    if graph.number_of_edges() > _LARGEST_TIDY:
        bows = bows[:1]
    prices = 0.2 * np.array([_bend(bow) for bow in bows.tolist()])
    result: dict[tuple[str, str, str], Curve] = {}
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    for u, v, key, data in graph.edges(keys=True, data=True):
        (x0, y0), (x1, y1) = positions[u], positions[v]
        start = np.array([x0, y0 + h / 2])
        end = np.array([x1 + PORTS.get(data["slot"], 0.0) * w, y1 - h / 2])
        rise = np.array([0.0, 0.45 * max(float(end[1] - start[1]), 0.4)])
        # The same slot at another position would lie exactly on top: fan those out a little.
        nth = seen[u, v, data["slot"]]
        seen[u, v, data["slot"]] += 1
        fan = 0.14 * ((nth + 1) // 2) * (1 if nth % 2 else -1)
        # Bow outwards on the side where the edge already is, so that left and right balance.
        aside = math.copysign(1.0, x0 + x1) * bows + fan
        sideways = np.stack([aside, np.zeros_like(aside)], axis=-1)  # [bow, 2, xy]
        lean, land = start + rise + sideways[:, 0], end - rise + sideways[:, 1]  # [bow, xy]
        between = boxes[(boxes[:, 1] > y0 + 0.1) & (boxes[:, 1] < y1 - 0.1)]
        best = 0
        if len(between) and len(bows) > 1:
            curves = np.stack(np.broadcast_arrays(start, lean, land, end))  # [4, bow, xy]
            best = int((_covered(curves, between) + prices).argmin())
        points = (start, lean[best], land[best], end)
        p, q, r, s = ((float(x), float(y)) for x, y in points)
        result[u, v, key] = (p, q, r, s)
    return result


def _covered(curves: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Of each curve, how many of 22 points along it come close to a box: [bow]."""
    path = bezier(curves, np.linspace(0.04, 0.96, 22))  # [bow, t, xy]
    near = np.abs(path[:, :, None] - boxes)  # [bow, t, node, xy]
    w, h = BOX
    inside = (near[..., 0] < w / 2 + 0.04) & (near[..., 1] < h / 2 + 0.04)
    return inside.any(1).sum(1)


def _bend(bow: tuple[float, float] | list[float]) -> float:
    """How much a bow disturbs the eye: its size, and more if it turns both ways."""
    a, b = bow
    return max(abs(a), abs(b)) + 0.3 * abs(a - b)
