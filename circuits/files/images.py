"""Circuits and figures as .png, .pdf and .svg, as a browser draws them; nothing is fetched.

Kaleido turns plotly figures into images, with the Chrome or Chromium that is there. A circuit's own
picture is printed by the same browser: in a .pdf lines stay lines, and letters letters.
"""

from __future__ import annotations

import asyncio
import base64
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import networkx as nx
import plotly.graph_objects as go

from circuits.draw.svg import picture

__all__ = ["circuit_image", "figure_image"]

_SIZE = (1000, 600)
"""Pixels of a figure that has no width or height of its own."""
_SHARPNESS = 2.0
"""Pixels of a .png for each of them, where it is not too large."""
_MOST = 10_000
"""Pixels of a .png from side to side: a browser takes 11 s for these, and fails at 30,000."""
_PATIENCE = 90.0
"""Seconds that a browser is waited for."""
_INCH = 96.0
"""Pixels of an inch of paper."""


def circuit_image(graph: nx.MultiDiGraph, title: str | None, kind: str) -> bytes:
    """The picture that .svg has, as `kind`: png or pdf.

    Raises:
        TypeError, ValueError: as `picture` and `figure_image`.
        RuntimeError: as `figure_image`.
    """
    svg = picture(graph, title)
    root = ET.fromstring(svg)
    width, height = (float(root.get(side, "")) for side in ("width", "height"))
    scale = _scale(width, height, kind)
    with _browser(kind), ThreadPoolExecutor(1) as aside:  # a notebook has a loop of its own
        printed = asyncio.wait_for(_printed(svg, width, height, scale, kind), _PATIENCE)
        return aside.submit(asyncio.run, printed).result()


def _scale(width: int | float, height: int | float, kind: str) -> float:
    """Pixels for each pixel of the picture: a large .png is less sharp, and a huge one refused."""
    if kind != "png":
        return 1.0
    if max(width, height) > _MOST:
        raise ValueError(
            f"a .png must have at most {_MOST:,} pixels from side to side; this picture is "
            f"{width:,.0f} x {height:,.0f}; draw less of it, or save as .svg or .html"
        )
    return min(_SHARPNESS, _MOST / max(width, height))


async def _printed(svg: str, width: float, height: float, scale: float, kind: str) -> bytes:
    from choreographer import Browser

    async with Browser() as browser:
        tab = await browser.create_tab()

        async def ask(command: str, **options: Any) -> dict[str, Any]:
            answer = await tab.send_command(command, params=options)
            if "error" in answer:
                raise RuntimeError(answer["error"]["message"])
            return dict(answer["result"])

        frame = (await ask("Page.getFrameTree"))["frameTree"]["frame"]["id"]
        page = f'<body style="margin:0">{svg.partition("?>")[2]}'
        await ask("Page.setDocumentContent", frameId=frame, html=page)
        if kind == "pdf":
            paper = {"paperWidth": width / _INCH, "paperHeight": height / _INCH}
            margins = {f"margin{side}": 0 for side in ("Top", "Right", "Bottom", "Left")}
            options = {"printBackground": True, "pageRanges": "1", **paper, **margins}
            done = await ask("Page.printToPDF", **options)
        else:
            clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": scale}
            done = await ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(done["data"])


def figure_image(figure: go.Figure, kind: str) -> bytes:
    """A figure as `kind`: png, pdf or svg. Formulas in $ are shown as they are typed.

    Raises:
        ValueError: kaleido or a browser is not there, or a .png would be too large.
        RuntimeError: the browser did not draw it.
    """
    own = (figure.layout, figure.layout.template.layout)
    width, height = (
        next((layout[side] for layout in own if layout[side]), least)
        for side, least in zip(("width", "height"), _SIZE, strict=True)
    )
    scale = _scale(width, height, kind)
    size = {"format": kind, "width": width, "height": height, "scale": scale}
    with _browser(kind):
        import kaleido

        # MathJax would be fetched
        options = {"mathjax": False, "timeout": _PATIENCE}
        return bytes(kaleido.calc_fig_sync(figure.to_dict(), size, kopts=options))


@contextmanager
def _browser(kind: str) -> Iterator[None]:
    """Says what is missing or went wrong, in one sentence."""
    if find_spec("kaleido") is None:
        raise ValueError(
            "images must be drawn with the package kaleido; it is not installed; in a checkout of "
            'relp type pip install -c constraints.txt ".[images]", or save as .html'
        )
    from choreographer import errors  # what kaleido finds and starts browsers with

    try:
        yield
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
