"""Circuits as .dot, for Graphviz: attributes are there twice, as data and as style.

Layers are rows from the bottom up: nodes of `rank="same"` in a frame for each layer, or, in a
circuit that `circuits.draw.lanes.by_lane` made, for each position. Invisible edges stack the rows.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import networkx as nx

from circuits.draw import paint
from circuits.files.layers import frames, rows
from circuits.graph import Circuit, has_lanes

__all__ = ["from_dot", "to_dot"]

_STYLE = {
    "color", "fillcolor", "fontcolor", "labelloc", "newrank", "penwidth", "rankdir", "style",
    "tooltip",
}  # fmt: skip
_HIDDEN = 'style="invis"'
"""Of nodes and edges that are not the circuit's: they only keep rows and lanes in order."""
_WORDS = _STYLE | {"digraph", "edge", "graph", "node", "strict", "subgraph"}


def _quote(text: str) -> str:
    """As Graphviz shows it: what could end the text or its line is an HTML entity."""
    special = r'[&<>"\\\x00-\x1f\x7f-\x9f\u2028\u2029]'
    return '"' + re.sub(special, lambda letter: f"&#{ord(letter[0])};", text) + '"'


def _label(text: str) -> str:
    """In labels a backslash begins an escape such as \\N, also one written as an entity."""
    return _quote(text.replace("\\", 2 * "\\"))


def _text(word: str) -> str:
    """Undoes `_quote`; html.unescape by itself would drop control characters."""
    if word[:1] != '"':
        return word
    return re.sub(
        r"&(?:#(\d{1,7})|#?\w+);",
        lambda entity: chr(int(entity[1])) if entity[1] else html.unescape(entity[0]),
        word[1:-1].replace('\\"', '"'),
    )


def _value(value: object) -> str:
    """Text as it is, all else as JSON; text that could be taken for JSON as JSON too."""
    text = json.dumps(value)
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            text = value
    return _quote(text)


def _read(word: str) -> Any:
    text = _text(word)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _attributes(data: dict[str, Any], **style: str) -> str:
    words = {name: _value(value) for name, value in data.items()}
    words |= {name: _quote(value) for name, value in style.items()}
    return "[" + ", ".join(f"{name}={word}" for name, word in words.items()) + "];"


