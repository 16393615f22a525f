"""One verb for every picture: heatmaps of scores, score against effect, circuits.

    draw(scores)                  # layer x position (or span), or layer x head with kind="head"
    draw(scores, effect)          # one panel per kind, with Pearson's r and the relative error
    draw(agreement(many, effect))  # r, ρ, signs and error of several sets of scores, side by side
    draw(edges)                   # writer x reader
    draw(found.table())           # of a benchmark: methods by cases
    draw(circuit)                 # layered diagram, `embed` at the bottom, `logits` on top

Blue is positive and red negative everywhere, on a scale that is symmetric about 0. Where things
go (`circuits.draw.layout`) is separate from how they are painted (`circuits.draw.paint`); files of
pictures share both.
"""

from __future__ import annotations

import networkx as nx
import pandas as pd
import plotly.graph_objects as go

from relp import EdgeScores, NodeScores, Scores

__all__ = ["draw"]


def draw(
    what: Scores | nx.MultiDiGraph | pd.DataFrame,
    against: Scores | None = None,
    *,
    kind: str | None = None,
    positions: bool = False,
    title: str | None = None,
) -> go.Figure:
    """Draws scores, scores against measured effects, agreement, a benchmark, or a circuit.

    >>> draw(scores, kind="head")
    >>> draw(scores, against=effect)
    >>> draw(agreement([scores], effect))
    >>> draw(circuit)

    Args:
        what: `Scores` or `Effects` of nodes (heatmap, mean over pairs; by position, or by span if
            the prompts have their spans at different positions) or edges (writer x reader, summed
            over positions), a table of `agreement` or of a `Bench`, or a circuit.
        against: `Effects` to compare `what` with: a scatter plot, one point per pair, component
            and position (edges: per edge), with the line y = x.
        kind: which components a heatmap of nodes shows; `resid` if there, else the first.
        positions: show nodes by position even where spans are at different ones.
        title: plain text that replaces where the numbers come from.

    Raises:
        TypeError: `what` or `against` is of another type, or they do not go together.
        ValueError: `kind` is not among the components, the circuit is empty, the table is not one
            of `agreement` or has no correlation, or the two results were not made for the same
            model, task and direction.
    """
    figure = _figure(what, against, kind, positions)
    if title is not None:
        from circuits.draw.paint import plain

        figure.update_layout(title_text=plain(title))
    return figure


def _figure(what: object, against: object, kind: str | None, positions: bool) -> go.Figure:
    """By what is given; each kind of picture is imported when one is drawn."""
    if isinstance(what, Scores) and isinstance(against, Scores):
        from circuits.draw.scatter import scatter

        return scatter(what, against, kind)
    if isinstance(what, EdgeScores) and against is None:
        from circuits.draw.heatmaps import edge_heatmap

        return edge_heatmap(what)
    if isinstance(what, NodeScores) and against is None:
        from circuits.draw.heatmaps import lined_up, node_heatmap

        return node_heatmap(what if positions else lined_up(what), kind)
    if isinstance(what, pd.DataFrame) and "case" in what and against is None:
        from circuits.draw.grid import grid

        return grid(what)
    if isinstance(what, pd.DataFrame) and against is None:
        from circuits.draw.measures import measures

        return measures(what)
    if isinstance(what, nx.MultiDiGraph) and against is None:
        from circuits.draw.diagram import diagram

        return diagram(what)
    given = type(what).__name__ + (f" and {type(against).__name__}" if against is not None else "")
    raise TypeError(
        "draw takes Scores, Effects, Scores with Effects, a table of agreement, or a circuit "
        f"(networkx.MultiDiGraph); got {given}; see help(draw)"
    )
