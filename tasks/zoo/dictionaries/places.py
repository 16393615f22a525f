"""Where a dictionary reads: sites by name, TransformerLens' hook points for them, what they hold.

Here the output of a block is the site of the next one, `L3.resid`, or `final` behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["hook_of", "padded", "replacing", "vectors"]

BLOCK_OUTPUT, MLP_OUTPUT = "blocks.{}.hook_resid_post", "blocks.{}.hook_mlp_out"
ROWS = 64
"""How many texts go through the model at once."""


class _Reached(Exception):
    """Nothing behind the last site is needed."""


def hook_of(site: str, blocks: int) -> str:
    """The hook point of a site in a model of so many blocks.

    >>> from tasks.zoo.dictionaries.places import hook_of
    >>> hook_of("L2.resid", 6), hook_of("L2.mlp", 6)
    ('blocks.1.hook_resid_post', 'blocks.2.hook_mlp_out')
    """
    if site == "final":
        return BLOCK_OUTPUT.format(blocks - 1)
    layer, _, part = site[1:].partition(".")
    return MLP_OUTPUT.format(layer) if part == "mlp" else BLOCK_OUTPUT.format(int(layer) - 1)


def padded(
    rows: Sequence[Sequence[int]], fill: int
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, " row"]]:
    """Token ids padded on the right, which a causal model's earlier positions cannot see."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


@torch.no_grad()
def vectors(
    model: Any, rows: Sequence[Sequence[int]], sites: Sequence[str], *, first: bool = True
) -> Float[Tensor, "site vector d_model"]:
    """What the sites hold at every position of these texts, one position after the other.

    Args:
        model: a bridge.
        rows: token ids of each text.
        sites: their names, in the order of a forward pass.
        first: with the first position, which holds the same in all texts.
    """
    names = [hook_of(site, model.cfg.n_layers) for site in sites]
    found: list[Tensor] = []
    ordered = sorted(rows, key=len)  # little padding
    for start in range(0, len(ordered), ROWS):
        tokens, lengths = padded(ordered[start : start + ROWS], model.tokenizer.pad_token_id)
        at = torch.arange(tokens.shape[1])[None]
        own = (at < lengths[:, None]) & (at >= (0 if first else 1))
        found.append(torch.stack([value[own] for value in _held(model, tokens, names)]))
    return torch.cat(found, dim=1)


def _held(model: Any, tokens: Tensor, names: Sequence[str]) -> list[Tensor]:
    """What these hook points hold; nothing behind the last of them is computed."""
    held: dict[int, Tensor] = {}

    def keep(at: int, value: Tensor, *, hook: Any) -> None:
        held[at] = value
        if len(held) == len(names):
            raise _Reached

    hooks = [(name, partial(keep, at)) for at, name in enumerate(names)]
    with suppress(_Reached):
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=hooks)
    return [held[at] for at in range(len(names))]


def replacing(
    site: str, blocks: int, change: Callable[[Tensor], Tensor]
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks under which a site holds `change` of what it would hold, at every position."""
    return [(hook_of(site, blocks), lambda value, hook: change(value))]