def to_dot(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """Graphviz' language, a line for each statement: attributes as data, and as colours and widths.

    Raises:
        ValueError: an attribute has the name of one of Graphviz' own that are written here.
    """
    for *_, data in [("", graph.graph), *graph.nodes(data=True), *graph.edges(data=True)]:
        if taken := [name for name in data if name.lower() in _WORDS]:
            raise ValueError(
                f"attributes must not be named {sorted(_WORDS)} in .dot; got {sorted(taken)}; "
                "rename them or save as .graphml"
            )
    limit, strongest = paint.node_limit(graph), paint.edge_limit(graph)
    lines = [
        'digraph "circuit" {',
        *('rankdir="BT";', 'newrank="true";', 'labelloc="t";'),
        f"label={_label(title or paint.heading(graph))};",
        *(f"{name}={_value(value)};" for name, value in graph.graph.items()),
        'node [shape="box", style="rounded,filled", fontname="Helvetica"];',
    ]
    for node, data in graph.nodes(data=True):
        style = {
            "fillcolor": paint.tint(data["score"], limit),
            "fontcolor": paint.ink(data["score"], limit),
            "tooltip": paint.node_note(graph, node),
        }
        lines.append(f"{_quote(node)} {_attributes(data, **style)}")
    noted = zip(graph.edges(keys=True, data=True), paint.edge_notes(graph), strict=True)
    for (u, v, key, data), note in noted:
        style = {
            "color": paint.edge_hue(data),
            "penwidth": f"{paint.edge_width(data, strongest):.2f}",
            "style": "dashed" if data["structural"] else "solid",
            "tooltip": note,
        }
        lines.append(f"{_quote(u)} -> {_quote(v)} {_attributes({'key': key, **data}, **style)}")
    return "\n".join([*lines, *_arranged(graph), "}", ""])


def _arranged(graph: nx.MultiDiGraph) -> Iterator[str]:
    """A row above the other, and frames; lanes of one height, side by side.

    Graphviz cannot be told the order of frames. It mostly keeps to that of marks in them, which are
    joined below and above.
    """
    ranks = [[_quote(node) for node in row] for row in rows(graph)]
    framed = {name: [_quote(node) for node in nodes] for name, nodes in frames(graph).items()}
    if has_lanes(graph):
        ends = (("foot", "out"), ("head", "in"))
        for (end, way), rank in zip(ends, ranks[:1] + ranks[-1:], strict=bool(ranks)):
            joint = _quote(f" {end}")
            yield f"{joint} [{_HIDDEN}, shape=point, ordering={way}];"
            for lane, nodes in enumerate(framed.values()):
                mark = _quote(f" {end} {lane}")
                yield f"{mark} [{_HIDDEN}, shape=point];"
                yield " -> ".join((joint, mark)[:: 1 if way == "out" else -1]) + f" [{_HIDDEN}];"
                nodes.append(mark)
                rank.append(mark)
    look = f'color="#f0f2f5"; fontcolor="{paint.MUTED}"; style="filled,rounded"'
    for number, (name, nodes) in enumerate(framed.items()):
        yield f"subgraph cluster_{number} {{ label={_label(name)}; {look}; {'; '.join(nodes)}; }}"
    yield from (f"{{ rank=same; {'; '.join(rank)}; }}" for rank in ranks)
    for (below, *_), (above, *_) in pairwise(ranks):
        yield f"{below} -> {above} [{_HIDDEN}];"


_GAP = r"(?:\s|//[^\n]*\n|/\*(?s:.*?)\*/)*"
_WORD = r'"[^"\\]*(?:\\(?s:.)[^"\\]*)*"|-?[.\w]+'
_START = re.compile(rf"{_GAP}digraph{_GAP}(?:{_WORD})?{_GAP}\{{{_GAP}")
_OPEN = re.compile(rf"(?:subgraph\b{_GAP}(?:{_WORD})?{_GAP})?\{{{_GAP}")
_STATEMENT = re.compile(rf"({_WORD}){_GAP}(?:(->|=){_GAP}({_WORD}){_GAP})?(\[)?{_GAP};?{_GAP}")
_PAIR = re.compile(rf"({_WORD}){_GAP}={_GAP}({_WORD}){_GAP}[,;]?{_GAP}")
_CLOSE = re.compile(rf"\]{_GAP};?{_GAP}")
_END = re.compile(rf"\}}{_GAP};?{_GAP}")


def _statements(text: str) -> Iterator[tuple[int, str, str | None, str, dict[str, Any]]]:
    """`(depth, word, sign, word, attributes)` of each; the sign is `->`, `=`, or None with one
    word; the depth is that of subgraphs.

    What Graphviz' language has for nodes, edges, subgraphs and attributes, so that a file can be
    edited by hand. A general parser takes minutes for the graph of a model.
    """
    at = 0

    def read(pattern: re.Pattern[str]) -> re.Match[str] | None:
        nonlocal at
        if found := pattern.match(text, at):
            at = found.end()
        return found

    depth = 1 if read(_START) else 0
    while depth:
        if read(_OPEN):
            depth += 1
        elif read(_END):
            depth -= 1
        elif found := read(_STATEMENT):
            first, sign, second, opened = found.groups()
            data = {}
            while pair := opened and read(_PAIR):
                data[_text(pair[1])] = _read(pair[2])
            if opened and not read(_CLOSE):
                break
            yield depth - 1, first, sign, second, data
        else:
            break
    if depth or not at or at < len(text):
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"line {line} is no node, edge or attribute of a graph in .dot")


def from_dot(text: str) -> nx.MultiDiGraph:
    """Undoes `to_dot`, and leaves the style out."""
    result = Circuit()
    for depth, first, sign, second, data in _statements(text):
        kept = {name: value for name, value in data.items() if name not in _STYLE}
        if data.get("style") == "invis":
            continue
        if sign == "->":
            result.add_edge(_text(first), _text(second), **kept)  # `key` among them
        elif sign == "=":
            if not depth and first not in _STYLE | {"label"}:
                result.graph[_text(first)] = _read(second)
        elif first not in ("node", "edge", "graph") and (data or not depth):  # those are defaults
            result.add_node(_text(first), **kept)
    return result
