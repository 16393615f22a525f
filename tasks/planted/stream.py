"""A language for circuits: the residual stream as named coordinates, and heads and neurons on it.

Every matrix of a transformer that touches the stream is a few rows of it, so that a circuit is
written with rows alone:

    s = Stream(token=("Mary", "book"), place=8, answer=("book",))
    Head("L1H0", query=s["token"], key=s["previous"], value=s["token", "book"], out=s["answer"])
    Neuron(layer=0, reads=s["left"] + s["right"] - 1.5 * s["one"], writes=2 * s["both"])

That features get coordinates of their own is the idea of RASP's compiler, tracr (Lindner et al.
2023, arXiv:2301.05062); what it has no need of, as it has no norms, is in `tasks.planted.weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["SERVICE", "Head", "Neuron", "Stream"]

Rows = Float[Tensor, "_ width"]
"""Directions of the stream, one a row: what is read, or where it is written."""
Label = str | int
SERVICE = ("one", "twin", "rest")
"""The first coordinates of every stream: see `tasks.planted.weights`."""


class Stream:
    """Named groups of coordinates; a group has labels, is counted (`place=8`), or is one (`1`).

    >>> from tasks.planted.stream import Stream
    >>> s = Stream(token=("Mary", "John"), place=8, seen=1)
    >>> s["token"].shape, s["token", "John"].shape, s["place", (1, 2)].shape, s["seen"].shape
    (torch.Size([2, 14]), torch.Size([1, 14]), torch.Size([2, 14]), torch.Size([1, 14]))

    `s["one"]` reads 1 everywhere: what a bias would be.

    Raises:
        KeyError: there is no such coordinate.
    """

    def __init__(self, **groups: Sequence[Label] | int) -> None:
        service = dict.fromkeys(SERVICE, 1)
        self.labels: dict[str, list[Label]] = {
            name: list(range(of)) if isinstance(of, int) else list(of)
            for name, of in (service | groups).items()
        }
        flat = [(name, label) for name, labels in self.labels.items() for label in labels]
        self._at = {place: i for i, place in enumerate(flat)}

    @property
    def width(self) -> int:
        """How many coordinates there are."""
        return len(self._at)

    def __getitem__(self, what: str | tuple[str, Label | Iterable[Label]]) -> Rows:
        name, chosen = (what, self.labels[what]) if isinstance(what, str) else what
        if isinstance(chosen, str) or not isinstance(chosen, Iterable):
            chosen = [chosen]
        return torch.eye(self.width)[[self._at[name, label] for label in chosen]]


@dataclass(frozen=True, eq=False)
class Head:
    """An attention head: scores are `sharpness` times the product of what q and k read.

    >>> from tasks.planted.stream import Head, Stream
    >>> s = Stream(place=6, seen=1, told=1)
    >>> head = Head("L0H1", query=s["place", 5], key=s["place", 1], value=s["seen"], out=s["told"])
    """

    name: str
    query: Float[Tensor, "compared width"]
    key: Float[Tensor, "compared width"]
    value: Float[Tensor, "moved width"]
    out: Float[Tensor, "moved width"]
    sharpness: float = field(default=12.0, kw_only=True)

    @property
    def at(self) -> tuple[int, int]:
        """Its layer and its number there."""
        layer, _, number = self.name.removeprefix("L").partition("H")
        return int(layer), int(number)


@dataclass(frozen=True, eq=False)
class Neuron:
    """An MLP neuron that adds `relu(reads) · writes`, but for a smooth corner (GELU, SiLU).

    >>> from tasks.planted.stream import Neuron, Stream
    >>> s = Stream(seen=1, told=1)
    >>> neuron = Neuron(layer=0, reads=s["seen"] - 0.5 * s["one"], writes=2 * s["told"])
    """

    layer: int
    reads: Float[Tensor, "1 width"]
    writes: Float[Tensor, "1 width"]
