"""One verb for every picture: heatmaps of scores, score against effect, circuits.

    draw(scores)                  # layer x position (or span), or layer x head with kind="head"
    draw(scores, effect)          # one panel per kind, with Pearson's r and the relative error
    draw(edges)                   # writer x reader
    draw(circuit)                 # layered diagram, `embed` at the bottom, `logits` on top

Blue is positive and red negative everywhere, on a scale that is symmetric about 0. Where things
go (`layout`, `routes`) is separate from how they are painted, and shared with the SVG export.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.graph import check_circuit, real_edges, size
from circuits.judge.agreement import agreement, points
from relp.layout import Component
from relp.scores import ALL_POSITIONS, Scores

__all__ = ["crossings", "draw", "layout", "lined_up", "node_positions", "routes"]

POSITIVE, NEGATIVE, NEUTRAL = "#2166ac", "#b2182b", "#8c959f"
"""The hues of plotly's RdBu, and that of edges without a score."""

BOX = (0.78, 0.42)
"""Width and height of a node, in units of `layout`."""

Point = tuple[float, float]
Curve = tuple[Point, Point, Point, Point]

PORTS = {"q": -0.23, "k": 0.0, "v": 0.23}
_MOST_POINTS = 5000
_MOST_ROWS = 100
_LARGEST_TIDY = 1500


def draw(
    what: Scores | nx.MultiDiGraph,
    against: Scores | None = None,
    *,
    kind: str | None = None,
    positions: bool = False,
    title: str | None = None,
) -> go.Figure:
    """Draws node scores, edge scores, scores against measured effects, or a circuit.

    >>> draw(scores, kind="head")
    >>> draw(scores, against=effect)
    >>> draw(circuit)

    Args:
        what: `Scores` or `Effects` of nodes (heatmap, mean over pairs; by position, or by span if
            the prompts have their spans at different positions) or edges (writer x reader, summed
            over positions), or a circuit.
        against: `Effects` to compare `what` with: a scatter plot, one point per pair, component
            and position (edges: per edge), with the line y = x.
        kind: which components a heatmap of nodes shows; `resid` if there, else the first.
        positions: show nodes by position even where spans are at different ones.
        title: plain text that replaces where the numbers come from.

    Raises:
        TypeError: `what` or `against` is of another type, or they do not go together.
        ValueError: `kind` is not among the components, the circuit is empty, or the two results
            were not made for the same model, task and direction.
    """
    if isinstance(what, Scores) and isinstance(against, Scores):
        figure = _scatter(what, against, kind)
    elif isinstance(what, Scores) and against is None:
        if what.level == "edge":
            figure = _edge_heatmap(what)
        else:
            figure = _node_heatmap(what if positions else lined_up(what), kind)
    elif isinstance(what, nx.MultiDiGraph) and against is None:
        figure = _circuit(what)
    else:
        given = type(what).__name__ + (
            f" and {type(against).__name__}" if against is not None else ""
        )
        raise TypeError(
            "draw takes Scores, Effects, Scores with Effects, or a circuit "
            f"(networkx.MultiDiGraph); got {given}; see help(draw)"
        )
    if title is not None:
        figure.update_layout(title_text=plain(title))
    return figure


def plain(text: str) -> str:
    """`text` so that plotly, which renders some HTML, shows it as it is."""
    return html.escape(text, quote=False)


def heading(graph: nx.MultiDiGraph) -> str:
    """Where a circuit's numbers come from: the same line as `Scores.title`."""
    g = graph.graph
    return f"{g['rules']} · {g['model']} · {g['task']} · {g['direction']}"


def extent(graph: nx.MultiDiGraph) -> str:
    """How much of the model a circuit is: `200 of 32,491 edges`."""
    return f"{size(graph):,} of {graph.graph['total_edges']:,} edges"


# -- scores ---------------------------------------------------------------------------------------


