"""Circuits as .csv: a row for each edge, for pandas, R and spreadsheets.

    frame = pandas.read_csv("ioi.csv", comment="#")
    graph = networkx.from_pandas_edgelist(frame, edge_attr=True, edge_key="key",
                                          create_using=networkx.MultiDiGraph)

    # {"format": "relp-circuit", "version": 1, "graph": {"model": "ioi-gpt2", ...}}
    # {"id": "embed", "kind": "embed", "layer": -1, "head": -1, "score": 13.2}
    "source","target","key","score","slot","pos","structural","reader"
    "embed","L0H0","q",0.41,"q",-1,false,"L0H0.q"

The graph's and the nodes' attributes stand in comments above, as a table of edges has no place for
them. Text is in quotes, which tells it from numbers and truth values; a field that an edge lacks is
empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import networkx as nx

from circuits.files.node_link import FORMAT
from circuits.graph import EDGE, Circuit

__all__ = ["from_csv", "to_csv"]

_VERSION = 1
_ENDS = ("source", "target", "key")
_COMMENT = re.compile(r"# ([^\n]*)\n")
_FIELD = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n]*))(,|\r?\n|\Z)')


def to_csv(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """Comma-separated edges, below what is known of the graph and of its nodes."""
    head = {"format": FORMAT, "version": _VERSION}
    head |= {"graph": graph.graph} if title is None else {"title": title, "graph": graph.graph}
    comments = [head, *({"id": node, **data} for node, data in graph.nodes(data=True))]
    lines = [f"# {json.dumps(comment, allow_nan=False)}" for comment in comments]
    names = dict.fromkeys([*EDGE, *(name for *_, data in graph.edges(data=True) for name in data)])
    lines.append(_row([*_ENDS, *names]))
    for u, v, key, data in graph.edges(keys=True, data=True):
        lines.append(_row([u, v, key, *(data.get(name) for name in names)]))
    return "\n".join(lines) + "\n"


def from_csv(text: str) -> nx.MultiDiGraph:
    """Undoes `to_csv`."""
    comments, at = [], 0
    while comment := _COMMENT.match(text, at):
        comments.append(json.loads(comment[1]))
        at = comment.end()
    if not comments or comments[0].get("format") != FORMAT:
        raise ValueError(f'the first line must be a comment with "format": "{FORMAT}"')
    head, *nodes = comments
    if head.get("version") != _VERSION:
        raise ValueError(
            f"the version must be {_VERSION}; got {head.get('version')!r}; install the newer "
            "release that wrote it"
        )
    result = Circuit()
    result.graph.update(head["graph"])
    result.add_nodes_from((node.pop("id"), node) for node in nodes)
    rows = _rows(text, at)
    names = next(rows, [])[len(_ENDS) :]
    if not names:
        raise ValueError("there is no row with the names of columns")
    for u, v, key, *values in rows:
        data = zip(names, values, strict=True)
        result.add_edge(u, v, key, **{name: value for name, value in data if value is not None})
    return result


def _row(values: Iterable[object]) -> str:
    return ",".join(_field(value) for value in values)


def _field(value: object) -> str:
    if isinstance(value, str):
        return '"' + value.replace('"', '""') + '"'
    return "" if value is None else json.dumps(value, allow_nan=False)


def _rows(text: str, at: int) -> Iterator[list[Any]]:
    """The fields of each row; Python's own reader does not tell "5" from 5."""
    row: list[Any] = []
    while at < len(text):
        found = _FIELD.match(text, at)
        if found is None:
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"line {line} is no row of text in quotes, numbers and truth values")
        quoted, bare, end = found.groups()
        row.append(json.loads(bare) if bare else quoted and quoted.replace('""', '"'))
        at = found.end()
        if end != ",":
            yield row
            row = []
    if row:
        raise ValueError("the last row ends in a comma")
