"""Where a head looks: its attention pattern on the clean and on the corrupt prompt."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch

from circuits.draw.heatmaps import labels
from circuits.draw.paint import plain
from circuits.draw.template import SEQUENTIAL, framed, panels
from relp import Component, ModelLike, TaskLike
from relp.bridge import Sites, observe, token_at, undisturbed

__all__ = ["attention"]

_BESIDE = 24
"""Tokens up to which both prompts stand beside each other."""
_LETTERS = 15
"""Of a token's label, which stand four times beside a pattern."""


@undisturbed
def attention(model: ModelLike, task: TaskLike, head: str, *, pair: int = 0) -> go.Figure:
    """The attention pattern of a head on the two prompts of a pair, as the model computes it.

    >>> from circuits.draw import attention
    >>> attention(model, task, "L3H0", pair=2)

    Rows are queries, columns the keys that they look at; a row sums to 1 (to less where the model
    has attention sinks). With grouped queries several heads share keys, and each has a pattern of
    its own.

    Args:
        model: the `TransformerBridge`. It is the same afterwards.
        task: a `tasks.Task`.
        head: its name, `L9H6`.
        pair: the number of the pair in the task.

    Raises:
        ValueError: there is no such head or pair, or the model hands out no patterns: its heads
            cannot be told apart, or its own attention computes none.
    """
    sites = Sites.of(model)
    site, number = _place(sites, head)
    if not 0 <= pair < len(task):
        raise ValueError(
            f"`pair` must be from 0 to {len(task) - 1}, as the task has {len(task)} pairs; got "
            f"{pair}; count from 0"
        )
    task.must_fit(sites.model.cfg, sites.model_name)
    one = task.select([pair])
    length = int(one.lengths[0])
    patterns, tokens = {}, {}
    for side in ("clean", "corrupt"):
        patterns[side] = _pattern(sites, one, site, side)[number, :length, :length]
        tokens[side] = _tokens(model, getattr(one, side)[0, :length])
    return _drawn(patterns, tokens, f"{head} · {sites.model_name} · {task.name}", pair)


def _place(sites: Sites, head: str) -> tuple[str, int]:
    """The site of a head's layer, and its number there."""
    heads = [name for block in sites.blocks if block.heads for name in block.mixer.parts]
    if head not in heads:
        some = f"{heads[0]} to {heads[-1]}" if heads else "and this model has none of its own"
        raise ValueError(
            f"`head` must be the name of a head of {sites.model_name}, {some}; got {head!r}; its "
            "key/value heads, MLPs and mixers have no attention pattern"
        )
    _, _, layer, number = Component.parse(head)
    site = sites.blocks[layer].name("pattern")
    if site not in sites.points:
        raise ValueError(_none(sites))
    return site, number


def _pattern(sites: Sites, one: TaskLike, site: str, side: str) -> torch.Tensor:
    """`[head, query, key]` of one prompt."""
    try:
        values, _ = observe(sites, one, (site,), side=side)
    except RuntimeError as error:
        if "must be passed when the model runs" not in str(error):
            raise
        raise ValueError(_none(sites)) from error
    return values[site][0].float().cpu()


def _none(sites: Sites) -> str:
    return (
        f"the attention of {sites.model_name} hands out no pattern, as a fused kernel computes it; "
        "boot the model with attn_implementation='eager' to see it"
    )


def _tokens(model: Any, ids: torch.Tensor) -> list[str]:
    """`" Mary"@4`, as figures of scores call positions."""
    tokenizer = getattr(model, "tokenizer", None)
    words = ["" if tokenizer is None else tokenizer.decode([token]) for token in ids.tolist()]
    return [token_at(word, pos) for pos, word in enumerate(words)]


def _drawn(
    patterns: dict[str, torch.Tensor], tokens: dict[str, list[str]], title: str, pair: int
) -> go.Figure:
    many = len(tokens["clean"])
    columns = 2 if many <= _BESIDE else 1
    names = {side: labels(texts, _LETTERS) for side, texts in tokens.items()}
    below = 16 + round(5.2 * max(len(name) for side in names.values() for name in side))
    figure, plot, above = panels(
        [["clean prompt"], ["corrupt prompt"]],
        columns,
        plot=max(160, many * (13 if columns == 2 else 11)),
        between=below + 14,
        gap=0.22,
    )
    for i, (side, pattern) in enumerate(patterns.items()):
        at = {"row": i // columns + 1, "col": i % columns + 1}
        seen = torch.ones_like(pattern).tril().bool() | (pattern > 0)
        figure.add_trace(
            go.Heatmap(
                z=torch.where(seen, pattern, torch.nan).numpy(),
                x=names[side], y=names[side], zmin=0, zmax=1, colorscale=SEQUENTIAL,
                showscale=i == 0,
                colorbar={"tickvals": [0, 0.5, 1]},
                customdata=[[f"{plain(q)} looks at {plain(k)}" for k in tokens[side]]
                            for q in tokens[side]],
                hovertemplate="%{customdata}: %{z:.3f}<extra></extra>", xgap=0.5, ygap=0.5,
            ),
            **at,
        )  # fmt: skip
        figure.update_xaxes(title_text="key", tickangle=-90, **at)
        figure.update_yaxes(title_text="query" if at["col"] == 1 else "", **at)
    figure.update_xaxes(type="category", tickfont_size=10, showgrid=False)
    figure.update_yaxes(type="category", tickfont_size=10, showgrid=False, autorange="reversed")
    note = f"attention pattern, pair {pair}; a row is a query, and sums to 1 over its keys"
    return framed(figure, title, note, plot=plot, above=above, below=below + 20)