def _heatmap(z: np.ndarray, name: str, **trace: Any) -> go.Heatmap:
    """Red to blue, with 0 white and both ends equally far from it."""
    finite = np.abs(z[np.isfinite(z)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return go.Heatmap(
        z=z,
        colorscale="RdBu",
        zmin=-limit,
        zmid=0,
        zmax=limit,
        colorbar={"title": {"text": plain(name), "side": "right"}, "thickness": 14},
        **trace,
    )


def _unit(scores: Scores) -> str:
    return f"{scores.noun} ({scores.metric})"


def _node_heatmap(scores: Scores, kind: str | None) -> go.Figure:
    kinds = scores.kinds()
    kind = kind or ("resid" if "resid" in kinds else kinds[0])
    names, nodes = scores.of_kind(kind)
    parsed = [Component.parse(name) for name in names]
    if kind in ("head", "kv") or (kind == "neuron" and len(names) > _MOST_ROWS):
        layers = sorted({c.layer for c in parsed})
        z = np.full((len(layers), max(c.head for c in parsed) + 1), np.nan)
        labels = np.full(z.shape, "", dtype=object)
        # pair by pair: means by position of prompts of several lengths are over different pairs
        for c, total in zip(parsed, nodes.sum(-1).mean(0).tolist(), strict=True):
            z[layers.index(c.layer), c.head] = total
            labels[layers.index(c.layer), c.head] = c.name
        x_title, rows = kind, [f"L{layer}" for layer in layers]
        ticks = {"dtick": 1 if z.shape[1] <= 32 else None}
    else:
        named = kind == "neuron" or parsed[0].layer < 0
        z = replace(scores, components=names, nodes=nodes).mean.double().numpy()
        rows = [c.name if named else f"L{c.layer}" for c in parsed]
        together = scores.tokens if scores.tokens == ALL_POSITIONS else ()
        places = scores.places or together or range(z.shape[1])
        labels = np.array(
            [[f"{name}@{plain(str(place))}" for place in places] for name in names], dtype=object
        )
        x_title, ticks = "span" if scores.places else "position", _token_ticks(scores, z.shape[1])
    figure = go.Figure(
        _heatmap(
            z,
            _unit(scores),
            customdata=labels,
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
            xgap=1 if z.shape[1] <= 64 else 0,
            ygap=1 if z.shape[0] <= 64 else 0,
        )
    )
    sums = {kind: ", summed over positions", "span": "; other: the sum over all other positions"}
    figure.update_layout(
        title_text=f"{plain(scores.title)}<br><sup>{kind}, mean over {len(scores.clean)} pairs"
        f"{sums.get(x_title, '')}</sup>",
        template="plotly_white",
        height=max(340, 200 + 26 * len(rows)),
    )
    figure.update_xaxes(title_text=x_title, showgrid=False, zeroline=False, **ticks)
    figure.update_yaxes(
        title_text="layer" if parsed[0].layer >= 0 else None,
        tickvals=list(range(len(rows))),
        ticktext=rows,
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    return figure


def lined_up(scores: Scores) -> Scores:
    """By span if pairs have a span at different positions: a mean by position would smear it."""
    apart = any(len(at.unique()) > 1 for at in scores.spans.values())
    return scores.by_span() if apart else scores


def _token_ticks(scores: Scores, width: int) -> dict[str, Any]:
    """What stands at each position, where that is the same for every pair."""
    if scores.places or scores.tokens == ALL_POSITIONS:
        return {"tickvals": list(range(width)), "ticktext": [plain(t) for t in scores.tokens]}
    if len(scores.tokens) != width or len(set(scores.lengths.tolist())) != 1:
        return {"dtick": 1 if width <= 40 else None}
    shown = [plain(token.replace("\n", "↵").replace("\t", "⇥")) for token in scores.tokens]
    return {
        "tickvals": list(range(width)),
        "ticktext": [f"{token} · {p}" if token else str(p) for p, token in enumerate(shown)],
        "tickangle": -60,
    }


def _edge_heatmap(scores: Scores) -> go.Figure:
    assert scores.edges is not None
    edges = scores.edges.detach().double().cpu()
    table = (edges if edges.dim() == 2 else edges.sum(0)).numpy()
    figure = go.Figure(
        _heatmap(
            # blank where there can be no edge
            np.where(scores.layout.exists.numpy(), table, np.nan),
            _unit(scores),
            x=[plain(reader) for reader in scores.readers],
            y=[plain(writer) for writer in scores.writers],
            hovertemplate="%{y} → %{x}: %{z:.4g}<extra></extra>",
        )
    )
    figure.update_layout(
        title_text=f"{plain(scores.title)}<br><sup>mean over {len(scores.clean)} pairs</sup>",
        template="plotly_white",
        height=max(420, min(900, 200 + 14 * len(table))),
        plot_bgcolor="#eaeef2",
    )
    figure.update_xaxes(title_text="reader", showgrid=False)
    figure.update_yaxes(title_text="writer", showgrid=False, autorange="reversed")
    return figure


# -- score against effect -------------------------------------------------------------------------


def _scatter(scores: Scores, effects: Scores, kind: str | None) -> go.Figure:
    measures = agreement(scores, effects).set_index("kind")
    panels = dict(points(scores, effects))
    panels.pop("edge", None)  # all of the slots together
    if kind is not None:
        if kind not in panels:
            raise ValueError(
                f"`kind` must be one of {tuple(panels)}; got {kind!r}; leave it out to see them all"
            )
        panels = {kind: panels[kind]}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[
            f"{name} · Pearson {_measured(r, '.3f')} · error {_measured(e, '.2f')}"
            for name in panels
            for r, e in [measures.loc[name, ["pearson", "relative_error"]]]
        ],
        horizontal_spacing=0.08,
        vertical_spacing=0.3 / rows,
    )
    for i, samples in enumerate(panels.values()):
        y, x = (np.concatenate(values) for values in zip(*samples, strict=True))
        at = {"row": i // columns + 1, "col": i % columns + 1}
        # The measured effect across, the estimate up: points on the line are right.
        if len(x) > _MOST_POINTS:
            chosen = np.random.default_rng(0).permutation(len(x))[:_MOST_POINTS]
            x, y = x[chosen], y[chosen]
        ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))] if len(x) else [0, 1]
        figure.add_trace(
            go.Scatter(
                x=ends,
                y=ends,
                mode="lines",
                line={"color": NEUTRAL, "width": 1, "dash": "dot"},
                hoverinfo="skip",
            ),
            **at,
        )
        figure.add_trace(
            go.Scatter(
                x=x.tolist(),
                y=y.tolist(),
                mode="markers",
                marker={"color": POSITIVE, "size": 4, "opacity": 0.45},
                hovertemplate=f"{plain(effects.noun)} %{{x:.4g}}<br>{plain(scores.noun)} %{{y:.4g}}"
                "<extra></extra>",
            ),
            **at,
        )
    noun = scores.noun if scores.noun != effects.noun else f"{scores.noun}, {scores.rules}"
    figure.update_xaxes(title_text=plain(_unit(effects)), zerolinecolor="#d0d7de")
    figure.update_yaxes(title_text=plain(f"{noun} ({scores.metric})"), zerolinecolor="#d0d7de")
    means = (
        "; Pearson's r and relative error are means over pairs" if scores.level == "node" else ""
    )
    figure.update_layout(
        title_text=f"{plain(scores.title)}<br><sup>against {plain(effects.rules)} "
        f"{plain(effects.noun)}s{means}</sup>",
        template="plotly_white",
        showlegend=False,
        height=120 + 340 * rows,
        margin={"t": 110},
    )
    return figure


