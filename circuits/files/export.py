"""Circuits in files, both ways, by suffix: nothing is pickled and no C library is needed.

    save(circuit, "ioi.svg"); circuit = load("ioi.svg")

=========  =======  ================================================================
suffix     load     what it is
=========  =======  ================================================================
.json      yes      networkx' node-link data, as nx.node_link_graph reads it
.graphml   yes      for yEd, Gephi, igraph, Cytoscape
.gexf      yes      for Gephi
.dot       yes      for Graphviz; attributes are there twice, as data and as style
.svg       yes      a picture that stands alone; the graph as JSON in its metadata
.html      yes      the interactive figure, works offline; the graph as JSON inside
.mmd       no       Mermaid, for Markdown files; up to 500 edges
.mib.json  yes      EAP-IG's and MIB's graphs (`circuits.mib`): all edges of a model
=========  =======  ================================================================

A file appears whole or not at all. Plotly figures can be saved too, as .html or .json.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import plotly.graph_objects as go

from circuits.draw import (
    BOX,
    NEGATIVE,
    NEUTRAL,
    PORTS,
    POSITIVE,
    draw,
    edge_hue,
    edge_limit,
    edge_note,
    extent,
    heading,
    ink,
    layout,
    node_limit,
    node_note,
    node_positions,
    plain,
    routes,
    tint,
)
from circuits.files.mib import from_mib, to_mib
from circuits.graph import check_circuit
from relp.choices import MIB, SUFFIXES
from relp.scores import check_texts, written_whole

__all__ = ["load", "save"]

_FORMAT, _VERSION = "relp-circuit", 2
_RESERVED = {
    "id", "key", "label", "source", "target",  # words of the file formats themselves
    "edge_default", "edge_key", "node_default",  # … and of what reads and writes them
    "node_for_adding", "self", "u_for_edge", "v_for_edge",  # arguments of networkx
}  # fmt: skip
_ILLEGAL_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def save(
    what: nx.MultiDiGraph | go.Figure,
    path: str | Path,
    *,
    title: str | None = None,
    model: Any = None,
) -> Path:
    """Writes a circuit (or a plotly figure) in the format that the suffix names.

    >>> save(circuit, "ioi.svg")
    >>> save(circuit, "ioi.mib.json", model=model)
    >>> save(draw(circuit), "ioi.html")

    Args:
        what: a circuit; or a figure, for .html and .json.
        path: where to; an existing file is replaced.
        title: plain text in place of the one made from model, task and rules; .graphml, .gexf and
            .mib.json have no place for one.
        model: for .mib.json, which holds its shape and all of its edges: the `TransformerBridge`
            that the circuit is about.

    Returns:
        The path.

    Raises:
        TypeError: `what` is neither a circuit nor a figure.
        ValueError: the suffix is unknown or not for figures, a name or an attribute cannot be
            stored in the format, the circuit is empty or too large to be drawn in it, or `model` is
            missing or not for the format.
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    figure = isinstance(what, go.Figure)
    suffix = _suffix(path, _FIGURES if figure else SUFFIXES, " of a figure" if figure else "")
    _check_model(path, suffix, model)
    check_texts("the title", title)
    if isinstance(what, go.Figure):
        text = _figure_text(what, suffix, title)
    elif suffix == MIB:
        check_circuit(what)
        if model is None:
            raise ValueError(
                f"`model` must be the TransformerBridge that the circuit is about, as {MIB} holds "
                "its shape; got None; call circuits.save(circuit, path, model=model)"
            )
        return to_mib(what, path, model)
    else:
        _check_storable(check_circuit(what))
        text = _WRITERS[suffix](what, title)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def load(path: str | Path, *, model: Any = None) -> nx.MultiDiGraph:
    """Reads a circuit that `save` wrote: the same ids, keys, attributes and types.

    >>> path = save(circuit, "ioi.json")
    >>> set(load(path).edges) == set(circuit.edges)
    True

    Only a file named .mib.json gives all edges of its model and no attributes but the format's own,
    as `from_mib(path, model)` does; `from_mib(path, model, in_graph=True)` gives the circuit in it.

    Args:
        path: the file.
        model: for .mib.json: the `TransformerBridge` that it is about, if key/value heads are
            wanted as nodes.

    Raises:
        ValueError: the suffix is unknown, the file does not hold a circuit of ours, or `model` is
            not for the format.
        OSError: the file does not exist or cannot be read.
    """
    path = Path(path)
    suffix = _suffix(path, (*_READERS, MIB))
    _check_model(path, suffix, model)
    if suffix == MIB:
        return from_mib(path, model)
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a circuit's file; there is no file {str(path)!r}; check the name"
        )
    try:
        return check_circuit(_READERS[suffix](path.read_text(encoding="utf-8")))
    # ElementTree's ParseError is a SyntaxError
    except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, nx.NetworkXException,
            RecursionError) as error:  # fmt: skip
        raise ValueError(
            f"{str(path)!r} must be a circuit written by circuits.save; it is not "
            f"({type(error).__name__}: {error}); for scores use Scores.load, for graphs of EAP-IG "
            "and MIB from_mib"
        ) from error


