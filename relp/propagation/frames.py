"""The calls of modules while they run: their names, and where in them an operation stands."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from relp.operations import Entry, Formula
from relp.propagation.kinds import is_norm
from relp.rules import Reference

__all__ = ["FROZEN", "Frame", "Frames", "Key", "Unit", "frozen", "module_names"]

Key = tuple[int, str, int]
"""Where an operation stands: the call of a module, its name, how often it was there before."""


@dataclass
class Unit:
    """A module that counts as one operation, while it runs."""

    rule: str | Formula
    """Its kind, or a formula."""
    registration: Entry | None = None
    """By which it counts so under all rules."""
    x: Tensor | None = None
    args: tuple[Any, ...] = ()
    slot: Reference | None = None
    handed: Tensor | None = None
    """What it runs on in place of `x`, so that there is no graph inside."""


@dataclass
class Frame:
    """One call of a module while it runs."""

    name: str
    number: int
    versions: list[int]
    normalises: bool
    counts: Counter[str] = field(default_factory=Counter)
    branched: bool = False
    """Something inside was decided by values."""
    differing: list[str] = field(default_factory=list)
    """In the reference run: which operations decided otherwise than in the first."""
    unit: Unit | None = None


class Frames:
    """The calls that are under way, and the numbers of those that were."""

    def __init__(self, root: nn.Module | None) -> None:
        self.names = {} if root is None else module_names(root)
        self.stack: list[Frame] = []
        self._numbers: dict[tuple[int, str, int], int] = {}

    @property
    def top(self) -> Frame:
        """The call that operations are in now; at the bottom is the code around all modules."""
        return self.stack[-1]

    @property
    def where(self) -> str:
        """The name of the module that runs now."""
        return self.stack[-1].name if self.stack else ""

    def start(self) -> Frame:
        """The code under `propagate` begins, in no module yet."""
        self.stack.append(Frame("", 0, [], False))
        return self.top

    def enter(self, module: nn.Module, args: tuple[Any, ...], *, looked_at: bool) -> Frame:
        """A module begins; inside what is not looked at it has no number."""
        name = self.names.get(id(module)) or type(module).__name__
        versions = [a._version for a in args if isinstance(a, Tensor)]
        number = self._number(name) if looked_at else -1
        self.stack.append(Frame(name, number, versions, is_norm(module)))
        return self.top

    def place(self, name: str) -> Key:
        """Where the next operation of that name stands."""
        frame = self.stack[-1]
        key = (frame.number, name, frame.counts[name])
        frame.counts[name] += 1
        return key

    def _number(self, name: str) -> int:
        """The same for the same call of a module in both runs."""
        parent, _, again = self.place(f"{name}()")
        return self._numbers.setdefault((parent, name, again), len(self._numbers) + 1)


# -- the modules under a root ----------------------------------------------------------------------

_LOCK = threading.Lock()
FROZEN: Counter[Tensor] = Counter()
"""Parameters that do not require grad for the time being, and how many blocks want it so."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` requires grad inside; afterwards each does as before."""
    whole = getattr(module, "original_model", module)  # a bridge does not list all parameters
    parameters = {*module.parameters(), *whole.parameters()}
    with _LOCK:
        # what another thread has frozen must stay so until the last of us is done
        wanted = [p for p in parameters if p.requires_grad or p in FROZEN]
        FROZEN.update(wanted)
        for p in wanted:
            p.requires_grad_(False)
    try:
        yield
    finally:
        with _LOCK:
            FROZEN.subtract(wanted)
            for p in wanted:
                if not FROZEN[p]:
                    del FROZEN[p]
                    p.requires_grad_(True)


def module_names(root: nn.Module) -> dict[int, str]:
    """The name of every module under `root`, by its id.

    A bridge has several for most: the one that its users write is that with the fewest private
    parts, and the shortest (`blocks.1.ln1`, not `blocks.1._original_component.ln_1`).
    """
    names: dict[int, str] = {}

    def visit(module: nn.Module, name: str) -> None:
        known = names.get(id(module))
        if known is not None and _privacy(known) <= _privacy(name):
            return
        names[id(module)] = name
        children = [(f"{name}.{n}".lstrip("."), child) for n, child in module.named_children()]
        for child_name, child in sorted(children, key=lambda item: _privacy(item[0])):
            visit(child, child_name)

    visit(root, "")
    return names


def _privacy(name: str) -> tuple[int, int]:
    return name.count("._"), len(name)