def _measured(value: float, form: str) -> str:
    return "undefined" if math.isnan(value) else format(value, form)


# -- circuits: where things go --------------------------------------------------------------------


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
    rows: dict[tuple[float, int], list[str]] = defaultdict(list)
    for node, data in graph.nodes(data=True):
        layer = math.inf if data["kind"] == "logits" else float(data["layer"])
        rows[layer, {"kv": 0, "neuron": 2, "mlp": 2}.get(data["kind"], 1)].append(node)
    for nodes in rows.values():
        nodes.sort(key=lambda node: graph.nodes[node]["head"])

    heights: dict[tuple[float, int], float] = {}
    for above in sorted(rows):
        below = list(heights)[-1] if heights else above
        step = 0.0 if below == above else 0.8 if below[0] == above[0] else 1.15
        heights[above] = (heights[below] if heights else 0.0) + step

    # Equal scores would leave weights of 0; the small constant keeps every edge in the mean.
    peak = max((abs(d["score"]) for *_, d in real_edges(graph)), default=0.0) or 1.0
    pull: dict[str, dict[str, float]] = {node: defaultdict(float) for node in graph}
    for u, v, data in graph.edges(data=True):
        weight = 0.05 + abs(data["score"]) / peak
        pull[u][v] += weight
        pull[v][u] += weight

    x = {node: i - (len(nodes) - 1) / 2 for nodes in rows.values() for i, node in enumerate(nodes)}
    best = dict(x)
    small = graph.number_of_edges() <= _LARGEST_TIDY
    fewest = _crossings(graph, x, rows, heights) if small else math.inf
    for sweep in range(12):
        for key in sorted(rows, reverse=bool(sweep % 2)):
            wish = {
                node: sum(w * x[other] for other, w in pull[node].items()) / total
                if (total := sum(pull[node].values()))
                else x[node]
                for node in rows[key]
            }
            rows[key].sort(key=lambda node: wish[node])
            x |= _apart([(node, wish[node]) for node in rows[key]])
        crossings = _crossings(graph, x, rows, heights) if small else -sweep
        if crossings < fewest:
            fewest, best = crossings, dict(x)
    middle = (max(best.values()) + min(best.values())) / 2
    return {node: (best[node] - middle, heights[key]) for key in heights for node in rows[key]}


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


