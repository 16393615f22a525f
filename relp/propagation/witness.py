"""What must not go past the rules: every result came about under our eyes, or nobody's.

Results are told by their nodes in torch's graph. One that no operation made which the mode saw
comes from a custom autograd function, TorchScript, a fused kernel, or another thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from relp.propagation.calls import tensors

__all__ = ["Witness", "nodes_so_far"]

T = TypeVar("T")

nodes_so_far: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""How many nodes this thread has made: the number of its next one."""

_VIEWS = (
    "AsStrided", "View", "UnsafeView", "Slice", "Select", "Narrow", "Transpose", "Permute",
    "Expand", "Squeeze", "Unsqueeze", "Split", "Unbind", "Diagonal", "Alias", "T",
    "SplitWithSizes", "ViewAs", "Swapaxes", "Unfold",
)  # fmt: skip


class Witness:
    """The nodes of a run that came about under our eyes, or that nothing has to explain."""

    def __init__(self) -> None:
        self.explained: set[Any] = set()
        self._before: set[Any] = set()
        self._first_node = 0

    def start(self) -> None:
        """What this thread makes from here on is to be explained."""
        self._first_node = nodes_so_far()

    def clear(self) -> None:
        """The run is over: keeps nothing of its graph."""
        self.explained.clear()
        self._before.clear()

    def explain(self, out: T) -> T:
        """Notes a result that an operation under our eyes gave."""
        for t in (out,) if isinstance(out, Tensor) else tensors(out):
            if t.grad_fn is not None:
                self.explained.add(t.grad_fn)
            if t._base is not None:  # what is written into a view changes the whole
                self.explained.add(t._base.grad_fn)
        return out

    def unexplained(self, output: Any) -> Iterator[str]:
        """What made `output` and went past the rules; from then on it is known."""
        for node in [t.grad_fn for t in tensors(output)]:
            if node is not None and node not in self.explained and not self._harmless(node):
                self.explained.add(node)
                yield type(node).__name__.removesuffix("Backward")

    def _harmless(self, node: Any) -> bool:
        """True for what was there before the run, and for views that torch makes anew."""
        views, rest = set(), [node]
        while rest:
            node = rest.pop()
            if node is None or node in self.explained or node in views:
                continue
            if not self._first_node <= node._sequence_nr() < nodes_so_far():
                if not self._was_before(node):
                    return False
            elif isinstance(node, BackwardCFunction) or _kind_of(node) not in _VIEWS:
                return False
            else:
                views.add(node)
                rest += [parent for parent, _ in node.next_functions]
        self.explained |= views  # each is looked at once, however long the chain becomes
        return True

    def _was_before(self, node: Any) -> bool:
        """True if nothing of the run goes into a node that this thread did not make in the run.

        Each thread counts its nodes for itself: a number that does not fit may be another one's,
        who was given what the run computed.
        """
        found, rest = set(), [node]
        while rest:
            node = rest.pop()
            if node is None or node in self._before or node in found:
                continue
            if node in self.explained and node._sequence_nr() >= self._first_node:
                return False
            found.add(node)
            rest += [parent for parent, _ in node.next_functions]
        self._before |= found
        return True


def _kind_of(node: Any) -> str:
    """`SelectBackward0` -> `Select`."""
    return re.sub(r"Backward\d*$", "", type(node).__name__)
