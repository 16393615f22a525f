"""A circuit as an SVG picture that stands alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx

from circuits.draw import paint
from circuits.draw.lanes import drawn
from circuits.draw.layout import (
    BOX,
    PORTS,
    Curve,
    Point,
    bands,
    frame,
    lanes,
    layout,
    routes,
)

__all__ = ["METADATA", "picture"]

METADATA = "relp-circuit"
"""The id of the element that holds what `picture` is given to carry."""

_DASHED = 800
"""Edges up to which structural ones are dashed: in a .pdf each dash is a shape, with round ends a
large one. Their hue tells them from others anyway."""
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

    >>> from circuits.draw.svg import picture
    >>> picture(circuit).startswith("<?xml")
    True

    Args:
        graph: a circuit.
        title: plain text in place of the task and the model.
        metadata: text to carry along unseen, in the element with the id `METADATA`.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    whole, graph = graph, drawn(graph)
    positions = layout(graph)
    curves = routes(graph, positions)
    columns = lanes(graph, positions)
    canvas = _Canvas.around(frame(positions, curves), paint.pixels(graph), laned=bool(columns))
    svg = canvas.blank()
    _add(svg, "title", text=title or paint.heading(graph))
    if metadata is not None:
        _add(svg, "metadata", text=metadata, id=METADATA)
    _add(svg, "style", text=_STYLE)
    _add(svg, "rect", width="100%", height="100%", fill="#ffffff")
    _heading(svg, title, whole, graph, canvas.width)
    _bands(svg, bands(graph, positions), canvas)
    _lanes(svg, columns, canvas)
    _edges(svg, graph, curves, canvas)
    nodes, limit = _add(svg, "g"), paint.node_limit(graph)
    for node, point in positions.items():
        _node(nodes, graph, node, canvas.box(point), limit)
    _legend(svg, graph, canvas.height)
    text = ET.tostring(svg, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


class _Box(NamedTuple):
    """The middle and the size of a box, in pixels."""

    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True)
class _Canvas:
    """How large the picture is in pixels, and where the units of `layout` are in it."""

    unit: Point
    left: float
    top: float
    bottom: float
    shift: float
    width: float
    height: float

    @classmethod
    def around(cls, corners: tuple[Point, Point], unit: Point, *, laned: bool) -> _Canvas:
        (left, low), (right, top) = corners
        plot = max((right - left) * unit[0], 620.0)
        deep = (top - low) * unit[1] + 34 * laned  # with the names of the lanes
        return cls(
            unit,
            left,
            top,
            bottom=_HEAD + deep,
            shift=(plot - (right - left) * unit[0]) / 2,
            width=_GUTTER + plot + 2 * _MARGIN,
            height=_HEAD + deep + _FOOT,
        )

    def at(self, point: Point) -> Point:
        x, y = point
        across = _MARGIN + _GUTTER + self.shift + (x - self.left) * self.unit[0]
        return across, _HEAD + (self.top - y) * self.unit[1]

    def box(self, point: Point) -> _Box:
        return _Box(*self.at(point), BOX[0] * self.unit[0], BOX[1] * self.unit[1])

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


def _rect(parent: ET.Element, corner: Point, other: Point, **look: str) -> ET.Element:
    """From the upper left corner to the lower right one."""
    (x, y), (right, bottom) = corner, other
    sides = {"width": f"{right - x:.1f}", "height": f"{bottom - y:.1f}"}
    return _add(parent, "rect", x=f"{x:.1f}", y=f"{y:.1f}", **sides, **look)


def _label(parent: ET.Element, x: float, y: float, text: str, px: float, **more: str) -> ET.Element:
    return _add(parent, "text", text, x=f"{x:.1f}", y=f"{y:.1f}", font_size=f"{px:g}", **more)


def _fit(text: str, px: float, room: float, least: int = 8) -> str:
    """Cuts what would run out of its room; a letter is about 0.55 of the font size wide."""
    letters = max(least, int(room / (0.55 * px)))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _heading(
    svg: ET.Element, title: str | None, whole: nx.MultiDiGraph, graph: nx.MultiDiGraph, width: float
) -> None:
    room, (first, second) = width - 2 * _MARGIN, paint.titles(whole, title, graph)
    px = max(13.0, min(20.0, room / (0.55 * len(first) + 1)))  # smaller before it is cut
    _label(svg, _MARGIN, 42.0, _fit(first, px, room), px, font_weight="600")
    _label(svg, _MARGIN, 65.0, _fit(second, 13.0, room), 13.0, style=_CAPTION)


def _bands(svg: ET.Element, layers: dict[int, Point], canvas: _Canvas) -> None:
    """A pale band behind each layer, with its number at the left."""
    for layer, (low, high) in layers.items():
        (_, bottom), (_, top) = canvas.at((0.0, low)), canvas.at((0.0, high))
        _rect(svg, (_MARGIN, top), (canvas.width - _MARGIN, bottom), rx="8", fill=paint.BAND)
        middle = (top + bottom) / 2 + 4
        _label(svg, _MARGIN + 12, middle, f"layer {layer}", 12.0, style=_CAPTION)


def _lanes(svg: ET.Element, columns: dict[str, Point], canvas: _Canvas) -> None:
    """A pale column behind each lane, with the name of its position at the bottom."""
    for place, sides in columns.items():
        left, right = (canvas.at((x, 0.0))[0] for x in sides)
        look = {"rx": "8", "fill": paint.MUTED, "fill_opacity": f"{paint.LANE}"}
        _rect(svg, (left + 3, _HEAD), (right - 3, canvas.bottom), **look)
        name = _label(svg, (left + right) / 2, canvas.bottom - 11, "", 12.0, text_anchor="middle")
        name.text = paint.ILLEGAL.sub("�", _fit(place, 12.0, right - left, least=4))
        name.set("font-weight", "500")
        _add(name, "title", text=place)


def _edges(
    svg: ET.Element,
    graph: nx.MultiDiGraph,
    curves: dict[tuple[str, str, str], Curve],
    canvas: _Canvas,
) -> None:
    """The strongest last, so on top."""
    group, strongest = _add(svg, "g"), paint.edge_limit(graph)
    noted = zip(graph.edges(keys=True, data=True), paint.edge_notes(graph), strict=True)
    for (u, v, key, data), note in sorted(noted, key=lambda edge: abs(edge[0][3]["score"])):
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (canvas.at(point) for point in curves[u, v, key])
        opacity = paint.edge_opacity(
            paint.edge_share(data, strongest), structural=data["structural"], edges=len(curves)
        )
        path = _add(
            group,
            "path",
            d=f"M{x0:.1f} {y0:.1f}C{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {x3:.1f} {y3:.1f}",
            stroke=paint.edge_hue(data),
            class_="relp-edge",
            fill="none",
            stroke_linecap="butt" if data["structural"] else "round",
            stroke_width=f"{paint.edge_width(data, strongest):.2f}",
            stroke_opacity=f"{opacity:.2f}",
        )
        if data["structural"] and len(curves) <= _DASHED:
            path.set("stroke-dasharray", "3 4")
        _add(path, "title", text=note)


def _node(parent: ET.Element, graph: nx.MultiDiGraph, node: str, box: _Box, limit: float) -> None:
    """A box: heads have rounded corners and their slots, MLPs and ends are pills."""
    data, (x, y, w, h) = graph.nodes[node], box
    group = _add(parent, "g", class_="relp-node")
    _add(group, "title", text=paint.node_note(graph, node))
    shape = _rect(
        group,
        (x - w / 2, y - h / 2),
        (x + w / 2, y + h / 2),
        rx="6" if data["kind"] in ("head", "kv") else f"{h / 2:.1f}",
        fill=paint.tint(data["score"], limit),
        stroke=paint.MUTED,
        stroke_width="1.1",
    )
    if data["kind"] == "kv":
        shape.set("stroke-dasharray", "3 2")
    slots, label = paint.node_slots(graph, node), paint.node_label(graph, node)
    middle = {"text_anchor": "middle", "style": f"fill:{paint.ink(data['score'], limit)}"}
    px = min(13.0, 1.55 * w / max(7, len(label)))
    # with slots a little higher: they are below, where edges come in
    _label(group, x, y + (0.5 if slots else 4.5), label, px, font_weight="500", **middle)
    for slot in slots:
        _label(group, x + PORTS[slot] * w, y + h / 2 - 3.5, slot, 8.5, **middle)


def _legend(svg: ET.Element, graph: nx.MultiDiGraph, height: float) -> None:
    y, x, limit = height - 40, _MARGIN, paint.node_limit(graph)
    for hue, width, word in paint.samples(paint.edge_limit(graph)):
        _line(svg, x, y, hue, width)
        _label(svg, x + 33, y + 4, word, 12.0, style=_CAPTION)
        x += 76 if hue == paint.NEUTRAL else 104
    x += 16
    stops = _add(_add(svg, "defs"), "linearGradient", id="relp-scale")
    for offset, score in (("0", -1.0), ("0.5", 0.0), ("1", 1.0)):
        _add(stops, "stop", offset=offset, stop_color=paint.tint(score, 1.0))
    low, high = f"−{limit:.2g}", f"+{limit:.2g}"
    _label(svg, x, y + 4, low, 12.0, style=_CAPTION)
    x += 7.2 * len(low) + 4
    _rect(svg, (x, y - 6), (x + 96, y + 6), rx="3", fill="url(#relp-scale)")
    _label(svg, x + 104, y + 4, high, 12.0, style=_CAPTION)
    _label(svg, _MARGIN, y + 24, paint.legend(graph), 11.0, style=_CAPTION)


def _line(svg: ET.Element, x: float, y: float, hue: str, px: float) -> None:
    ends = {"x1": f"{x:.1f}", "x2": f"{x + 26:.1f}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
    _add(svg, "line", stroke=hue, **ends, stroke_width=f"{px:.2f}", stroke_opacity="0.8")