def _crossings(
    graph: nx.MultiDiGraph,
    x: dict[str, float],
    rows: dict[tuple[float, int], list[str]],
    heights: dict[tuple[float, int], float],
) -> int:
    y = {node: heights[key] for key, nodes in rows.items() for node in nodes}
    return crossings(graph, {node: (x[node], y[node]) for node in graph})


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


def routes(
    graph: nx.MultiDiGraph, positions: dict[str, Point]
) -> dict[tuple[str, str, str], Curve]:
    """The four control points of each edge's Bezier curve, in the units of `layout`.

    Edges leave at the top of a box and enter at the bottom, q, k and v side by side. Each one bows
    as far to the side as it needs to pass by the boxes in between.
    """
    boxes = np.array(list(positions.values()))  # [node, xy]
    w, h = BOX
    t = np.linspace(0.04, 0.96, 22)[:, None]
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
            path = (  # [bow, t, xy]
                (1 - t) ** 3 * start
                + 3 * t * (1 - t) ** 2 * lean[:, None]
                + 3 * t**2 * (1 - t) * land[:, None]
                + t**3 * end
            )
            near = np.abs(path[:, :, None] - between)  # [bow, t, node, xy]
            inside = (near[..., 0] < w / 2 + 0.04) & (near[..., 1] < h / 2 + 0.04)
            best = int((inside.any(1).sum(1) + prices).argmin())
        points = (start, lean[best], land[best], end)
        p, q, r, s = ((float(x), float(y)) for x, y in points)
        result[u, v, key] = (p, q, r, s)
    return result


def _bend(bow: tuple[float, float] | list[float]) -> float:
    """How much a bow disturbs the eye: its size, and more if it turns both ways."""
    a, b = bow
    return max(abs(a), abs(b)) + 0.3 * abs(a - b)


# -- circuits: how they are painted ---------------------------------------------------------------


def tint(score: float, limit: float) -> str:
    """A node's fill: white at 0, towards blue or red at `limit` and beyond."""
    share = 0.85 * min(1.0, abs(score) / limit) if limit > 0 else 0.0
    hue = POSITIVE if score >= 0 else NEGATIVE
    mixed = (round(255 + (int(hue[i : i + 2], 16) - 255) * share) for i in (1, 3, 5))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def ink(score: float, limit: float) -> str:
    """A text colour that can be read on `tint`."""
    return "#ffffff" if limit > 0 and abs(score) / limit > 0.62 else "#1f2328"


