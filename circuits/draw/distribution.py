"""How edge scores are spread: which few carry most, by rank, on logarithmic axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from circuits.draw.heatmaps import called, matrices, missing, pairs_of, sources, unit
from circuits.draw.paint import DARK, MUTED, NEGATIVE, POSITIVE, plain
from circuits.draw.template import BENEATH, CATEGORIES, framed
from relp import EdgeScores

__all__ = ["distribution"]

_POINTS = 400
"""Of a curve: ranks that are evenly spread on a logarithmic axis."""
_DEEP = 1e-6
"""Of the largest |score|: what is smaller is below the axis, and a line of text."""


def distribution(many: Sequence[EdgeScores]) -> go.Figure:
    """|score| by rank: all edges, and positive and negative ones by ranks of their own.

    Dotted lines stand at 20, 200, … edges, up to a fifth of all, and say which share of the sum of
    all |score| the edges up to there have. Several sets of scores have a curve each, of all edges.
    Edges that were not measured are counted, and are in no curve and no sum.
    """
    z, _ = matrices(many)
    figure, peak, total = go.Figure(), 0.0, 1
    for number, (scores, table) in enumerate(zip(many, z, strict=True)):
        values = table[np.isfinite(table)]
        sizes = -np.sort(-abs(values))
        peak, total = max(peak, float(sizes.max(initial=0))), max(total, len(sizes))
        counts = _counts(sizes, missing(scores))
        name, hue = f"{called(scores)}, {counts}", CATEGORIES[number % len(CATEGORIES)]
        if len(many) == 1:
            name, hue = f"all, {np.count_nonzero(sizes):,}", DARK
            for sign, part, colour in (
                ("positive", values[values > 0], POSITIVE),
                ("negative", -values[values < 0], NEGATIVE),
            ):
                label = f"{sign}, {len(part):,}"
                figure.add_trace(_curve(-np.sort(-part), label, colour, 1.5))
        figure.add_trace(_curve(sizes, name, hue, 2.5))
        if number == 0:
            _marks(figure, sizes)
    peak = peak or 1.0
    figure.update_xaxes(
        type="log", title_text="rank of the edge", range=[-0.05, np.log10(total) + 0.05], dtick=1,
        tickformat="~s",
    )  # fmt: skip
    figure.update_yaxes(
        type="log", title_text=plain(f"|{unit(*many)}|"), dtick=1, exponentformat="power",
        range=[np.log10(peak * _DEEP), np.log10(peak) + 0.2],
    )  # fmt: skip
    edges = f"; {counts}" if len(many) == 1 else ""
    of = f" of {called(many[0])}" if len(many) > 1 else ""
    shares = f"; %: of the sum of all |score|{of}" if figure.layout.annotations else ""
    framed(
        figure,
        sources(many),
        f"edges by |score|, mean over {pairs_of(many)}{edges}{shares}",
        plot=330,
        above=22,
        below=56 + 19 * (3 if len(many) == 1 else len(many)),
    )  # fmt: skip
    return figure.update_layout(legend=BENEATH)


def _counts(sizes: Float[np.ndarray, " edge"], unknown: int) -> str:
    """`200 edges, 3 of them 0, 3,428 others not measured`."""
    zero = len(sizes) - int(np.count_nonzero(sizes))
    return (
        f"{len(sizes):,} edges"
        + (f", {zero:,} of them 0" if zero else "")
        + (f", {unknown:,} others not measured" if unknown else "")
    )


def _curve(sizes: Float[np.ndarray, " edge"], name: str, hue: str, width: float) -> go.Scatter:
    """Sizes in falling order by rank; 0 has no place on a logarithmic axis."""
    sizes = sizes[sizes > 0]
    ends = np.log10(max(len(sizes), 1))
    ranks = np.unique(np.logspace(0, ends, _POINTS).round().astype(int))[: len(sizes)]
    return go.Scatter(
        x=ranks, y=sizes[ranks - 1], mode="lines+markers" if len(sizes) < 30 else "lines",
        name=plain(name), line={"color": hue, "width": width}, marker={"size": 4},
        hovertemplate=f"{plain(name)}<br>rank %{{x}}: %{{y:.3g}}<extra></extra>",
    )  # fmt: skip


def _marks(figure: go.Figure, sizes: Float[np.ndarray, " edge"]) -> None:
    """Where circuits of the usual sizes end."""
    whole = sizes.sum() or 1.0
    for n in (2 * 10**k for k in range(1, 9)):
        if n > len(sizes) / 5:
            break
        figure.add_vline(x=n, line={"color": MUTED, "width": 1, "dash": "dot"})
        figure.add_annotation(
            x=np.log10(n), y=1, yref="paper", yanchor="bottom", showarrow=False,
            text=f"{n:,}: {sizes[:n].sum() / whole:.0%}", font={"size": 10, "color": MUTED},
        )  # fmt: skip