def _suffix(path: Path, known: Sequence[str], of: str = "") -> str:
    """The suffix of the format; a name that ends in .mib.json is none of .json."""
    found = [suffix for suffix in SUFFIXES if path.name.endswith(suffix)]
    suffix = max(found, key=len, default="")
    if suffix not in known:
        why = "; .mmd can only be written" if suffix == ".mmd" and not of else ""
        raise ValueError(
            f"the suffix{of} must be one of {' '.join(known)}; got {path.name!r}{why}; choose "
            "another name"
        )
    return suffix


def _check_model(path: Path, suffix: str, model: Any) -> None:
    if model is not None and suffix != MIB:
        raise ValueError(
            f"`model` must be left out unless the suffix is {MIB}, the only one that needs it; got "
            f"{path.name!r}; leave it out or choose another name"
        )


def _check_storable(graph: nx.MultiDiGraph) -> None:
    """Refuses what would not come back: other types, NaN, names that formats use themselves."""
    for name in [*graph, *(key for *_, key in graph.edges(keys=True))]:
        if not isinstance(name, str):
            raise ValueError(
                f"nodes and keys of edges must be str; got {name!r}, {type(name).__name__}; "
                "rename it"
            )
        check_texts("a node or an edge", name)
    owners = [("the graph", graph.graph)]
    owners += [(f"node {node!r}", data) for node, data in graph.nodes(data=True)]
    owners += [
        (f"edge {u!r} -> {v!r} ({k!r})", data)
        for u, v, k, data in graph.edges(keys=True, data=True)
    ]
    for owner, data in owners:
        for name, value in data.items():
            if type(value) not in (str, int, float, bool):
                raise ValueError(
                    f"attributes must be str, int, float or bool; {name!r} of {owner} is "
                    f"{type(value).__name__}; convert or delete it"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"numbers must be finite; {name!r} of {owner} is {value}; replace or delete it"
                )
            if name in _RESERVED or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(
                    f"attributes must be named like variables and not {sorted(_RESERVED)}; "
                    f"{owner} has {name!r}; rename it"
                )
            check_texts(f"{name!r} of {owner}", value)


# -- JSON -----------------------------------------------------------------------------------------


_EDGES_OF = {1: "links", 2: "edges"}
"""What each version calls its edges: networkx changed its default in 3.6."""


