"""The explorer: a circuit as a page to look around in, alone as a file or inside a notebook.

    explore(circuit)              # at the end of a notebook's cell
    save(circuit, "ioi.html")     # the same page as a file, with the circuit inside

`view.py` is what it draws, `page.py` puts it together; the rest is the page itself: `page.html`,
`page.css`, and the scripts `circuit.js` (which edges are shown, which lie on paths), `scene.js`
(what is painted) and `controls.js` (what answers mouse and keys). `d3.js` is d3-zoom and
d3-selection of `package-lock.json`, as `npm ci && npm run build` makes it; their licences are in
`d3.licences.txt`.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html import escape

import networkx as nx

from circuits.draw import paint
from circuits.draw.lanes import MOST, strongest
from circuits.draw.svg import picture
from circuits.explorer.page import page_of
from circuits.explorer.view import OPEN
from circuits.graph import size
from relp import check_texts

__all__ = ["Explorer", "explore", "inline"]

_INLINE = OPEN
"""Edges that a notebook shows unasked: of whole models it shows the strongest, and says so."""


@dataclass(frozen=True)
class Explorer:
    """A circuit's page, which a notebook shows where it stands at the end of a cell."""

    page: str = field(repr=False)
    """The page, as `save(circuit, "x.html")` writes it but for the circuit's own data."""
    picture: str = field(repr=False)
    """What is shown where no script may run: an SVG picture."""
    title: str
    height: int = 640
    """Pixels, in a notebook."""

    def _repr_html_(self) -> str:
        """The page in a frame that cannot reach the notebook, over the picture.

        A notebook that is not trusted, and GitHub, remove the frame: then the picture is seen.
        """
        source = base64.b64encode(self.picture.encode()).decode()
        title, fill = escape(self.title), "position:absolute;top:0;left:0;width:100%;height:100%"
        return (
            f'<div style="position:relative;height:{self.height}px;overflow:hidden">'
            f'<img alt="{title}" style="max-width:100%;max-height:{self.height - 30}px" '
            f'src="data:image/svg+xml;base64,{source}">'
            "<p>A picture: in a trusted notebook this is a page to look around in.</p>"
            f'<iframe title="{title}" style="{fill};border:0;display:block" '
            'sandbox="allow-scripts allow-downloads" '
            f'srcdoc="{escape(self.page, quote=True)}"></iframe></div>'
        )


def explore(circuit: nx.MultiDiGraph, *, title: str | None = None, height: int = 640) -> Explorer:
    """A circuit to look around in: a page that a notebook shows, and that needs no network.

    >>> explore(circuit)
    Explorer(title='ioi · ioi-gpt2', height=640)

    Drag and scroll to move, take edges away by |score| with the slider, click a node for its edges
    and its paths from the inputs to the logits, `/` to search, `?` for all keys. In a notebook it
    scrolls and zooms after a click, or with Ctrl, so that the notebook itself can be scrolled.
    Circuits of more than 3,000 edges show the strongest on paths, and say so; fewer, if those by
    position would need more than 3,000 dashed lines.

    Args:
        circuit: a circuit.
        title: plain text in place of the task and the model.
        height: pixels, in a notebook.

    Raises:
        TypeError: `circuit` is no circuit.
        ValueError: it is empty, `title` holds half a surrogate pair, or `height` is below 200.
    """
    if height < 200:
        raise ValueError(f"`height` must be 200 pixels or more; got {height}; leave it out for 640")
    check_texts("the title", title)
    return _explorer(circuit, title, height, MOST)


def inline(circuit: nx.MultiDiGraph) -> str:
    """What a notebook shows of a circuit at the end of a cell: at most its 300 strongest edges."""
    return _explorer(circuit, None, 640, _INLINE)._repr_html_()


def _explorer(circuit: nx.MultiDiGraph, title: str | None, height: int, most: int) -> Explorer:
    shown = strongest(circuit, most)
    page = page_of(shown, title, total=size(circuit))
    said, _ = paint.titles(circuit, title)
    return Explorer(page, picture(strongest(shown, OPEN), title), said, height)
