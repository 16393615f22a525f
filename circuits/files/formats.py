"""Circuits in files, both ways, by suffix: nothing is pickled and no C library is needed.

    save(circuit, "ioi.svg"); circuit = load("ioi.svg")

===========  =======  ==============================================================
suffix       load     what it is
===========  =======  ==============================================================
.json        yes      networkx' node-link data, as nx.node_link_graph reads it
.graphml     yes      for yEd, Gephi, igraph, Cytoscape
.gexf        yes      for Gephi, with our hues, widths and positions
.dot         yes      for Graphviz, layers as rows; attributes are data and style
.csv         yes      a row for each edge; the nodes' attributes in comments above
.svg         yes      a picture that stands alone; the graph as JSON in its metadata
.html        yes      the explorer, works offline; the graph as JSON inside
.pdf, .png   no       the same picture, drawn by kaleido and a browser
.tex         no       the same picture in TikZ, for papers; compiles by itself
.mmd         no       Mermaid, for Markdown files, layers as frames; up to 500 edges
.mib.json    yes      EAP-IG's and MIB's graphs (`circuits.files.mib`): all edges of a
                      model
.graph.json  yes      attribution graphs (`circuits.files.attribution_graph`), as
                      circuit-tracer's and Neuronpedia's viewers open them; circuits by
                      position
===========  =======  ==============================================================

A file appears whole or not at all. Plotly figures can be saved too: as .html, .json, .svg, .pdf and
.png, the last three by kaleido.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import plotly.graph_objects as go

from circuits.choices import GRAPH, MIB
from circuits.draw.template import retitled
from circuits.files import attribution_graph, mib
from circuits.files.csv import from_csv, to_csv
from circuits.files.dot import from_dot, to_dot
from circuits.files.gexf import from_gexf, to_gexf
from circuits.files.graphml import from_graphml, to_graphml
from circuits.files.html import from_html, to_html, to_page
from circuits.files.images import circuit_image, figure_image
from circuits.files.mermaid import to_mermaid
from circuits.files.node_link import from_json, to_json
from circuits.files.svg import from_svg, to_svg
from circuits.files.texts import check_storable, read_circuit, write_file
from circuits.files.tikz import to_tikz
from circuits.graph import check_circuit
from relp import check_texts

__all__ = ["FORMATS", "Format", "load", "save"]


class Format(NamedTuple):
    """How circuits become what a file holds: `write(circuit, title)` and `read(text)`."""

    write: Callable[..., str | bytes]
    read: Callable[[str], nx.MultiDiGraph] | Callable[..., nx.MultiDiGraph] | None = None
    figure: Callable[[go.Figure, str], str | bytes] | None = None
    """The same of a figure and its title, if the format is for figures too."""
    said: str = (
        "must be a circuit written by circuits.save; it is not ({}); for scores use Scores.load, "
        "for graphs of EAP-IG and MIB from_mib"
    )
    """What is said of a file that cannot be read."""
    shape: Callable[[Any], Any] | None = None
    """What it holds of a model: `write` and `read` then take `shape`, and no other attributes than
    the format's own are written."""


def _image(kind: str) -> Format:
    return Format(
        lambda graph, title: circuit_image(graph, title, kind),
        figure=lambda figure, _: figure_image(figure, kind),
    )


FORMATS: Mapping[str, Format] = {
    ".json": Format(to_json, from_json, lambda figure, _: str(figure.to_json())),
    ".graphml": Format(to_graphml, from_graphml),
    ".gexf": Format(to_gexf, from_gexf),
    ".dot": Format(to_dot, from_dot),
    ".csv": Format(to_csv, from_csv),
    ".svg": Format(to_svg, from_svg, lambda figure, _: figure_image(figure, "svg")),
    ".html": Format(to_html, from_html, to_page),
    ".pdf": _image("pdf"),
    ".png": _image("png"),
    ".tex": Format(to_tikz),
    ".mmd": Format(to_mermaid),
    MIB: Format(mib.to_text, mib.from_text, said=mib.SAID, shape=mib.Shape.of),
    GRAPH: Format(
        attribution_graph.to_attribution_graph,
        attribution_graph.from_attribution_graph,
        said=attribution_graph.SAID,
    ),
}
"""By suffix; `circuits.choices.SUFFIXES` are the same, for who must not wait for this module."""


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
        what: a circuit; or a figure, for .html, .json, .svg, .pdf and .png.
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
            stored in the format, the circuit is empty, too large or not of the kind that can be
            drawn in it, `model` is missing or not for the format, or what draws images is not
            installed.
        RuntimeError: the browser did not draw the image.
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    if isinstance(what, go.Figure):
        drawn = {suffix: known.figure for suffix, known in FORMATS.items() if known.figure}
        suffix = _suffix(path, drawn, " of a figure")
        _told(path, suffix, model)
        return write_file(path, drawn[suffix](_titled(what, title), title or "figure"))
    suffix = _suffix(path, FORMATS)
    told = _told(path, suffix, model)
    check_texts("the title", title)
    check_circuit(what)
    if not told:
        check_storable(what)
    elif model is None:
        raise ValueError(
            f"`model` must be the TransformerBridge that the circuit is about, as {suffix} holds "
            "its shape; got None; call circuits.save(circuit, path, model=model)"
        )
    return write_file(path, FORMATS[suffix].write(what, title, **told))


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
    readers = {suffix: known.read for suffix, known in FORMATS.items() if known.read}
    suffix = _suffix(path, readers)
    read = partial(readers[suffix], **_told(path, suffix, model))
    return read_circuit(path, read, FORMATS[suffix].said)


def _suffix(path: Path, known: Collection[str], of: str = "") -> str:
    """The suffix of the format; a name that ends in .mib.json is none of .json."""
    found = [suffix for suffix in FORMATS if path.name.endswith(suffix)]
    suffix = max(found, key=len, default="")
    if suffix not in known:
        why = f"; {suffix} can only be written" if found and not of else ""
        raise ValueError(
            f"the suffix{of} must be one of {' '.join(known)}; got {path.name!r}{why}; choose "
            "another name"
        )
    return suffix


def _told(path: Path, suffix: str, model: Any) -> dict[str, Any]:
    """What `write` and `read` are told of the model, if the format holds anything of it."""
    shape = FORMATS[suffix].shape
    if shape is not None:
        return {"shape": None if model is None else shape(model)}
    if model is not None:
        raise ValueError(
            f"`model` must be left out unless the suffix is {MIB}, the only one that needs it; got "
            f"{path.name!r}; leave it out or choose another name"
        )
    return {}


def _titled(figure: go.Figure, title: str | None) -> go.Figure:
    """The figure, or a copy with this title, if its texts can be written."""
    check_texts("the title", title)
    if title is not None:
        figure = retitled(go.Figure(figure), title)
    check_texts("the figure", figure.to_plotly_json())
    return figure
