"""A circuit as an SVG picture that stands alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from circuits.draw import paint
from circuits.draw.layout import BOX, PORTS, Curve, Point, layout, routes

__all__ = ["METADATA", "picture"]

METADATA = "relp-circuit"
"""The id of the element that holds what `picture` is given to carry."""

_X, _Y = 94.0, 74.0
"""Pixels per unit of layout."""
_MARGIN, _HEAD, _FOOT, _GUTTER = 28.0, 92.0, 84.0, 62.0
_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
# Prefixed, as the picture may stand in a page with styles of its own.
_STYLE = f"""
.relp-edge:hover {{ stroke-opacity: 1; stroke: {paint.DARK}; }}
.relp-node:hover rect {{ stroke: {paint.DARK}; stroke-width: 2.5; }}
"""
_CAPTION = f"fill:{paint.MUTED}"


def picture(graph: nx.MultiDiGraph, title: str | None = None, metadata: str | None = None) -> str:
    """A picture of `layout` and `routes` that needs nothing else; notes appear on hovering.

    >>> picture(circuit).startswith("<?xml")
    True

    Args:
        graph: a circuit.
        title: plain text in place of the task and the model.
        metadata: text to carry along unseen, in the element with the id `METADATA`.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    positions = layout(graph)
    curves = routes(graph, positions)
    canvas = _Canvas.around(positions.values(), curves.values())
    svg = canvas.blank()
    _add(svg, "title", text=title or paint.heading(graph))
    if metadata is not None:
        _add(svg, "metadata", text=metadata, id=METADATA)
    _add(svg, "style", text=_STYLE)
    _add(svg, "rect", width="100%", height="100%", fill="#ffffff")
    _heading(svg, graph, title, canvas.width)
    places = {node: canvas.at(point) for node, point in positions.items()}
    _bands(svg, graph, places, canvas.width)
    _edges(svg, graph, curves, canvas)
    nodes, limit = _add(svg, "g"), paint.node_limit(graph)
    for node, place in places.items():
        _node(nodes, graph, node, place, limit)
    _legend(svg, graph, canvas.height)
    text = ET.tostring(svg, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


@dataclass(frozen=True)
class _Canvas:
    """How large the picture is in pixels, and where the units of `layout` are in it."""

    left: float
    top: float
    shift: float
    width: float
    height: float

    @classmethod
    def around(cls, points: Iterable[Point], curves: Iterable[Curve]) -> _Canvas:
        # A Bezier curve stays within its control points, and uses about 3/4 of a sideways bow.
        reach = [0.75 * x + 0.25 * x0 for (x0, _), *inner, _ in curves for x, _ in inner]
        xs, ys = zip(*points, strict=True)
        sides = [x + side for x in xs for side in (-0.6, 0.6)] + reach
        left, right = min(sides), max(sides)
        plot = max((right - left) * _X, 620.0)
        return cls(
            left,
            max(ys),
            shift=(plot - (right - left) * _X) / 2,
            width=_GUTTER + plot + 2 * _MARGIN,
            height=_HEAD + (max(ys) - min(ys)) * _Y + 60 + _FOOT,
        )

    def at(self, point: Point) -> Point:
        x, y = point
        across = _MARGIN + _GUTTER + self.shift + (x - self.left) * _X
        return across, _HEAD + 30 + (self.top - y) * _Y

    def blank(self) -> ET.Element:
        return ET.Element(
            "svg",
            {
                "xmlns": "http://www.w3.org/2000/svg",
                "width": f"{self.width:.0f}",
                "height": f"{self.height:.0f}",
                "viewBox": f"0 0 {self.width:.0f} {self.height:.0f}",
                "role": "img",
                "font-family": _FONT,
                "fill": paint.DARK,
            },
        )


# -- pieces ----------------------------------------------------------------------------------------


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    """A child; `stroke_width` is `stroke-width`, and `class_` is `class`."""
    names = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()}
    child = ET.SubElement(parent, tag, names)
    if text is not None:
        child.text = paint.ILLEGAL.sub("�", text)
    return child


def _label(parent: ET.Element, x: float, y: float, text: str, px: float, **more: str) -> ET.Element:
    return _add(parent, "text", text, x=f"{x:.1f}", y=f"{y:.1f}", font_size=f"{px:g}", **more)


def _fit(text: str, px: float, room: float) -> str:
    """Cuts what would run out of the picture; a letter is about 0.55 of the font size wide."""
    letters = max(8, int(room / (0.55 * px)))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _heading(svg: ET.Element, graph: nx.MultiDiGraph, title: str | None, width: float) -> None:
    g, room = graph.graph, width - 2 * _MARGIN
    metric = f"{g['metric']} {g['metric_clean']:.3g} clean, {g['metric_corrupt']:.3g} corrupt"
    first = title or f"{g['task']} · {g['model']}"
    second = f"{g['rules']} · {g['direction']} · {paint.extent(graph)} · {metric}"
    _label(svg, _MARGIN, 42.0, _fit(first, 20.0, room), 20.0, font_weight="600")
    _label(svg, _MARGIN, 65.0, _fit(second, 13.0, room), 13.0, style=_CAPTION)