def to_json(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """Node-link data, with the format and its version."""
    data = nx.node_link_data(graph, edges=_EDGES_OF[_VERSION])
    extra = {} if title is None else {"title": title}
    return json.dumps({"format": _FORMAT, "version": _VERSION, **extra, **data}, allow_nan=False)


def from_json(text: str) -> nx.MultiDiGraph:
    """Undoes `to_json`."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(f'the field "format" must be "{_FORMAT}"')
    version = data.get("version")
    if version not in _EDGES_OF:
        raise ValueError(
            f"the version must be one of {tuple(_EDGES_OF)}; got {version!r}; install the newer "
            "release that wrote it"
        )
    return nx.node_link_graph(data, edges=_EDGES_OF[version])


# -- GraphML and GEXF -----------------------------------------------------------------------------

_GEXF_WORDS = {"end", "parents", "pid", "slices", "spells", "start", "type", "viz", "weight"}


def _with_edge_ids(graph: nx.MultiDiGraph) -> nx.MultiDiGraph:
    """A copy whose edges are numbered: XML ids must be unique, and our keys repeat."""
    texts = [*graph, *graph.graph.values()]
    texts += [value for _, data in graph.nodes(data=True) for value in data.values()]
    for _, _, key, data in graph.edges(keys=True, data=True):
        texts += [key, *data.values()]
    for text in texts:
        if isinstance(text, str) and _ILLEGAL_XML.search(text):
            raise ValueError(
                f"XML can hold no control characters; this circuit has {text!r}; replace them or "
                "save as .json"
            )
    result = nx.MultiDiGraph()
    result.graph.update(graph.graph)
    result.add_nodes_from((node, data.copy()) for node, data in graph.nodes(data=True))
    for i, (u, v, key, data) in enumerate(graph.edges(keys=True, data=True)):
        result.add_edge(u, v, key=f"e{i}", edge_key=key, **data)
    return result


def _without_edge_ids(graph: nx.Graph) -> nx.MultiDiGraph:
    """Undoes `_with_edge_ids`, and what networkx' readers add."""
    result = nx.MultiDiGraph()
    result.add_nodes_from(
        (node, {k: v for k, v in data.items() if k != "label"})
        for node, data in graph.nodes(data=True)
    )
    for u, v, data in graph.edges(data=True):
        kept = {k: v for k, v in data.items() if k not in ("id", "edge_key")}
        result.add_edge(u, v, key=data["edge_key"], **kept)
    return result


def to_graphml(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """GraphML; attributes keep their types."""
    buffer = io.BytesIO()
    nx.write_graphml_xml(_with_edge_ids(graph), buffer, prettyprint=True)
    return buffer.getvalue().decode("utf-8")


def from_graphml(text: str) -> nx.MultiDiGraph:
    """Undoes `to_graphml`."""
    graph = nx.parse_graphml(text, force_multigraph=True)
    result = _without_edge_ids(graph)
    defaults = ("node_default", "edge_default")
    result.graph.update((k, v) for k, v in graph.graph.items() if k not in defaults)
    return result


def to_gexf(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """GEXF has no attributes of graphs: they are JSON in its description."""
    for owners in (graph.nodes(data=True), graph.edges(data=True)):
        kinds: dict[str, type] = {}
        for *_, data in owners:
            if taken := _GEXF_WORDS & set(data):
                raise ValueError(
                    f"attributes must not be named {sorted(_GEXF_WORDS)} in .gexf; got "
                    f"{sorted(taken)}; rename them or save as .graphml"
                )
            for name, value in data.items():
                kind = kinds.setdefault(name, type(value))
                if type(value) is not kind:
                    raise ValueError(
                        f"an attribute must be of one type in .gexf; {name!r} is {kind.__name__} "
                        f"and {type(value).__name__}; convert it or save as .graphml"
                    )
    bare = _with_edge_ids(graph)
    bare.graph.clear()
    buffer = io.BytesIO()
    nx.write_gexf(bare, buffer)
    before, meta, after = buffer.getvalue().decode("utf-8").partition("</meta>")
    labels = html.escape(json.dumps(graph.graph), quote=False)
    return f"{before}<description>{labels}</description>{meta}{after}"


def from_gexf(text: str) -> nx.MultiDiGraph:
    """Undoes `to_gexf`."""
    elements = (element for _, element in ET.iterparse(io.StringIO(text)))
    description = next((e.text for e in elements if e.tag.endswith("}description")), None)
    graph = nx.read_gexf(io.BytesIO(text.encode("utf-8")))
    result = _without_edge_ids(graph)
    result.graph.update(json.loads(description or "{}"))
    return result


# -- DOT ------------------------------------------------------------------------------------------

_DOT_STYLE = {
    "color", "fillcolor", "fontcolor", "labelloc", "penwidth", "rankdir", "style", "tooltip",
}  # fmt: skip
_DOT_WORDS = _DOT_STYLE | {"digraph", "edge", "graph", "node", "strict", "subgraph"}


def _dot_quote(text: str) -> str:
    """As Graphviz shows it: what could end the text or its line is an HTML entity."""
    special = r'[&<>"\\\x00-\x1f\x7f-\x9f\u2028\u2029]'
    return '"' + re.sub(special, lambda letter: f"&#{ord(letter[0])};", text) + '"'


def _dot_text(word: str) -> str:
    """Undoes `_dot_quote`; html.unescape by itself would drop control characters."""
    if word[:1] != '"':
        return word
    return re.sub(
        r"&(?:#(\d{1,7})|#?\w+);",
        lambda entity: chr(int(entity[1])) if entity[1] else html.unescape(entity[0]),
        word[1:-1].replace('\\"', '"'),
    )


def _dot_value(value: object) -> str:
    """Text as it is, all else as JSON; text that could be taken for JSON as JSON too."""
    text = json.dumps(value)
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            text = value
    return _dot_quote(text)


def _dot_read(word: str) -> Any:
    text = _dot_text(word)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dot_list(data: dict[str, Any], **style: str) -> str:
    words = {name: _dot_value(value) for name, value in data.items()}
    words |= {name: _dot_quote(value) for name, value in style.items()}
    return "[" + ", ".join(f"{name}={word}" for name, word in words.items()) + "];"


def to_dot(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """Graphviz' language, a line for each statement: attributes as data, and as colours and widths.

    Raises:
        ValueError: an attribute has the name of one of Graphviz' own that are written here.
    """
    for *_, data in [("", graph.graph), *graph.nodes(data=True), *graph.edges(data=True)]:
        if taken := [name for name in data if name.lower() in _DOT_WORDS]:
            raise ValueError(
                f"attributes must not be named {sorted(_DOT_WORDS)} in .dot; got {sorted(taken)}; "
                "rename them or save as .graphml"
            )
    limit, strongest = node_limit(graph), edge_limit(graph)
    # In labels a backslash begins an escape such as \N, also one written as an entity.
    label = _dot_quote((title or heading(graph)).replace("\\", 2 * "\\"))
    lines = [
        'digraph "circuit" {',
        *('rankdir="BT";', 'labelloc="t";', f"label={label};"),
        *(f"{name}={_dot_value(value)};" for name, value in graph.graph.items()),
        'node [shape="box", style="rounded,filled", fontname="Helvetica"];',
    ]
    for node, data in graph.nodes(data=True):
        style = {
            "fillcolor": tint(data["score"], limit),
            "fontcolor": ink(data["score"], limit),
            "tooltip": node_note(graph, node),
        }
        lines.append(f"{_dot_quote(node)} {_dot_list(data, **style)}")
    for u, v, key, data in graph.edges(keys=True, data=True):
        style = {
            "color": edge_hue(data),
            "penwidth": f"{_width(data, strongest):.2f}",
            "style": "dashed" if data["structural"] else "solid",
            "tooltip": edge_note(u, v, data),
        }
        lines.append(
            f"{_dot_quote(u)} -> {_dot_quote(v)} {_dot_list({'key': key, **data}, **style)}"
        )
    return "\n".join([*lines, "}", ""])


_GAP = r"(?:\s|//[^\n]*\n|/\*(?s:.*?)\*/)*"
_WORD = r'"[^"\\]*(?:\\(?s:.)[^"\\]*)*"|-?[.\w]+'
_DOT_START = re.compile(rf"{_GAP}digraph{_GAP}(?:{_WORD})?{_GAP}\{{{_GAP}")
_DOT_STATEMENT = re.compile(rf"({_WORD}){_GAP}(?:(->|=){_GAP}({_WORD}){_GAP})?(\[)?{_GAP};?{_GAP}")
_DOT_PAIR = re.compile(rf"({_WORD}){_GAP}={_GAP}({_WORD}){_GAP}[,;]?{_GAP}")
_DOT_CLOSE = re.compile(rf"\]{_GAP};?{_GAP}")
_DOT_END = re.compile(rf"\}}{_GAP}$")


def _dot_statements(text: str) -> Iterator[tuple[str, str | None, str, dict[str, Any]]]:
    """`(word, sign, word, attributes)` of each: the sign is `->`, `=`, or None with one word.

    What Graphviz' language has for nodes, edges and attributes, so that a file can be edited by
    hand. A general parser takes minutes for the graph of a model.
    """
    at = 0

    def read(pattern: re.Pattern[str]) -> re.Match[str] | None:
        nonlocal at
        if found := pattern.match(text, at):
            at = found.end()
        return found

    closed = read(_DOT_START)
    while found := closed and read(_DOT_STATEMENT):
        first, sign, second, opened = found.groups()
        data = {}
        while pair := opened and read(_DOT_PAIR):
            data[_dot_text(pair[1])] = _dot_read(pair[2])
        if opened and not read(_DOT_CLOSE):
            break
        yield first, sign, second, data
    if not (closed and read(_DOT_END)):
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"line {line} is no node, edge or attribute of a graph in .dot")


def from_dot(text: str) -> nx.MultiDiGraph:
    """Undoes `to_dot`, and leaves the style out."""
    result = nx.MultiDiGraph()
    for first, sign, second, data in _dot_statements(text):
        kept = {name: value for name, value in data.items() if name not in _DOT_STYLE}
        if sign == "->":
            result.add_edge(_dot_text(first), _dot_text(second), **kept)  # `key` among them
        elif sign is None and first not in ("node", "edge", "graph"):  # those are defaults
            result.add_node(_dot_text(first), **kept)
        elif sign == "=" and first not in _DOT_STYLE | {"label"}:
            result.graph[_dot_text(first)] = _dot_read(second)
    return result


# -- Mermaid --------------------------------------------------------------------------------------


_MERMAID_EDGES, _MERMAID_TEXT = 500, 50_000
"""Mermaid's maxEdges and maxTextSize, which a diagram cannot raise, only the page around it."""


def to_mermaid(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """A flowchart from bottom to top.

    Raises:
        ValueError: Mermaid would refuse to draw it for its size.
    """
    limit, strongest = node_limit(graph), edge_limit(graph)
    # The title is YAML, in which a JSON string is a valid one.
    lines = [
        "---",
        f"title: {json.dumps(title or heading(graph), ensure_ascii=False)}",
        "---",
        "flowchart BT",
    ]
    ids = {node: f"n{i}" for i, node in enumerate(graph)}
    for node, name in ids.items():
        score = graph.nodes[node]["score"]
        lines.append(f'    {name}("{_mermaid_text(node)}")')
        lines.append(
            f"    style {name} fill:{tint(score, limit)},color:{ink(score, limit)},stroke:#57606a"
        )
    styles = []
    for i, (u, v, key, data) in enumerate(graph.edges(keys=True, data=True)):
        arrow = "-.->" if data["structural"] else "-->"
        label = "" if key in ("in", "kv") else f'|"{_mermaid_text(key)}"|'
        lines.append(f"    {ids[u]} {arrow}{label} {ids[v]}")
        width = f"{_width(data, strongest):.2f}px"
        styles.append(f"    linkStyle {i} stroke:{edge_hue(data)},stroke-width:{width}")
    text = "\n".join([*lines, *styles]) + "\n"
    arrows = graph.number_of_edges()
    if arrows > _MERMAID_EDGES or len(text) > _MERMAID_TEXT:
        raise ValueError(
            f"Mermaid draws at most {_MERMAID_EDGES} edges and {_MERMAID_TEXT} letters; this "
            f"circuit has {arrows} and {len(text)}; keep fewer with circuits.top(circuit, "
            "edges=...) or save as .svg or .html"
        )
    return text


def _mermaid_text(text: str) -> str:
    """Mermaid's entities are HTML's with # in place of &."""
    special = {"&": "#amp;", "<": "#lt;", ">": "#gt;", '"': "#quot;", "#": "#35;", "\n": " "}
    return "".join(special.get(letter, letter) for letter in text)


# -- SVG ------------------------------------------------------------------------------------------

_X, _Y = 94.0, 74.0  # pixels per unit of layout
_MARGIN, _HEAD, _FOOT, _GUTTER = 28.0, 92.0, 84.0, 62.0
_FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
# Prefixed, as the picture may stand in a page with styles of its own.
_STYLE = """
.relp-edge:hover { stroke-opacity: 1; stroke: #1f2328; }
.relp-node:hover rect { stroke: #1f2328; stroke-width: 2.5; }
"""


def _width(data: dict[str, Any], strongest: float) -> float:
    """Stroke width in pixels: in proportion to |score|, but never too thin to be seen."""
    return 0.9 if data["structural"] else max(0.5, 7.0 * abs(data["score"]) / strongest)


def to_svg(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """A picture of `layout` and `routes` that needs nothing else; notes appear on hovering."""
    positions = layout(graph)
    curves = routes(graph, positions)
    strongest, limit = edge_limit(graph), node_limit(graph)

    # A Bezier curve stays within its control points, and uses about 3/4 of a sideways bow.
    reach = [0.75 * x + 0.25 * x0 for (x0, _), *inner, _ in curves.values() for x, _ in inner]
    sides = [x + side for x, _ in positions.values() for side in (-0.6, 0.6)] + reach
    left, right = min(sides), max(sides)
    floor, roof = (pick(y for _, y in positions.values()) for pick in (min, max))
    plot_width = max((right - left) * _X, 620.0)
    shift = (plot_width - (right - left) * _X) / 2
    width = _GUTTER + plot_width + 2 * _MARGIN
    height = _HEAD + (roof - floor) * _Y + 60 + _FOOT

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return _MARGIN + _GUTTER + shift + (x - left) * _X, _HEAD + 30 + (roof - y) * _Y

    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
            "role": "img",
            "font-family": _FONT,
            "fill": "#1f2328",
        },
    )
    _add(svg, "title", text=title or heading(graph))
    _add(svg, "metadata", text=to_json(graph), id=_FORMAT)
    _add(svg, "style", text=_STYLE)
    _add(svg, "rect", width="100%", height="100%", fill="#ffffff")
    _heading(svg, graph, title, width)
    _bands(svg, graph, positions, at, width)

    edges = _add(svg, "g")
    ranked = sorted(graph.edges(keys=True, data=True), key=lambda edge: abs(edge[3]["score"]))
    for u, v, key, data in ranked:  # the strongest last, so on top
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (at(point) for point in curves[u, v, key])
        path = _add(
            edges,
            "path",
            d=f"M{x0:.1f} {y0:.1f}C{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f} {x3:.1f} {y3:.1f}",
            stroke=edge_hue(data),
            **{
                "class": "relp-edge",
                "fill": "none",
                "stroke-linecap": "round",
                "stroke-width": f"{_width(data, strongest):.2f}",
                "stroke-opacity": f"{_opacity(data, strongest):.2f}",
            },
        )
        if data["structural"]:
            path.set("stroke-dasharray", "2 3")
        _add(path, "title", text=edge_note(u, v, data))

    nodes = _add(svg, "g")
    for node, point in positions.items():
        _node(nodes, graph, node, at(point), limit)
    _legend(svg, graph, strongest, limit, height)
    text = ET.tostring(svg, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _opacity(data: dict[str, Any], strongest: float) -> float:
    return 0.8 if data["structural"] else 0.35 + 0.5 * math.sqrt(abs(data["score"]) / strongest)


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    if text is not None:
        child.text = _ILLEGAL_XML.sub("�", text)
    return child


def _label(parent: ET.Element, x: float, y: float, text: str, px: float, **more: str) -> ET.Element:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-size": f"{px:g}"}
    return _add(
        parent, "text", text, **attributes, **{k.replace("_", "-"): v for k, v in more.items()}
    )


def _fit(text: str, px: float, room: float) -> str:
    """Cuts what would run out of the picture; a letter is about 0.55 of the font size wide."""
    letters = max(8, int(room / (0.55 * px)))
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _heading(svg: ET.Element, graph: nx.MultiDiGraph, title: str | None, width: float) -> None:
    g, room = graph.graph, width - 2 * _MARGIN
    metric = f"{g['metric']} {g['metric_clean']:.3g} clean, {g['metric_corrupt']:.3g} corrupt"
    first = title or f"{g['task']} · {g['model']}"
    second = f"{g['rules']} · {g['direction']} · {extent(graph)} · {metric}"
    _label(svg, _MARGIN, 42.0, _fit(first, 20.0, room), 20.0, font_weight="600")
    _label(svg, _MARGIN, 65.0, _fit(second, 13.0, room), 13.0, style="fill:#57606a")


def _bands(
    svg: ET.Element,
    graph: nx.MultiDiGraph,
    positions: dict[str, tuple[float, float]],
    at: Callable[[tuple[float, float]], tuple[float, float]],
    width: float,
) -> None:
    """A pale band behind each layer, with its number at the left."""
    layers: dict[int, list[float]] = {}
    for node, point in positions.items():
        if graph.nodes[node]["layer"] >= 0:
            layers.setdefault(graph.nodes[node]["layer"], []).append(at(point)[1])
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


def _node(
    parent: ET.Element, graph: nx.MultiDiGraph, node: str, at: tuple[float, float], limit: float
) -> None:
    """A box: heads have rounded corners and their slots, MLPs and ends are pills."""
    data, (x, y) = graph.nodes[node], at
    w, h = BOX[0] * _X, BOX[1] * _Y
    group = _add(parent, "g", **{"class": "relp-node"})
    _add(group, "title", text=node_note(graph, node))
    box = _add(
        group,
        "rect",
        x=f"{x - w / 2:.1f}",
        y=f"{y - h / 2:.1f}",
        width=f"{w:.1f}",
        height=f"{h:.1f}",
        rx="6" if data["kind"] in ("head", "kv") else f"{h / 2:.1f}",
        fill=tint(data["score"], limit),
        stroke="#57606a",
        **{"stroke-width": "1.1"},
    )
    if data["kind"] == "kv":
        box.set("stroke-dasharray", "3 2")
    colour = f"fill:{ink(data['score'], limit)}"
    slots = {d["slot"] for *_, d in graph.in_edges(node, data=True)} & set(PORTS)
    where = node_positions(graph, node)
    middle = {"text_anchor": "middle", "style": colour}
    px = (11.0 if where else 13.0) * 7 / max(7, len(node))
    drop = 3.0 if where else 0.5 if slots else 4.5
    _label(group, x, y + drop, node, px, font_weight="500", **middle)
    if where:  # above, where edges leave; what they enter through is below
        _label(group, x, y - h / 2 + 8.0, where, 7.5, **middle)
    for slot in slots:
        _label(group, x + PORTS[slot] * w, y + h / 2 - 3.5, slot, 8.5, **middle)


def _legend(
    svg: ET.Element, graph: nx.MultiDiGraph, strongest: float, limit: float, height: float
) -> None:
    y, x = height - 40, _MARGIN
    grey = "fill:#57606a"
    for hue, word in ((POSITIVE, "positive"), (NEGATIVE, "negative")):
        _line(svg, x, y, 26.0, hue, 4.0)
        _label(svg, x + 33, y + 4, word, 12.0, style=grey)
        x += 104
    for share in (1.0, 0.5, 0.1):
        _line(svg, x, y, 26.0, NEUTRAL, max(0.5, 7 * share))
        _label(svg, x + 33, y + 4, f"{share * strongest:.2g}", 12.0, style=grey)
        x += 76
    x += 16
    stops = _add(_add(svg, "defs"), "linearGradient", id="relp-scale")
    for offset, score in (("0", -1.0), ("0.5", 0.0), ("1", 1.0)):
        _add(stops, "stop", offset=offset, **{"stop-color": tint(score, 1.0)})
    low, high = f"−{limit:.2g}", f"+{limit:.2g}"
    _label(svg, x, y + 4, low, 12.0, style=grey)
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
    _label(svg, x + 104, y + 4, high, 12.0, style=grey)
    note = f"edges: score ({graph.graph['metric']}) · boxes: score of the node, all its edges"
    if any(data["structural"] for *_, data in graph.edges(data=True)):
        note += " · dashed: keys and values"
    _label(svg, _MARGIN, y + 24, note, 11.0, style=grey)


def _line(svg: ET.Element, x: float, y: float, length: float, hue: str, px: float) -> None:
    ends = {"x1": f"{x:.1f}", "x2": f"{x + length:.1f}", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
    _add(svg, "line", stroke=hue, **ends, **{"stroke-width": f"{px:.2f}", "stroke-opacity": "0.8"})


def from_svg(text: str) -> nx.MultiDiGraph:
    """The graph in the metadata."""
    for element in ET.fromstring(text).iter():
        if element.get("id") == _FORMAT:
            return from_json(element.text or "")
    raise ValueError("the picture holds no circuit in its metadata")


# -- HTML and figures -----------------------------------------------------------------------------

_SCRIPT = f'<script type="application/json" id="{_FORMAT}">'


def to_html(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """`draw`'s figure as a page, with the graph inside."""
    # Without <, no name can end the script element or start another one.
    data = to_json(graph).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = _page(draw(graph, title=title), title or heading(graph))
    before, tag, after = page.rpartition("</body>")
    return f"{before}{_SCRIPT}{data}</script>\n{tag}{after}"


def from_html(text: str) -> nx.MultiDiGraph:
    """The graph in the page."""
    _, found, rest = text.rpartition(_SCRIPT)
    if not found:
        raise ValueError("the page holds no circuit")
    return from_json(rest.partition("</script>")[0])


def _page(figure: go.Figure, title: str) -> str:
    """A page that works offline: plotly's code is inside, about 5 MB."""
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page.replace("<head>", f"<head><title>{html.escape(title)}</title>", 1)


def _figure_text(figure: go.Figure, suffix: str, title: str | None) -> str:
    if title is not None:
        figure = go.Figure(figure).update_layout(title_text=plain(title))
    check_texts("the figure", figure.to_plotly_json())
    if suffix == ".html":
        return _page(figure, title or "figure")
    return str(figure.to_json())


_WRITERS: dict[str, Callable[[nx.MultiDiGraph, str | None], str]] = {
    ".json": to_json,
    ".graphml": to_graphml,
    ".gexf": to_gexf,
    ".dot": to_dot,
    ".svg": to_svg,
    ".html": to_html,
    ".mmd": to_mermaid,
}
_READERS: dict[str, Callable[[str], nx.MultiDiGraph]] = {
    ".json": from_json,
    ".graphml": from_graphml,
    ".gexf": from_gexf,
    ".dot": from_dot,
    ".svg": from_svg,
    ".html": from_html,
}
_FIGURES = (".html", ".json")
