"""Circuits and figures as .png, .pdf and .svg, as a browser draws them; nothing is fetched.

Kaleido turns plotly figures into images, with the Chrome or Chromium that is there. A circuit's
picture goes the same way, as the only image of an empty figure: in a .pdf lines stay lines, and
letters letters.
"""

from __future__ import annotations

import base64
import os
import xml.etree.ElementTree as ET
from importlib.util import find_spec

import networkx as nx
import plotly.graph_objects as go

from circuits.draw.svg import picture

__all__ = ["circuit_image", "figure_image"]

_SIZE = (1000, 600)
"""Pixels of a figure that has no width or height of its own."""
_SHARPNESS = 2
"""Pixels of a .png for each of them."""


def circuit_image(graph: nx.MultiDiGraph, title: str | None, kind: str) -> bytes:
    """The picture that .svg has, as `kind`: png or pdf.

    Raises:
        TypeError, ValueError: as `picture` and `figure_image`.
        RuntimeError: as `figure_image`.
    """
    svg = picture(graph, title)
    drawn = ET.fromstring(svg)
    page = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "sizex": 1, "sizey": 1}
    source = "data:image/svg+xml;base64," + base64.b64encode(svg.encode("utf-8")).decode()
    figure = go.Figure(
        layout={
            "width": float(drawn.get("width", "")),
            "height": float(drawn.get("height", "")),
            "margin": {"l": 0, "r": 0, "t": 0, "b": 0},
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
            "images": [{"source": source, "sizing": "stretch", **page}],
        }
    )
    return figure_image(figure, kind)


def figure_image(figure: go.Figure, kind: str) -> bytes:
    """A figure as `kind`: png, pdf or svg. Formulas in $ are shown as they are typed.

    Raises:
        ValueError: kaleido or a browser is not there.
        RuntimeError: the browser did not draw it.
    """
    if find_spec("kaleido") is None:
        raise ValueError(
            "images must be drawn with the package kaleido; it is not installed; in a checkout of "
            'relp type pip install -c constraints.txt ".[images]", or save as .html'
        )
    import kaleido
    from kaleido import errors

    own = (figure.layout, figure.layout.template.layout)
    width, height = (
        next((layout[side] for layout in own if layout[side]), least)
        for side, least in zip(("width", "height"), _SIZE, strict=True)
    )
    sharpness = _SHARPNESS if kind == "png" else 1
    size = {"format": kind, "width": width, "height": height, "scale": sharpness}
    try:  # without its own choice of MathJax, which is fetched
        return bytes(kaleido.calc_fig_sync(figure.to_dict(), size, kopts={"mathjax": False}))
    except errors.ChromeNotFoundError as error:
        looked = os.environ.get("BROWSER_PATH")
        raise ValueError(
            "images must be drawn by Chrome or Chromium; none was found"
            f"{f' at BROWSER_PATH={looked!r}' if looked else ''}; install one, or set BROWSER_PATH "
            "to its program, or save as .html"
        ) from error
    except (RuntimeError, OSError, TimeoutError) as error:
        raise RuntimeError(
            f"the browser must draw the .{kind}; it did not ({type(error).__name__}); try again, "
            "set BROWSER_PATH to another Chrome or Chromium, or save as .html"
        ) from error
