"""Scores as heatmaps: components by position, span or head, and writers by readers.

Several results are panels beside each other, or below each other where they are wide, all on one
scale, which is symmetric about 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import plotly.graph_objects as go

from circuits.draw.paint import plain
from circuits.draw.template import DIVERGING, SEQUENTIAL, framed, packed, panels
from relp import Component, EdgeScores, NodeScores, Scores

__all__ = [
    "at_places",
    "called",
    "edge_heatmap",
    "labels",
    "layer_heatmap",
    "lined_up",
    "matrices",
    "missing",
    "node_heatmap",
    "pairs_of",
    "same",
    "sources",
    "unit",
]

S = TypeVar("S", bound=Scores)

_MOST_NEURONS = 100
"""Neurons that are a row each; more are a row for each layer."""
_BESIDE = 36
"""Cells in a row of all panels that are side by side."""
_WRITERS, _READERS, _ENOUGH = 40, 40, 0.9
"""Rows and columns at most of a heatmap of edges, and the share of all |score| that needs no more.
"""
_LOOKED_AT = 2000
"""Edges, from the strongest on: after so many, all rows and columns are taken."""
_LETTERS = 20
"""Of a label on an axis; the note of a cell has all."""
_LEVEL = 46
"""Letters of all names below a row of panels that can stand level; more are turned."""
_GAPS = 64
"""Cells in a row up to which there are lines between them."""
_NO_EDGE = "#e3e8ed"


# -- what is said of numbers -----------------------------------------------------------------------


def unit(*scores: Scores) -> str:
    """What the numbers are, and of which metric."""
    return f"{', '.join(dict.fromkeys(s.noun for s in scores))} ({scores[0].metric})"


def called(scores: Scores) -> str:
    """What tells a result from others of the same model and task."""
    return f"{scores.rules} {scores.noun}" if scores.noun != "score" else scores.rules


def sources(many: Sequence[Scores]) -> str:
    """Where all of these come from, in one line, as `Scores.title` says it of one."""
    first, names = many[0], dict.fromkeys(called(s) if many[1:] else s.rules for s in many)
    return replace(first.provenance, rules=", ".join(names)).title


def pairs_of(many: Sequence[Scores]) -> str:
    """How many pairs each is a mean over: `6 pairs`, and `6 and 3 pairs` where that differs."""
    each = [f"{len(s.clean):,}" for s in many]
    *others, last = each if len(set(each)) > 1 else each[:1]
    noun = "pair" if last == "1" and not others else "pairs"
    return (f"{', '.join(others)} and " if others else "") + f"{last} {noun}"


def same(many: Sequence[Scores]) -> None:
    """What is drawn on one scale must be about one thing.

    Raises:
        ValueError: the results differ in level, model, task, direction, metric or positions.
    """
    for what in ("level", "model", "task", "direction", "metric", "place_labels"):
        for other in many[1:]:
            a, b = getattr(many[0], what), getattr(other, what)
            if a != b:
                raise ValueError(
                    f"results in one picture must be of the same {what}; got {a!r} and {b!r}; draw "
                    "each for itself"
                )


def labels(names: Sequence[str], letters: int = _LETTERS) -> list[str]:
    """Names on an axis: long tokens are cut in the middle, as their place stands at the end.

    None is cut if two would then be one: an axis shows names that are equal as one place.
    """
    cut = [n if len(n) <= letters else f"{n[: letters - 7]}…{n[-6:]}" for n in names]
    return [plain(name) for name in (cut if len(set(cut)) == len(set(names)) else names)]


def at_places(name: str, scores: Scores) -> list[str]:
    """A component at each place: `L9H6@7`, `L9H6 " Mary"@4`, `L9H6@S2`; alone if there is none."""
    if scores.places or "@" not in "".join(scores.place_labels):
        return [f"{name}@{place}" for place in scores.place_labels] or [name]
    return [f"{name}{'' if p.startswith('@') else ' '}{p}" for p in scores.place_labels]


# -- nodes -----------------------------------------------------------------------------------------


def lined_up(scores: NodeScores) -> NodeScores:
    """By span if pairs have a span at different positions: a mean by position would smear it."""
    apart = any(len(at.unique()) > 1 for at in scores.spans.values())
    return scores.by_span() if apart else scores


class _Table(NamedTuple):
    """What a panel shows, and what it is called."""

    z: np.ndarray
    notes: np.ndarray
    rows: list[str]
    columns: list[str]


def node_heatmap(many: Sequence[NodeScores], kind: str | None) -> go.Figure:
    """Components of one kind, mean over pairs: layer by head, or component by position or span.

    Raises:
        ValueError: a result has no such kind, or they are not about the same.
    """
    if any(s.is_together for s in many):
        many = [s.together() for s in many]
    same(many)
    shared = [k for k in many[0].kinds() if all(k in s.kinds() for s in many)]
    if kind not in (None, *shared) or not shared:
        raise ValueError(
            f"`kind` must be one of {tuple(shared)}, what is known of all; got {kind!r}; see "
            "Scores.kinds()"
        )
    kind = kind or ("resid" if "resid" in shared else shared[0])
    parsed = sorted(
        {Component.parse(name) for s in many for name in s.of_kind(kind)[0]}, key=lambda c: c[2:]
    )
    by_head = kind in ("head", "kv") or (kind == "neuron" and len(parsed) > _MOST_NEURONS)
    table = _by_head if by_head else _by_place
    tables = [table(s, kind, parsed) for s in many]
    across = kind if by_head else "span" if many[0].places else "position"
    ragged = any(len(set(s.lengths.tolist())) > 1 for s in many)
    sums = {
        kind: ", summed over positions",
        "span": f"; {''.join(many[0].places[-1:])}: the sum over all other positions",
        "position": ", at each position over those that are long enough" * ragged,
    }
    return _drawn(
        tables,
        many,
        across=across,
        up="layer" if parsed[0].layer >= 0 else "",
        note=f"{kind}, mean over {pairs_of(many)}{sums.get(across, '')}",
    )


def _by_head(scores: NodeScores, kind: str, parsed: Sequence[Component]) -> _Table:
    """Layer by number of the head or neuron, summed over positions."""
    layers = sorted({c.layer for c in parsed})
    z = np.full((len(layers), max(c.head for c in parsed) + 1), np.nan)
    notes = np.full(z.shape, "", dtype=object)
    names, nodes = scores.of_kind(kind)
    # pair by pair: means by position of prompts of several lengths are over different pairs
    for name, total in zip(names, nodes.sum(-1).mean(0).tolist(), strict=True):
        c = Component.parse(name)
        z[layers.index(c.layer), c.head] = total
        notes[layers.index(c.layer), c.head] = name
    return _Table(z, notes, [f"L{layer}" for layer in layers], [str(n) for n in range(z.shape[1])])


def _by_place(scores: NodeScores, kind: str, parsed: Sequence[Component]) -> _Table:
    """Component by position, or by span."""
    names, nodes = scores.of_kind(kind)
    known = replace(scores, components=names, nodes=nodes, strata=None).mean.double().numpy()
    z = np.full((len(parsed), known.shape[1]), np.nan)
    z[[[c.name for c in parsed].index(name) for name in names]] = known
    places = scores.place_labels
    notes = [[plain(name) for name in at_places(c.name, scores)] for c in parsed]
    named = kind == "neuron" or parsed[0].layer < 0
    rows = [c.name if named else f"L{c.layer}" for c in parsed]
    return _Table(z, np.array(notes, dtype=object), rows, labels(places))


# -- edges -----------------------------------------------------------------------------------------


def matrices(many: Sequence[EdgeScores]) -> tuple[np.ndarray, list[str]]:
    """`[result, writer, reader]`, NaN where there can be no edge, and names of the readers.

    Where edges are kept by place, a reader at each of them is a column of its own.

    Raises:
        ValueError: the results are not about the same.
    """
    same(many)
    layout = many[0].layout
    for other in many[1:]:
        if (other.writers, other.readers) != (layout.writers, layout.readers):
            raise ValueError(
                f"results in one picture must have the same writers and readers; those of "
                f"{other.rules!r} have others than those of {many[0].rules!r}; compute all with "
                "the same `neurons`"
            )
    exists = layout.exists.numpy()[..., None]
    tables = [s.by_position.detach().double().permute(1, 2, 0).cpu().numpy() for s in many]
    z = np.stack([np.where(exists, table, np.nan) for table in tables])
    return z.reshape(*z.shape[:2], -1), [
        name for r in layout.readers for name in at_places(r, many[0])
    ]


def missing(scores: EdgeScores) -> int:
    """How many edges were not measured, at any place."""
    return int(scores.edges[..., scores.layout.exists].isnan().sum())


def edge_heatmap(many: Sequence[EdgeScores], kind: str | None) -> go.Figure:
    """Writer by reader: those of the strongest edges, and how much of all that is.

    Args:
        many: one set of edge scores, or several.
        kind: a slot (`q`, `k`, `v`, `in`): only its readers.

    Raises:
        ValueError: there is no such slot, or the results are not about the same.
    """
    z, names = matrices(many)
    slots = [slot for _, slot in many[0].layout.targets]
    if kind not in (None, *slots):
        raise ValueError(
            f"`kind` of edges must be one of {tuple(dict.fromkeys(slots))}, the slot that reads, "
            f"or 'layer' or 'distribution'; got {kind!r}; leave it out for the strongest of all"
        )
    if kind is not None:
        chosen = np.repeat([s == kind for s in slots], len(names) // len(slots))
        z, names = z[:, :, chosen], [name for name, c in zip(names, chosen, strict=True) if c]
    sizes = np.fmax(abs(z), 0)
    rows, columns = _strongest(sizes.max(0))
    shown = sizes[:, rows][:, :, columns].sum((1, 2)) / np.maximum(sizes.sum((1, 2)), 1e-300)
    writers = many[0].writers
    said = np.array([[plain(f"{writers[w]} → {names[r]}") for r in columns] for w in rows])
    up, across = labels([writers[w] for w in rows]), labels([names[r] for r in columns])
    tables = [_Table(table[np.ix_(rows, columns)], said, up, across) for table in z]
    by = "; readers at each span" if many[0].places else "; readers at each position"
    partly = any(map(missing, many))
    note = (
        f"{'edges' if kind is None else f'edges into {kind}'}, mean over {pairs_of(many)}"
        f"{by if many[0].place_labels else ''}; {len(rows)} of {len(writers):,} writers and "
        f"{len(columns)} of {len(names):,} readers, with {_shares(shown)} of all |score|"
        f"{' that was measured' if partly else ''}; grey: no edge"
        f"{', or not measured' if partly else ''}"
    )
    figure = _drawn(tables, many, across="reader", up="writer", note=note, least=13)
    return figure.update_layout(plot_bgcolor=_NO_EDGE)


def _shares(shown: np.ndarray) -> str:
    low, high = (f"{100 * end:.0f}" for end in (shown.min(), shown.max()))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _strongest(sizes: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows and columns of the strongest edges, in the order of the model."""
    if sizes.shape[0] <= _WRITERS and sizes.shape[1] <= _READERS:
        return list(range(sizes.shape[0])), list(range(sizes.shape[1]))
    rows, columns = set[int](), set[int]()
    flat, enough, shown = sizes.ravel(), _ENOUGH * sizes.sum(), 0.0
    # those that are looked at are found without sorting all
    last = min(_LOOKED_AT, flat.size)
    best = np.flatnonzero(flat >= np.partition(flat, -last)[-last])
    best = best[np.argsort(-flat[best], kind="stable")][:last]
    for row, column in zip(*np.unravel_index(best, sizes.shape), strict=True):
        fits = (row in rows or len(rows) < _WRITERS) and (
            column in columns or len(columns) < _READERS
        )
        if fits:
            rows.add(int(row))
            columns.add(int(column))
            shown += sizes[row, column]
        if shown >= enough:
            break
    return sorted(rows), sorted(columns)