def _bands(svg: ET.Element, graph: nx.MultiDiGraph, places: dict[str, Point], width: float) -> None:
    """A pale band behind each layer, with its number at the left."""
    layers: dict[int, list[float]] = {}
    for node, (_, y) in places.items():
        if graph.nodes[node]["layer"] >= 0:
            layers.setdefault(graph.nodes[node]["layer"], []).append(y)
    for layer, ys in layers.items():
        top, bottom = min(ys) - 0.46 * _Y, max(ys) + 0.46 * _Y
        _add(
            svg,
            "rect",
            x=f"{_MARGIN:.0f}",
            y=f"{top:.1f}",
            width=f"{width - 2 * _MARGIN:.1f}",
            height=f"{bottom - top:.1f}",
            rx="10",
            fill="#f6f8fa",
        )
        _label(
            svg, _MARGIN + 12, (top + bottom) / 2 + 4, f"layer {layer}", 12.0, style="fill:#6e7781"
        )


def _edges(
    svg: ET.Element,
    graph: nx.MultiDiGraph,
    curves: dict[tuple[str, str, str], Curve],
    canvas: _Canvas,
) -> None:
    """The strongest last, so on top."""
    group, strongest = _add(svg, "g"), paint.edge_limit(graph)
    ranked = sorted(graph.edges(keys=True, data=True), key=lambda edge: abs(edge[3]["score"]))
    for u, v, key, data in ranked:
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (canvas.at(point) for point in curves[u, v, key])
        share = paint.edge_share(data, strongest)
        opacity = paint.edge_opacity(share, structural=data["structural"])
        path = _add(
            group,
            "path",
            d=f"M{x0:.1f} {y0:.1f}C{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {x3:.1f} {y3:.1f}",
            stroke=paint.edge_hue(data),
            class_="relp-edge",
            fill="none",
            stroke_linecap="round",
            stroke_width=f"{paint.edge_width(data, strongest):.2f}",
            stroke_opacity=f"{opacity:.2f}",
        )
        if data["structural"]:
            path.set("stroke-dasharray", "2 3")
        _add(path, "title", text=paint.edge_note(u, v, data))


def _node(parent: ET.Element, graph: nx.MultiDiGraph, node: str, at: Point, limit: float) -> None:
    """A box: heads have rounded corners and their slots, MLPs and ends are pills."""
    data, (x, y) = graph.nodes[node], at
    w, h = BOX[0] * _X, BOX[1] * _Y
    group = _add(parent, "g", class_="relp-node")
    _add(group, "title", text=paint.node_note(graph, node))
    box = _add(
        group,
        "rect",
        x=f"{x - w / 2:.1f}",
        y=f"{y - h / 2:.1f}",
        width=f"{w:.1f}",
        height=f"{h:.1f}",
        rx="6" if data["kind"] in ("head", "kv") else f"{h / 2:.1f}",
        fill=paint.tint(data["score"], limit),
        stroke=paint.MUTED,
        stroke_width="1.1",
    )
    if data["kind"] == "kv":
        box.set("stroke-dasharray", "3 2")
    entered = {d["slot"] for *_, d in graph.in_edges(node, data=True)}
    slots = [slot for slot in PORTS if slot in entered]
    where = paint.node_positions(graph, node)
    middle = {"text_anchor": "middle", "style": f"fill:{paint.ink(data['score'], limit)}"}
    px = (11.0 if where else 13.0) * 7 / max(7, len(node))
    drop = 3.0 if where else 0.5 if slots else 4.5
    _label(group, x, y + drop, node, px, font_weight="500", **middle)
    if where:  # above, where edges leave; what they enter through is below
        _label(group, x, y - h / 2 + 8.0, where, 7.5, **middle)
    for slot in slots:
        _label(group, x + PORTS[slot] * w, y + h / 2 - 3.5, slot, 8.5, **middle)


def _legend(svg: ET.Element, graph: nx.MultiDiGraph, height: float) -> None:
    y, x = height - 40, _MARGIN
    strongest, limit = paint.edge_limit(graph), paint.node_limit(graph)
    for hue, word in ((paint.POSITIVE, "positive"), (paint.NEGATIVE, "negative")):
        _line(svg, x, y, hue, 4.0)
        _label(svg, x + 33, y + 4, word, 12.0, style=_CAPTION)
        x += 104
    for share in (1.0, 0.5, 0.1):
        _line(svg, x, y, paint.NEUTRAL, paint.line_width(share))
        _label(svg, x + 33, y + 4, f"{share * strongest:.2g}", 12.0, style=_CAPTION)
        x += 76
    x += 16
    stops = _add(_add(svg, "defs"), "linearGradient", id="relp-scale")
    for offset, score in (("0", -1.0), ("0.5", 0.0), ("1", 1.0)):
        _add(stops, "stop", offset=offset, stop_color=paint.tint(score, 1.0))
    low, high = f"−{limit:.2g}", f"+{limit:.2g}"
    _label(svg, x, y + 4, low, 12.0, style=_CAPTION)
    x += 7.2 * len(low) + 4
    _add(
        svg,
        "rect",
        x=f"{x:.1f}",
        y=f"{y - 6:.1f}",
        width="96",
        height="12",
        rx="3",
        fill="url(#relp-scale)",
    )
    _label(svg, x + 104, y + 4, high, 12.0, style=_CAPTION)
    note = f"edges: score ({graph.graph['metric']}) · boxes: score of the node, all its edges"
    if any(data["structural"] for *_, data in graph.edges(data=True)):
        note += " · dashed: keys and values"
    _label(svg, _MARGIN, y + 24, note, 11.0, style=_CAPTION)


def _line(svg: ET.Element, x: float, y: float, hue: str, px: float) -> None:
    ends = {"x1": f"{x:.1f}", "x2": f"{x + 26:.1f}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
    _add(svg, "line", stroke=hue, **ends, stroke_width=f"{px:.2f}", stroke_opacity="0.8")