def node_limit(graph: nx.MultiDiGraph) -> float:
    """The score at which node colours saturate: `embed` is left out, it carries nearly all."""
    scores = {node: abs(data["score"]) for node, data in graph.nodes(data=True)}
    inner = [score for node, score in scores.items() if node != "embed"]
    return max(inner, default=0.0) or max(scores.values(), default=0.0) or 1.0


def edge_limit(graph: nx.MultiDiGraph) -> float:
    """The largest |score| of an edge: the width of every other is in proportion to it."""
    return max((abs(d["score"]) for *_, d in real_edges(graph)), default=0.0) or 1.0


def edge_hue(data: dict[str, Any]) -> str:
    """The colour of an edge's sign; what only holds the circuit together has none."""
    if data["structural"]:
        return NEUTRAL
    return POSITIVE if data["score"] >= 0 else NEGATIVE


def node_positions(graph: nx.MultiDiGraph, node: str) -> str:
    """The positions that a node writes at (`logits`, key/value heads: reads): `@2 @14`, `@2…14`.

    Empty if edges are summed over positions.
    """
    written, read = (
        sorted({d["pos"] for *_, d in edges if d["pos"] >= 0})
        for edges in (graph.out_edges(node, data=True), graph.in_edges(node, data=True))
    )
    at = written or read
    return f"@{at[0]}…{at[-1]}" if len(at) > 2 else " ".join(f"@{pos}" for pos in at)


def node_note(graph: nx.MultiDiGraph, node: str) -> str:
    """What hovering over a node says."""
    edges_in = sum(1 for *_, d in graph.in_edges(node, data=True) if not d["structural"])
    edges_out = sum(1 for *_, d in graph.out_edges(node, data=True) if not d["structural"])
    data = graph.nodes[node]
    score = "" if data["kind"] in ("kv", "logits") else f" · score {data['score']:+.4g}"
    where = f" {node_positions(graph, node)}" if graph.graph["positions"] else ""
    return f"{node}{where}{score} · {edges_in} in, {edges_out} out"


def edge_note(u: str, v: str, data: dict[str, Any]) -> str:
    """What hovering over an edge says."""
    if data["structural"]:
        return f"{u} → {v} (its keys and values)"
    where = f" @ position {data['pos']}" if data["pos"] >= 0 else ""
    return f"{u} → {data['reader']}{where}: {data['score']:+.4g}"


def _second_line(text: str) -> str:
    return f"<br><span style='font-size:8px'>{text}</span>" if text else ""


_PIXELS = (76.0, 66.0)  # across and up, per unit of layout: annotations are sized in pixels
_STEPS = 8