def layer_heatmap(many: Sequence[EdgeScores]) -> go.Figure:
    """Layer that writes by layer that reads: the sum of |score|, as scores would cancel."""
    z, readers = matrices(many)
    layout = many[0].layout
    each = len(readers) // len(layout.readers)
    rows = [_layer(c) for c in layout.sources]
    columns = [_layer(owner) for owner, _ in layout.targets for _ in range(each)]
    up, across = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
    tables = []
    for table in abs(z):
        total, there = np.zeros((len(up), len(across))), ~np.isnan(table)
        at = np.ix_([up.index(r) for r in rows], [across.index(c) for c in columns])
        found = np.zeros_like(total)
        np.add.at(total, at, np.nan_to_num(table))
        np.add.at(found, at, there)
        total[found == 0] = np.nan
        notes = np.array([[f"{w} → {r}" for r in across] for w in up], dtype=object)
        tables.append(_Table(total, notes, up, across))
    partly = any(map(missing, many))
    figure = _drawn(
        tables, many, across="reads", up="writes", least=13,
        note=f"edges by layer, sum of |{unit(*many)}|{' of those measured' if partly else ''}, "
        f"mean over {pairs_of(many)}; grey: no edge{', or none measured' if partly else ''}",
        name=f"sum of |{many[0].noun}|",
    )  # fmt: skip
    return figure.update_layout(plot_bgcolor=_NO_EDGE)


