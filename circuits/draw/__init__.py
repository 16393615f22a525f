"""One verb for every picture: heatmaps of scores, score against effect, curves, circuits.

| `draw(…)` of | is |
|---|---|
| `scores` | layer by position (or span); layer by head with `kind="head"` |
| `[one, two, effect]` | the same of each, side by side on one scale |
| `scores, effect` | estimates against measured effects, with r and its interval, ρ, signs, error |
| `[one, two], effect` | the same, methods side by side |
| `edges` | writer by reader, of the strongest edges; of one slot with `kind="q"` |
| `edges, kind="layer"` | layer that writes by layer that reads |
| `edges, kind="distribution"` | size by rank, and what share the strongest 20, 200, … have |
| `evaluate(model, task, edges)` | faithfulness by size, with bands, CPR and CMD; also of several |
| `agreement(many, effect)` | r, ρ, signs and error of several sets of scores, with intervals |
| `agreement_tests(…)`, `compare(…)` | differences with intervals |
| `found` or `found.table()` of a `Bench` | methods by cases |
| `circuit` | layered diagram, `embed` at the bottom, `logits` on top |

`attention(model, task, "L9H6")` shows where a head looks. Every function returns the figure and
shows nothing by itself.

Blue is positive and red negative everywhere, on a scale that is symmetric about 0; categories have
the hues of Okabe and Ito. Where things go (`circuits.draw.layout`) is separate from how they are
painted (`circuits.draw.paint`, and `circuits.draw.template` for plotly); files of pictures share
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx
import pandas as pd
import plotly.graph_objects as go

from relp import EdgeScores, NodeScores, Scores, lazy

if TYPE_CHECKING:
    from circuits.draw.attention import attention
    from circuits.judge.entries import Bench
    from circuits.judge.evaluation import Evaluation

__all__ = ["attention", "draw"]


def draw(
    what: Scores | Evaluation | Bench | pd.DataFrame | nx.MultiDiGraph | Sequence[Any],
    against: Scores | None = None,
    *,
    kind: str | None = None,
    positions: bool = False,
    title: str | None = None,
) -> go.Figure:
    """Draws scores, scores against measured effects, tables, evaluations, or a circuit.

    >>> draw(scores, kind="head")
    >>> draw([scores, effect], kind="mlp")
    >>> draw(scores, against=effect)
    >>> draw(edges, kind="distribution")
    >>> draw(agreement([scores], effect))
    >>> draw(circuit)

    Args:
        what: `Scores` or `Effects` of nodes (heatmap, mean over pairs; by position, or by span if
            the prompts have their spans at different positions) or of edges (writer by reader), or
            several; what `evaluate` gives, or several; a table of `agreement`, `agreement_tests`,
            `compare` or of a `Bench`; or a circuit.
        against: `Effects` to compare `what` with: a scatter plot, one point per pair, component
            and position (edges: per edge), with the line y = x.
        kind: which components a heatmap of nodes shows; `resid` if there, else the first. Of edges:
            a slot, `layer`, or `distribution`.
        positions: show nodes by position even where spans are at different ones.
        title: plain text that replaces where the numbers come from.

    Raises:
        TypeError: `what` or `against` is of another type, or they do not go together.
        ValueError: `kind` is not among the components, the circuit is empty, the table is not one
            of those or has nothing to draw, or results were not made for the same model, task and
            direction.
    """
    figure = _figure(what, against, kind, positions)
    if title is not None:
        from circuits.draw.template import retitled

        retitled(figure, title)
    return figure


def _figure(what: Any, against: Any, kind: str | None, positions: bool) -> go.Figure:
    """By what is given; each kind of picture is imported when one is drawn."""
    many: list[Any] = list(what) if isinstance(what, list | tuple) else [what]
    if many and all(isinstance(one, Scores) for one in many):
        if isinstance(against, Scores):
            from circuits.draw.scatter import scatter

            return scatter(many, against, kind)
        if against is None and all(isinstance(one, NodeScores) for one in many):
            from circuits.draw.heatmaps import lined_up, node_heatmap

            return node_heatmap([s if positions else lined_up(s) for s in many], kind)
        if against is None and all(isinstance(one, EdgeScores) for one in many):
            return _edges(many, kind)
    if against is None and len(many) == 1 and isinstance(what, pd.DataFrame):
        return _table(what)
    if against is None and len(many) == 1 and isinstance(many[0], nx.MultiDiGraph):
        from circuits.draw.diagram import diagram

        return diagram(many[0])
    if against is None and (figure := _judged(many)) is not None:
        return figure
    given = _named(what) + (f" and {type(against).__name__}" if against is not None else "")
    raise TypeError(
        "draw takes Scores, Effects, Scores with Effects, a list of them, what evaluate gave, a "
        "table of agreement, agreement_tests, compare or a Bench, or a circuit "
        f"(networkx.MultiDiGraph); got {given}; see help(draw)"
    )


def _named(what: object) -> str:
    if isinstance(what, list | tuple):
        return f"a {type(what).__name__} of {', '.join(dict.fromkeys(map(_named, what))) or 'none'}"
    level = f" of {what.level}s" if isinstance(what, Scores) else ""
    return f"{type(what).__name__}{level}"


def _edges(many: list[Any], kind: str | None) -> go.Figure:
    if kind == "distribution":
        from circuits.draw.distribution import distribution

        return distribution(many)
    from circuits.draw.heatmaps import edge_heatmap, layer_heatmap

    return layer_heatmap(many) if kind == "layer" else edge_heatmap(many, kind)


def _table(table: pd.DataFrame) -> go.Figure:
    """Which table it is, its columns say."""
    if "case" in table:
        from circuits.draw.grid import grid

        return grid(table)
    from circuits.draw.measures import differences, measures

    return differences(table) if "difference" in table else measures(table)


def _judged(many: list[Any]) -> go.Figure | None:
    """Evaluations, or a benchmark; None if it is neither."""
    from circuits.judge.entries import Bench
    from circuits.judge.evaluation import Evaluation

    if many and all(isinstance(one, Evaluation) for one in many):
        from circuits.draw.curves import curves

        return curves(many)
    if len(many) == 1 and isinstance(many[0], Bench):
        return _table(many[0].table())
    return None


lazy.lazily(__name__, {"attention": "attention"})
