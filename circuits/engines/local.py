"""What an engine is, and the one that is there when none is asked for.

A verb cuts its work in pieces that do not depend on each other: lists of cells, circuits or cases.
An engine answers them, wherever and in whatever order; the verb puts each answer where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from relp import ModelLike, TaskLike

__all__ = ["Answers", "Begin", "Engine", "LocalEngine", "cut"]

Begin = Callable[[Any, Any], Callable[[list[Any]], Any]]
"""`(model, task)` -> what answers a piece; it is kept from piece to piece, with all it holds."""
Answers = Callable[[Iterable[list[Any]]], Iterator[tuple[list[Any], Any]]]
"""Pieces -> each with its answer, as they are done. A piece may come back in two."""


@runtime_checkable
class Engine(Protocol):
    """What `engine=` takes: `patch`, `verify`, `acdc`, `evaluate` and `bench` have their work done.

    >>> from circuits.engines import LocalEngine
    >>> effect = patch(model, task, components=["L3.mlp"], engine=LocalEngine(), progress=False)
    """

    @property
    def workers(self) -> int:
        """How many pieces are worked on at once."""

    def working(
        self, begin: Begin, model: ModelLike | None = None, task: TaskLike | None = None
    ) -> AbstractContextManager[Answers]:
        """While it is open, pieces are answered; `begin` is called wherever there is a model.

        `model`: the driver's, which that of every worker must equal; None for work that loads its
        own models.
        """


class LocalEngine:
    """This process, one piece after the other: as without an engine, but in pieces.

    >>> from circuits.engines import LocalEngine
    >>> LocalEngine().workers
    1
    """

    workers = 1

    @contextmanager
    def working(
        self, begin: Begin, model: ModelLike | None = None, task: TaskLike | None = None
    ) -> Iterator[Answers]:
        """See `Engine`; the model is the very one that it is given."""
        answer = begin(model, task)
        yield lambda pieces: ((piece, answer(piece)) for piece in pieces)


def cut(items: Sequence[Any], work: Sequence[int], parts: int) -> list[list[Any]]:
    """A list in pieces, in its order, of about the same work each; `parts` at most, none empty.

    >>> from circuits.engines.local import cut
    >>> cut("abcdef", [3, 1, 1, 1, 1, 1], 2)
    [['a', 'b'], ['c', 'd', 'e', 'f']]
    """
    found: list[list[Any]] = [[] for _ in range(parts)]
    total, before = sum(work), 0.0
    for item, own in zip(items, work, strict=True):
        # an item belongs where its middle falls
        at = (before + own / 2) / total * parts if total else 0
        found[min(parts - 1, int(at))].append(item)
        before += own
    return [piece for piece in found if piece]