def _layer(component: Component) -> str:
    return f"L{component.layer}" if component.layer >= 0 else component.name


# -- the picture -----------------------------------------------------------------------------------


def _drawn(
    tables: Sequence[_Table], many: Sequence[Scores], *, across: str, up: str, note: str,
    least: int = 11, name: str = "",
) -> go.Figure:  # fmt: skip
    """A panel for each table.

    Args:
        tables: what the panels show, all with the same rows and columns.
        many: what they are of.
        across: what columns are; `up`: what rows are.
        note: what is said below the title.
        least: pixels of a row.
        name: of numbers that begin at 0; those of scores do not, and are called what they are.
    """
    rows, columns, several = tables[0].rows, tables[0].columns, len(tables) > 1
    beside = max(1, min(len(tables), 3, _BESIDE // len(columns)))
    longest = max(map(len, columns))
    turned = longest > 2 and sum(len(c) + 1 for c in columns) * beside > _LEVEL
    below = 20 + (round(5.2 * longest) if turned else 14)
    # where the last row is not full, columns are named below each panel
    everywhere = len(tables) % beside > 0
    figure, plot, above = panels(
        [packed([called(s)], beside) if several else [] for s in many],
        beside,
        plot=max(116, len(rows) * min(26, max(least, 560 // len(rows)))),
        between=below if everywhere else 10,
        gap=0.04,
    )
    scale = _scale(tables, symmetric=not name)
    scale["colorbar"] = {"title": {"text": plain(name or unit(*many)), "side": "right"}}
    for i, table in enumerate(tables):
        at = {"row": i // beside + 1, "col": i % beside + 1}
        whose = plain(called(many[i])) if several else ""
        figure.add_trace(_trace(table, whose).update(showscale=i == 0, **scale), **at)
        last, first = i + beside >= len(tables), at["col"] == 1
        named = last or everywhere
        figure.update_xaxes(title_text=across if last else "", showticklabels=named, **at)
        figure.update_yaxes(title_text=up if first else "", showticklabels=first, **at)
        figure.update_xaxes(ticks="outside" if named else "", **at)
        figure.update_yaxes(ticks="outside" if first else "", **at)
    # all panels move together, and names that are numbers are names
    alike = {"type": "category", "showgrid": False, "zeroline": False}
    figure.update_xaxes(matches="x", tickangle=-90 if turned else 0, tickfont_size=10, **alike)
    figure.update_yaxes(matches="y", **alike)
    figure.update_layout(xaxis_matches=None, yaxis_matches=None)  # not the first with itself
    return framed(figure, sources(many), note, plot=plot, above=above, below=below + 22)


def _scale(tables: Sequence[_Table], *, symmetric: bool) -> dict[str, Any]:
    """From the largest size of all panels to its opposite, or from 0 to it."""
    finite = np.concatenate([abs(t.z[np.isfinite(t.z)]) for t in tables])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    if symmetric:
        return {"colorscale": DIVERGING, "zmin": -limit, "zmid": 0, "zmax": limit}
    return {"colorscale": SEQUENTIAL, "zmin": 0, "zmax": limit}


def _trace(table: _Table, whose: str) -> go.Heatmap:
    return go.Heatmap(
        z=table.z,
        x=table.columns,
        y=table.rows,
        customdata=table.notes,
        hovertemplate=f"%{{customdata}}: %{{z:.4g}}<extra>{whose}</extra>",
        xgap=1 if len(table.columns) <= _GAPS else 0,
        ygap=1 if len(table.rows) <= _GAPS else 0,
    )
