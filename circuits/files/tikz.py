"""Circuits as .tex: a picture in TikZ, for papers; it needs nothing but pgf, and is only written.

The document compiles by itself with pdflatex (and lualatex), on a page of the picture's size;
its `tikzpicture` can be put into another one, with the colours that are defined before it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

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

__all__ = ["to_tikz"]

_POINTS = 0.72
"""Of TeX, per pixel of the other pictures."""
_HUES = {paint.POSITIVE: "positive", paint.NEGATIVE: "negative", paint.NEUTRAL: "neutral"}
_COLOURS = {name: hue for hue, name in _HUES.items()} | {
    "dark": paint.DARK,
    "muted": paint.MUTED,
    "band": paint.BAND,
}
_PAGE = r"""\documentclass{article}
\usepackage{tikz}
\ifdefined\pdfpagewidth\else\let\pdfpagewidth\pagewidth\let\pdfpageheight\pageheight\fi
\paperwidth=%(width).1fpt \paperheight=%(height).1fpt
\pdfpagewidth=\paperwidth \pdfpageheight=\paperheight
\hoffset=-1in \voffset=-1in \oddsidemargin=0pt \topmargin=0pt \headheight=0pt \headsep=0pt
\textwidth=%(width).1fpt \textheight=%(height).1fpt \parindent=0pt \topskip=0pt \maxdepth=0pt
\pagestyle{empty}
%(colours)s
\begin{document}
\vbox to 0pt{%%
\begin{tikzpicture}[x=1pt, y=1pt, font=\sffamily, text=dark,
  edge/.style={line cap=round},
  box/.style={draw=muted, line width=0.7pt, inner sep=0pt, outer sep=0pt,
    minimum width=%(w).1fpt, minimum height=%(h).1fpt},
  name/.style={anchor=base, inner sep=0pt, font=\sffamily\fontsize{8}{9}\selectfont},
  long/.style={name, font=\sffamily\fontsize{6}{7}\selectfont},
  slot/.style={anchor=base, inner sep=0pt, font=\sffamily\fontsize{5}{6}\selectfont},
  note/.style={anchor=base west, inner sep=0pt, text=muted,
    font=\sffamily\fontsize{8}{9}\selectfont},
  title/.style={anchor=base west, inner sep=0pt,
    font=\sffamily\bfseries\fontsize{12}{14}\selectfont},
  long title/.style={title, font=\sffamily\bfseries\fontsize{9}{10}\selectfont}]
\useasboundingbox (0,0) rectangle (%(width).1f,%(height).1f);
%(body)s
\end{tikzpicture}\vss}
\end{document}
"""


def to_tikz(graph: nx.MultiDiGraph, title: str | None = None) -> str:
    """The picture of `circuits.draw.svg` as a LaTeX document.

    >>> from circuits.files.tikz import to_tikz
    >>> "tikzpicture" in to_tikz(circuit)
    True

    Text is escaped. Letters beyond those that every LaTeX font has are written as their number,
    `[U+6F22]`, so that nothing is lost and nothing breaks.

    Raises:
        TypeError, ValueError: `graph` is no circuit, or empty.
    """
    whole, graph = graph, drawn(graph)
    positions = layout(graph)
    curves = routes(graph, positions)
    paper = _Paper(graph, positions, curves)
    return _PAGE % {
        "width": paper.width,
        "height": paper.height,
        "w": paper.box[0],
        "h": paper.box[1],
        "colours": "\n".join(
            rf"\definecolor{{{name}}}{{HTML}}{{{hue[1:].upper()}}}"
            for name, hue in _COLOURS.items()
        ),
        "body": "\n".join(
            [
                *_backdrop(graph, positions, paper),
                *_edges(graph, curves, paper),
                *_nodes(graph, positions, paper),
                *_heading(title, whole, graph, paper),
                *_legend(graph),
            ]
        ),
    }


class _Paper:
    """How large the page is, and where the units of `layout` are on it, in points."""

    left, foot, head = 66.0, 56.0, 56.0

    def __init__(
        self,
        graph: nx.MultiDiGraph,
        positions: dict[str, Point],
        curves: dict[tuple[str, str, str], Curve],
    ) -> None:
        across, up = paint.pixels(graph)
        self.unit = across * _POINTS, up * _POINTS
        self.box = BOX[0] * self.unit[0], BOX[1] * self.unit[1]
        self.lanes = lanes(graph, positions)
        self.corner, (right, top) = frame(positions, curves)
        self.foot += 22 * bool(self.lanes)  # the names of the lanes
        plot = (right - self.corner[0]) * self.unit[0]
        self.shift = max(0.0, 420.0 - plot) / 2
        self.width = self.left + plot + 2 * self.shift + 20
        self.height = self.foot + (top - self.corner[1]) * self.unit[1] + self.head

    def at(self, point: Point) -> Point:
        """A point of `layout` on the page."""
        x = self.left + self.shift + (point[0] - self.corner[0]) * self.unit[0]
        return x, self.foot + (point[1] - self.corner[1]) * self.unit[1]


def _backdrop(graph: nx.MultiDiGraph, positions: dict[str, Point], paper: _Paper) -> Iterator[str]:
    """Bands of layers with their numbers, and lanes with what they stand for."""
    for layer, (low, high) in bands(graph, positions).items():
        bottom, top = paper.at((0.0, low))[1], paper.at((0.0, high))[1]
        yield (
            rf"\fill[band, rounded corners=5pt] {_at(16.0, bottom)} rectangle "
            + _at(paper.width - 16.0, top)
            + ";"
        )
        yield rf"\node[note] at {_at(22.0, (bottom + top) / 2 - 3)} {{layer {layer}}};"
    for place, sides in paper.lanes.items():
        left, right = (paper.at((x, 0.0))[0] for x in sides)
        base = paper.foot - 20
        yield (
            rf"\fill[muted, opacity={paint.LANE}, rounded corners=5pt] {_at(left + 2.0, base)} "
            rf"rectangle {_at(right - 2.0, paper.height - paper.head)};"
        )
        name = _latex(_fit(place, right - left))
        yield rf"\node[name] at {_at((left + right) / 2, base + 7)} {{{name}}};"


def _edges(
    graph: nx.MultiDiGraph, curves: dict[tuple[str, str, str], Curve], paper: _Paper
) -> Iterator[str]:
    """The strongest last, so on top."""
    strongest = paint.edge_limit(graph)
    ranked = sorted(graph.edges(keys=True, data=True), key=lambda edge: abs(edge[3]["score"]))
    for u, v, key, data in ranked:
        a, b, c, d = (_at(*paper.at(point)) for point in curves[u, v, key])
        structural = data["structural"]
        opacity = paint.edge_opacity(
            paint.edge_share(data, strongest), structural=structural, edges=len(curves)
        )
        width = paint.edge_width(data, strongest) * _POINTS
        dash = ", dash pattern=on 1.5pt off 2pt" if structural else ""
        yield (
            rf"\draw[edge, {_HUES[paint.edge_hue(data)]}, line width={width:.2f}pt, "
            rf"opacity={opacity:.2f}{dash}] {a} .. controls {b} and {c} .. {d};"
        )


def _nodes(graph: nx.MultiDiGraph, positions: dict[str, Point], paper: _Paper) -> Iterator[str]:
    """Boxes: heads have rounded corners and their slots, MLPs and ends are pills."""
    limit, (w, h) = paint.node_limit(graph), paper.box
    for node, point in positions.items():
        data, (x, y) = graph.nodes[node], paper.at(point)
        slots, label = paint.node_slots(graph, node), paint.node_label(graph, node)
        head = data["kind"] in ("head", "kv")
        style = f"rounded corners={4.3 if head else h / 2 - 0.1:.1f}pt"
        style += ", dash pattern=on 2pt off 1.5pt" if data["kind"] == "kv" else ""
        fill = ",".join(
            str(int(paint.tint(data["score"], limit)[i : i + 2], 16)) for i in (1, 3, 5)
        )
        red, green, blue = fill.split(",")
        yield (
            rf"\node[box, {style}, fill={{rgb,255:red,{red};green,{green};blue,{blue}}}] "
            rf"at {_at(x, y)} {{}};"
        )
        ink = ", text=white" if paint.ink(data["score"], limit) != paint.DARK else ""
        kind = "name" if len(label) <= 9 else "long"
        label = _fit(label, w * 4.4 / 3.4)
        yield rf"\node[{kind}{ink}] at {_at(x, y - (0.5 if slots else 2.8))} {{{_latex(label)}}};"
        for slot in slots:
            yield rf"\node[slot{ink}] at {_at(x + PORTS[slot] * w, y - h / 2 + 2.6)} {{{slot}}};"


def _heading(
    title: str | None, whole: nx.MultiDiGraph, graph: nx.MultiDiGraph, paper: _Paper
) -> Iterator[str]:
    room, (first, second) = paper.width - 32, paint.titles(whole, title, graph)
    kind = "title" if len(first) * 6.6 < room else "long title"
    first = _fit(first, room * 4.4 / (6.6 if kind == "title" else 5.0))
    yield rf"\node[{kind}] at {_at(16.0, paper.height - 26.0)} {{{_latex(first)}}};"
    yield rf"\node[note] at {_at(16.0, paper.height - 40.0)} {{{_latex(_fit(second, room))}}};"


def _legend(graph: nx.MultiDiGraph) -> Iterator[str]:
    """Signs, widths and what the numbers are."""
    limit, x = paint.node_limit(graph), 16.0
    for hue, width, word in paint.samples(paint.edge_limit(graph)):
        yield (
            rf"\draw[{_HUES[hue]}, line width={width * _POINTS:.2f}pt] "
            rf"{_at(x, 30.0)} -- {_at(x + 18.0, 30.0)};"
        )
        yield rf"\node[note] at {_at(x + 23.0, 27.0)} {{{_latex(word)}}};"
        x += 36 + 5 * len(word)
    low, high = f"-{limit:.2g}", f"+{limit:.2g}"
    yield rf"\node[note] at {_at(x, 27.0)} {{{_latex(low)}}};"
    x += 5 * len(low) + 4
    yield (
        rf"\shade[left color=negative!85, right color=white] {_at(x, 26.0)} rectangle "
        rf"{_at(x + 35.0, 34.0)};"
    )
    yield (
        rf"\shade[left color=white, right color=positive!85] {_at(x + 35.0, 26.0)} rectangle "
        rf"{_at(x + 70.0, 34.0)};"
    )
    yield rf"\node[note] at {_at(x + 74.0, 27.0)} {{{_latex(high)}}};"
    yield rf"\node[note] at {_at(16.0, 12.0)} {{{_latex(paint.legend(graph))}}};"


# -- texts -----------------------------------------------------------------------------------------


def _at(x: float, y: float) -> str:
    return f"({x:.1f},{y:.1f})"


def _fit(text: str, room: float) -> str:
    """Cuts what would run out of its room; a letter is about 4.4 points wide."""
    letters = max(4, int(room / 4.4))
    return text if len(text) <= letters else text[: letters - 1] + "…"


_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", " ": r"\ ",
    '"': r"{\ttfamily\char34}", "`": r"{\ttfamily\char96}", "'": "'{}", "-": "-{}",
    "·": r"\textperiodcentered{}", "…": r"\ldots{}", "→": r"$\rightarrow$", "−": "$-$",
    "ß": r"\ss{}", "Æ": r"\AE{}", "æ": r"\ae{}", "Ø": r"\O{}", "ø": r"\o{}", "Œ": r"\OE{}",
    "œ": r"\oe{}", "ı": r"{\i}", "Ł": r"\L{}", "ł": r"\l{}",
} | {letter: "\\" + letter for letter in "{}#$%&_"}  # fmt: skip
_ACCENTS = dict(zip("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327",
                    "`'^~=u.\"rHvc", strict=True))  # fmt: skip


def _latex(text: str) -> str:
    """`text` so that LaTeX shows it as it is, in any encoding of fonts."""
    return re.sub(r"(?s).", lambda letter: _letter(letter[0]), unicodedata.normalize("NFC", text))


def _letter(letter: str) -> str:
    if letter in _SPECIAL:
        return _SPECIAL[letter]
    if " " < letter <= "~":
        return letter
    base, marks = (parts := unicodedata.normalize("NFD", letter))[:1], parts[1:]
    if marks in _ACCENTS and base.isascii() and base.isalpha():
        return rf"\{_ACCENTS[marks]}{{{base}}}"
    return f"[U+{ord(letter):04X}]"
