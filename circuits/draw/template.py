"""How every figure looks: one plotly template, headings that wrap, and panels measured in pixels.

The template belongs to each figure (`figure.layout.template`); nothing of plotly is changed for
anybody else. Figures have a height and no width: they are as wide as the page, and are made to be
read from 420 pixels on. So lines of text are broken for that width, and all that stands above and
below a plot is counted in pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from circuits.draw.paint import DARK, MUTED, plain

__all__ = [
    "BENEATH",
    "CATEGORIES",
    "DIVERGING",
    "GRID",
    "NARROW",
    "SEQUENTIAL",
    "SHAPES",
    "TEMPLATE",
    "framed",
    "packed",
    "panels",
    "retitled",
]

CATEGORIES = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442",
)  # fmt: skip
"""Okabe and Ito's, told apart with any colour vision; what is hard to see on white comes last."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "star", "x", "pentagon")
"""Of marks: they tell the same categories apart without colours."""
DIVERGING, SEQUENTIAL = "RdBu", "Blues"
"""Of scores, blue above 0 and red below; and of what begins at 0."""
BENEATH = {
    "yref": "container", "y": 0, "yanchor": "bottom", "xref": "container", "x": 0,
    "xanchor": "left", "traceorder": "normal", "tracegroupgap": 0, "orientation": "h",
    "entrywidth": 1, "entrywidthmode": "fraction",
}  # fmt: skip
"""Where a legend takes no width from the plot; `framed(below=…)` makes room for it."""
GRID = "#d0d7de"
"""Lines that help the eye, and stand back."""
NARROW = 420
"""Pixels: the narrowest page on which everything can be read."""

_TITLE, _NOTE, _PANEL = 15, 12, 12
"""Font sizes of the title, of what is said below it, and of a panel's title."""
_LETTERS = {_TITLE: 52, _NOTE: 66}
"""Of one line on a narrow page."""
_LEADING = 1.3
"""Plotly's height of a line, in font sizes. It sets a single line lower than the first of many, by
.7 of its size."""

_AXIS = {
    "automargin": True,
    "gridcolor": "#eaeef2",
    "linecolor": GRID,
    "zerolinecolor": GRID,
    "tickcolor": GRID,
    "ticks": "outside",
    "ticklen": 4,
    "tickfont": {"size": 11},
    "title": {"standoff": 8, "font": {"size": 12}},
}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Helvetica Neue, Helvetica, Arial, sans-serif", "size": 12,
                 "color": DARK},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "colorway": CATEGORIES,
        "title": {
            "x": 0, "xref": "container", "xanchor": "left", "yref": "container", "yanchor": "top",
            "pad": {"l": 12}, "font": {"size": _TITLE},
            "subtitle": {"font": {"size": _NOTE, "color": MUTED}},
        },
        "hoverlabel": {"align": "left", "font": {"size": 12}},
        "hovermode": "closest",
        "legend": {"font": {"size": 11}},
        "margin": {"l": 12, "r": 16, "b": 44},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    },
    data={
        "heatmap": [{"colorbar": {"thickness": 10, "outlinewidth": 0, "ticks": "outside",
                                  "ticklen": 3, "tickfont": {"size": 10},
                                  "title": {"side": "right", "font": {"size": 11}}}}],
    },
)  # fmt: skip
"""The house style."""


def framed(
    figure: go.Figure, title: str, note: str, *, plot: int, above: int = 6, below: int = 44
) -> go.Figure:
    """The figure in the house style, under a heading: what and whose it is, and how to read it.

    Args:
        figure: the figure, which is changed.
        title: plain text, for instance `Scores.title`.
        note: plain text.
        plot: height of what is plotted, in pixels; `above` it and `below` it are ticks and titles.
    """
    lines, notes = (_lines(text, size) for text, size in ((title, _TITLE), (note, _NOTE)))
    heading = _LEADING * (_TITLE * len(lines) + _NOTE * len(notes))
    top = round(24 + heading + (0.7 * _NOTE if len(notes) == 1 else 0)) + above
    height = top + plot + below
    return figure.update_layout(
        template=TEMPLATE,
        height=height,
        margin={"t": top, "b": below},
        title={"text": "<br>".join(lines), "y": _top(len(lines), height),
               "subtitle": {"text": "<br>".join(notes)}},
    )  # fmt: skip


def _top(lines: int, height: Any) -> float:
    """Where a title has its top, twelve pixels below that of the figure."""
    return 1 - (7.5 if lines == 1 else 18) / float(height)


def retitled(figure: go.Figure, title: str) -> go.Figure:
    """The figure with plain text in place of its title; it grows if there are more lines."""
    layout, lines = figure.layout, _lines(title, _TITLE)
    more = len(lines) - 1 - (layout.title.text or "").count("<br>")
    layout.title.text = "<br>".join(lines)
    if layout.template == TEMPLATE and layout.height:
        layout.height += round(max(0, more) * _LEADING * _TITLE)
        layout.margin.t += round(max(0, more) * _LEADING * _TITLE)
        layout.title.y = _top(len(lines), layout.height)
    return figure


def _lines(text: str, size: int) -> list[str]:
    # textwrap breaks lines at spaces of ASCII only
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    broken = textwrap.wrap(text, _LETTERS[size], break_on_hyphens=False)
    return [plain(line) for line in broken]


def packed(pieces: Sequence[str], columns: int) -> list[str]:
    """Short texts side by side, in as few lines as a panel of so many columns has room for.

    What stands on both sides of a non-breaking space stays together.
    """
    letters = {1: 52, 2: 25}.get(columns, 16)
    # a space that may break is one of ASCII
    lines = textwrap.wrap(" · ".join(pieces), letters, break_on_hyphens=False)
    return [line.strip(" ·") for line in lines]


def panels(
    titles: Sequence[Sequence[str]],
    columns: int,
    *,
    plot: int,
    between: int,
    gap: float = 0.06,
    **options: Any,
) -> tuple[go.Figure, int, int]:
    """Panels in rows, each under its title, which begins where the panel does.

    Args:
        titles: lines of plain text for each panel, the first of them in bold; or none.
        columns: how many panels are side by side.
        plot: height of a panel, in pixels.
        between: height of what stands below a panel and belongs to it, in pixels.
        gap: between columns, as a share of the width of all.
        options: of `plotly.subplots.make_subplots`.

    Returns:
        The figure; and for `framed` the height of all that is plotted, and what the titles of the
        first row need above it.
    """
    rows = -(-len(titles) // columns)
    most = max(map(len, titles))
    above = round(8 + _LEADING * _PANEL * most) if most else 0
    space = above + between
    height = rows * plot + (rows - 1) * space
    figure = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=gap if columns > 1 else 0,
        vertical_spacing=space / height if rows > 1 else 0,
        **options,
    )
    for i, lines in enumerate(titles):
        if not lines:
            continue
        at = next(figure.select_xaxes(row=i // columns + 1, col=i % columns + 1))
        up = next(figure.select_yaxes(row=i // columns + 1, col=i % columns + 1))
        first, *rest = map(plain, lines)
        figure.add_annotation(
            text="<br>".join([f"<b>{first}</b>", *rest]), showarrow=False, align="left",
            xref="paper", yref="paper", x=at.domain[0], y=up.domain[1], yshift=3,
            xanchor="left", yanchor="bottom", font={"size": _PANEL},
        )  # fmt: skip
    return figure, height, above
