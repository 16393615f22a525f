"""A circuit's file: what it can hold, written whole, and read or refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import networkx as nx

from circuits.graph import UNSTATED, check_circuit
from relp import check_texts, written_whole

__all__ = ["check_storable", "read_circuit", "write_file"]

_RESERVED = {
    "id", "key", "label", "source", "target",  # words of the file formats themselves
    "edge_default", "edge_key", "node_default",  # … and of what reads and writes them
    "node_for_adding", "self", "u_for_edge", "v_for_edge",  # arguments of networkx
}  # fmt: skip

SINCE = ("versions", "dtype", "weights", "quantization", "compatibility", "dictionaries", "by_span",
         "places", "prompt")  # fmt: skip
"""Attributes of the graph that earlier files lack."""


def check_storable(graph: nx.MultiDiGraph) -> None:
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


def write_file(path: Path, content: str | bytes) -> Path:
    """The file appears whole or not at all; text as UTF-8, the same bytes on each platform.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    with written_whole(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def read_circuit(path: Path, read: Callable[[str], nx.MultiDiGraph], said: str) -> nx.MultiDiGraph:
    """What `read` makes of a file's text, if that is a circuit.

    Raises:
        ValueError: it is not; the message is `said`, with the reason in place of `{}`.
        OSError: the file does not exist or cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` must be a circuit's file; there is no file {str(path)!r}; check the name"
        )
    try:
        graph = read(path.read_bytes().decode("utf-8"))  # carriage returns as they are
        if isinstance(graph, nx.MultiDiGraph):  # older files do not say all of it
            for name in SINCE:
                graph.graph.setdefault(name, UNSTATED[name])
        return check_circuit(graph)
    # ElementTree's ParseError is a SyntaxError
    except (ValueError, TypeError, LookupError, AttributeError, SyntaxError, nx.NetworkXException,
            RecursionError) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(path)!r} {said.format(reason)}") from error
