"""Scores as heatmaps: components by position, span or head, and writers by readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from circuits.draw.paint import plain
from relp import Component, EdgeScores, NodeScores, Scores

__all__ = ["edge_heatmap", "lined_up", "node_heatmap", "unit"]

_MOST_ROWS = 100
"""Neurons that are a row each; more are a row for each layer."""


def unit(scores: Scores) -> str:
    """What the numbers are, and of which metric."""
    return f"{scores.noun} ({scores.metric})"


def lined_up(scores: NodeScores) -> NodeScores:
    """By span if pairs have a span at different positions: a mean by position would smear it."""
    apart = any(len(at.unique()) > 1 for at in scores.spans.values())
    return scores.by_span() if apart else scores


class _Table(NamedTuple):
    """What a heatmap of nodes shows, and what it is called."""

    z: np.ndarray
    notes: np.ndarray
    rows: list[str]
    across: str
    ticks: dict[str, Any]


def node_heatmap(scores: NodeScores, kind: str | None) -> go.Figure:
    """Components of one kind, mean over pairs: layer by head, or component by position or span."""
    kinds = scores.kinds()
    kind = kind or ("resid" if "resid" in kinds else kinds[0])
    names, _ = scores.of_kind(kind)
    by_head = kind in ("head", "kv") or (kind == "neuron" and len(names) > _MOST_ROWS)
    table = _by_head(scores, kind) if by_head else _by_place(scores, kind)
    figure = go.Figure(
        _heatmap(
            table.z,
            unit(scores),
            customdata=table.notes,
            hovertemplate="%{customdata}: %{z:.4g}<extra></extra>",
            xgap=1 if table.z.shape[1] <= 64 else 0,
            ygap=1 if table.z.shape[0] <= 64 else 0,
        )
    )
    sums = {kind: ", summed over positions", "span": "; other: the sum over all other positions"}
    figure.update_layout(
        title_text=f"{plain(scores.title)}<br><sup>{kind}, mean over {len(scores.clean)} pairs"
        f"{sums.get(table.across, '')}</sup>",
        template="plotly_white",
        height=max(340, 200 + 26 * len(table.rows)),
    )
    figure.update_xaxes(title_text=table.across, showgrid=False, zeroline=False, **table.ticks)
    figure.update_yaxes(
        title_text="layer" if Component.parse(names[0]).layer >= 0 else None,
        tickvals=list(range(len(table.rows))),
        ticktext=table.rows,
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    return figure


def _by_head(scores: NodeScores, kind: str) -> _Table:
    """Layer by number of the head or neuron, summed over positions."""
    names, nodes = scores.of_kind(kind)
    parsed = [Component.parse(name) for name in names]
    layers = sorted({c.layer for c in parsed})
    z = np.full((len(layers), max(c.head for c in parsed) + 1), np.nan)
    notes = np.full(z.shape, "", dtype=object)
    # pair by pair: means by position of prompts of several lengths are over different pairs
    for c, total in zip(parsed, nodes.sum(-1).mean(0).tolist(), strict=True):
        z[layers.index(c.layer), c.head] = total
        notes[layers.index(c.layer), c.head] = c.name
    ticks = {"dtick": 1 if z.shape[1] <= 32 else None}
    return _Table(z, notes, [f"L{layer}" for layer in layers], kind, ticks)


def _by_place(scores: NodeScores, kind: str) -> _Table:
    """Component by position, or by span."""
    names, nodes = scores.of_kind(kind)
    z = replace(scores, components=names, nodes=nodes, strata=None).mean.double().numpy()
    parsed = [Component.parse(name) for name in names]
    named = kind == "neuron" or parsed[0].layer < 0
    together = scores.tokens if scores.is_together else ()
    places: Sequence[object] = scores.places or together or range(z.shape[1])
    notes = [[f"{name}@{plain(str(place))}" for place in places] for name in names]
    return _Table(
        z,
        np.array(notes, dtype=object),
        [c.name if named else f"L{c.layer}" for c in parsed],
        "span" if scores.places else "position",
        _token_ticks(scores, z.shape[1]),
    )


def _token_ticks(scores: NodeScores, width: int) -> dict[str, Any]:
    """What stands at each position, where that is the same for every pair."""
    if scores.places or scores.is_together:
        return {"tickvals": list(range(width)), "ticktext": [plain(t) for t in scores.tokens]}
    if len(scores.tokens) != width or len(set(scores.lengths.tolist())) != 1:
        return {"dtick": 1 if width <= 40 else None}
    shown = [plain(token.replace("\n", "↵").replace("\t", "⇥")) for token in scores.tokens]
    return {
        "tickvals": list(range(width)),
        "ticktext": [f"{token} · {p}" if token else str(p) for p, token in enumerate(shown)],
        "tickangle": -60,
    }


def edge_heatmap(scores: EdgeScores) -> go.Figure:
    """Writer by reader, summed over positions; blank where there can be no edge."""
    table = scores.by_position.detach().double().cpu().sum(0).numpy()
    figure = go.Figure(
        _heatmap(
            np.where(scores.layout.exists.numpy(), table, np.nan),
            unit(scores),
            x=[plain(reader) for reader in scores.readers],
            y=[plain(writer) for writer in scores.writers],
            hovertemplate="%{y} → %{x}: %{z:.4g}<extra></extra>",
        )
    )
    figure.update_layout(
        title_text=f"{plain(scores.title)}<br><sup>mean over {len(scores.clean)} pairs</sup>",
        template="plotly_white",
        height=max(420, min(900, 200 + 14 * len(table))),
        plot_bgcolor="#eaeef2",
    )
    figure.update_xaxes(title_text="reader", showgrid=False)
    figure.update_yaxes(title_text="writer", showgrid=False, autorange="reversed")
    return figure


def _heatmap(z: np.ndarray, name: str, **trace: Any) -> go.Heatmap:
    """Red to blue, with 0 white and both ends equally far from it."""
    finite = np.abs(z[np.isfinite(z)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return go.Heatmap(
        z=z,
        colorscale="RdBu",
        zmin=-limit,
        zmid=0,
        zmax=limit,
        colorbar={"title": {"text": plain(name), "side": "right"}, "thickness": 14},
        **trace,
    )