def _circuit(graph: nx.MultiDiGraph) -> go.Figure:
    positions = layout(graph)
    curves = routes(graph, positions)
    strongest, limit = edge_limit(graph), node_limit(graph)
    t = np.linspace(0, 1, 24)[:, None]
    blend = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])

    # A plotly line has one width: edges of one colour and nearly one width share a trace. Steps
    # are even in the square root, as most scores are small.
    groups: dict[tuple[int, str], list[tuple[str, str, np.ndarray, dict[str, Any]]]]
    groups = defaultdict(list)
    for u, v, key, data in graph.edges(keys=True, data=True):
        path = (blend * np.array(curves[u, v, key])[:, None]).sum(0)  # [t, xy]
        share = 0.0 if data["structural"] else math.sqrt(abs(data["score"]) / strongest)
        groups[math.ceil(_STEPS * share), edge_hue(data)].append((u, v, path, data))
    figure = go.Figure()
    for (step, hue), members in sorted(groups.items()):  # the strongest last, so on top
        gap = np.full((1, 2), np.nan)
        xy = np.concatenate([piece for _, _, path, _ in members for piece in (path, gap)])
        figure.add_trace(
            go.Scatter(
                x=xy[:, 0],
                y=xy[:, 1],
                mode="lines",
                line={
                    "color": hue,
                    "width": max(0.7, 7 * (step / _STEPS) ** 2),
                    "dash": "dot" if hue == NEUTRAL else "solid",
                },
                opacity=0.8 if hue == NEUTRAL else 0.35 + 0.5 * step / _STEPS,
                hoverinfo="skip",
                name=f"edges {step}/{_STEPS}",
            )
        )
    every = [member for _, members in sorted(groups.items()) for member in members]
    # Arrays, and colours as numbers: plotly looks at lists and names of colours one by one.
    places = np.array([path[i] for _, _, path, _ in every for i in (5, 9, 13, 17)]).reshape(-1, 2)
    hues = (NEGATIVE, NEUTRAL, POSITIVE)
    figure.add_trace(
        go.Scatter(
            x=places[:, 0],
            y=places[:, 1],
            mode="markers",
            marker={
                "size": 9,
                "opacity": 0,
                "color": np.array([hues.index(edge_hue(d)) for *_, d in every]).repeat(4),
                "colorscale": [[i / 2, hue] for i, hue in enumerate(hues)],
                "cmin": 0,
                "cmax": 2,
            },
            hovertext=np.array([plain(edge_note(u, v, d)) for u, v, _, d in every]).repeat(4),
            hoverinfo="text",
            name="edges",
        )
    )
    shown = [graph.nodes[node]["score"] for node in positions]
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in positions.values()],
            y=[y for _, y in positions.values()],
            mode="markers",
            marker={
                "size": 30,
                "opacity": 0,
                "color": shown,
                "colorscale": [[0, tint(-1.0, 1.0)], [0.5, "#ffffff"], [1, tint(1.0, 1.0)]],
                "cmin": -limit,
                "cmid": 0,
                "cmax": limit,
                "colorbar": {
                    "title": {
                        "text": plain(f"node score ({graph.graph['metric']})"),
                        "side": "right",
                    },
                    "thickness": 12,
                    "len": 0.5,
                },
            },
            hovertext=[plain(node_note(graph, node)) for node in positions],
            hoverinfo="text",
            name="nodes",
        )
    )
    boxes = [
        {
            "x": x,
            "y": y,
            "text": plain(node) + _second_line(node_positions(graph, node)),
            "showarrow": False,
            "bgcolor": tint(graph.nodes[node]["score"], limit),
            "bordercolor": "#57606a",
            "borderpad": 2,
            "width": BOX[0] * _PIXELS[0] - 6,
            "height": BOX[1] * _PIXELS[1] - 6,
            "font": {"size": 11, "color": ink(graph.nodes[node]["score"], limit)},
        }
        for node, (x, y) in positions.items()
    ]
    curved = np.concatenate([path for *_, path, _ in every] or [np.zeros((0, 2))])
    reach = np.concatenate([np.array(list(positions.values())), curved])
    (left, low), (right, high) = reach.min(0) - [0.7, 0.6], reach.max(0) + [0.7, 0.6]
    margin = {"l": 50, "r": 110, "t": 80, "b": 20}
    figure.update_layout(
        title_text=f"{plain(heading(graph))}<br><sup>{extent(graph)}; blue positive, red negative, "
        "width by |score|</sup>",
        template="plotly_white",
        showlegend=False,
        width=max(620, margin["l"] + margin["r"] + _PIXELS[0] * (right - left)),
        height=margin["t"] + margin["b"] + _PIXELS[1] * (high - low),
        hovermode="closest",
        annotations=boxes,
        margin=margin,
    )
    figure.update_xaxes(visible=False, range=[left, right])
    layers: dict[int, set[float]] = defaultdict(set)
    for node, (_, y) in positions.items():
        if graph.nodes[node]["layer"] >= 0:
            layers[graph.nodes[node]["layer"]].add(y)
    figure.update_yaxes(
        tickvals=[sum(at) / len(at) for at in layers.values()],
        ticktext=[f"L{layer}" for layer in layers],
        showgrid=False,
        zeroline=False,
        range=[low, high],
    )
    return figure
