"""Rules that compare two runs: what of the first run the reference run must find again.

Both must take the same path through the code. Where the model branches on its activations (a
router's top-k, a comparison), the reference run is led along the first run's branch; the module
around it is then run once more as it is, its true outputs go on, and what they differ by is the
remainder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relp.propagation.calls import Call, carries, copied, swapped, tensors
from relp.propagation.frames import Frame, Frames, Key
from relp.propagation.kinds import CONSTRUCTORS, EXTREMES, ORDERED, VALUES, UnknownOperationError
from relp.rules import Comparison, Reference, Remainder

__all__ = ["TwoRuns", "not_in_place"]


class TwoRuns:
    """The first run's books, by where operations stand, and the reference run's way along them.

    Outside of rules that compare two runs there is nothing in them.
    """

    def __init__(self, frames: Frames, *, compares: bool) -> None:
        self.compares = compares
        self.repeating: bool | None = None
        """In the reference run; False afterwards, None before."""
        self.comparison = Comparison()
        self._frames = frames
        self._performed: dict[Key, list[torch.Size]] = {}
        self._slots: dict[Key, Reference] = {}
        self._branches: dict[Key, Any] = {}
        self._remainders: dict[int, tuple[Remainder, list[int]]] = {}
        # detached activations, whose difference between the runs no coefficient can explain, and
        # what the first run had where they meet what carries relevance
        self._stopped: dict[int, Tensor] = {}
        self._lent: set[int] = set()
        self._meetings: dict[Key, tuple[dict[int, Tensor], Remainder]] = {}
        # decisions of the first run in place of other ones, kept so that their ids stay theirs
        self._suspects: dict[int, tuple[Tensor, str]] = {}

    def clear(self) -> None:
        """A run is over: keeps nothing of it that was for itself only."""
        self._suspects.clear()
        self._stopped.clear()
        self._lent.clear()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The reference run; afterwards it must have performed what the first did."""
        if self.repeating is not None:
            raise RuntimeError("a reference run can be made once; call propagate(rules) again")
        self.repeating = True
        try:
            yield
            unseen = [k[1] for k, slot in self._slots.items() if not slot.filled]
            unseen += [k[1] for k in self._branches]
            if unseen:
                raise ValueError(
                    "the reference run must perform the operations of the first run; "
                    f"{len(unseen)} were missing, the first a {unseen[0]!r}; "
                    "compare runs of the same code, or use rules of one run"
                )
        finally:
            self.repeating = False
            # from here on they belong to the graph, and go when that goes
            self._slots.clear()
            self._branches.clear()

    @property
    def remainders(self) -> list[Remainder]:
        """Of modules that branch, then of detached operands."""
        return [r for r, _ in self._remainders.values()] + [r for _, r in self._meetings.values()]

    # -- the first run ---------------------------------------------------------------------------

    def performs(self, key: Key, call: Call) -> None:
        """An operation that may have a rule: the reference run must do no other ones."""
        self._performed[key] = _shapes(call)

    def keep(self, key: Key, slot: Reference) -> None:
        """The reference run is to fill the slot here."""
        if self.compares:
            slot.comparison = self.comparison
            self._slots[key] = slot

    def branch(self, key: Key, name: str, out: Any) -> None:
        """Notes what the activations decided here: the reference run must go the same way.

        A detached activation decides nothing by itself; it is followed until it does, or until it
        meets what carries relevance.
        """
        if not self.compares or name in CONSTRUCTORS:
            return
        if name in ORDERED | EXTREMES and isinstance(out, tuple):
            self._stopped |= {id(out[0]): out[0]} if not carries(out[0]) else {}
            out = out[1]
        if name in ("numpy", "array"):
            raise UnknownOperationError(
                "activations must stay with torch under rules that compare two runs; "
                f"{name!r} in {self._frames.where!r} takes them out; compute with torch"
            )
        found = list(tensors(out))
        if (name in VALUES and not found) or any(not t.is_floating_point() for t in found):
            self._branches[key] = swapped(out, copied)
            self._frames.top.branched = True
        else:
            found += [t._base for t in found if t._base is not None]  # written through a view
            self._stopped |= {id(t): t for t in found}

    def lend(self, out: Any, given: Any) -> None:
        """A result without relevance may lie where activations do: `x.data`."""
        if self.compares:
            self._lent |= _memory(out) & _memory(given)

    def is_lent(self, operand: Any) -> bool:
        """True for what lies where activations do."""
        return bool(_memory(operand) & self._lent)

    def meets(self, call: Call) -> dict[int, Tensor]:
        """The detached activations among the operands, by their place."""
        if not self._stopped:
            return {}
        given = enumerate(tensors((call.args, call.kwargs)))
        return {p: copied(t) for p, t in given if id(t) in self._stopped and not carries(t)}

    def follows(self, given: Any) -> bool:
        """True if a detached activation goes in."""
        return bool(self._stopped) and any(id(t) in self._stopped for t in tensors(given))

    def watched(self, key: Key, met: dict[int, Tensor], out: Any) -> Any:
        """Operands that were detached differ between the runs: what that adds is a remainder."""
        where = self._frames.where
        parts = list(tensors(out))
        if not parts or not all(t.is_floating_point() for t in parts):
            raise UnknownOperationError(
                "an activation that was detached must not be assigned in place under rules that "
                f"compare two runs; {key[1]!r} in {where!r} does; write y = f(x)"
            )
        remainder = Remainder(where)
        self._meetings[key] = met, remainder
        watched = iter(remainder.watch(parts))
        return swapped(out, lambda _: next(watched))

    def end_branch(self, frame: Frame, output: Any) -> Any:
        """Ends a branch at the first module around it whose outputs are activations only."""
        if not frame.branched:
            return None
        if not _only_activations(output):
            self._frames.top.branched = True
            return None
        remainder = Remainder(frame.name)
        places = [i for i, part in enumerate(_parts(output)) if carries(part)]
        self._remainders[frame.number] = remainder, places
        watched = iter(remainder.watch([_parts(output)[i] for i in places]))
        return swapped(output, lambda t: next(watched) if carries(t) else t)

    # -- the reference run -----------------------------------------------------------------------

    def slot(self, key: Key) -> Reference | None:
        """What the reference run is to fill in here."""
        return self._slots.get(key)

    def replay(self, key: Key, call: Call, *, ruled: bool) -> Any:
        """An operation in the reference run; `ruled`: it may have a rule."""
        if ruled and key not in self._performed:
            raise ValueError(
                "the reference run must perform the operations of the first run; it does another "
                f"{call.name!r} in {self._frames.where!r}; compare runs of the same code, or use "
                "rules of one run"
            )
        if self._suspects:
            self.use((call.args, call.kwargs))
        slot = self._slots.get(key)
        if slot is not None and _shapes(call) != self._performed[key]:
            raise ValueError(
                "the reference run must have the shapes of the first run; "
                f"{call.name!r} in {self._frames.where!r} got {list(map(list, _shapes(call)))}, "
                f"first {list(map(list, self._performed[key]))}; compare inputs of one shape"
            )
        before = call if slot is None else call.out_of_place() or call
        if key in self._meetings:
            return self._met(key, slot, call)
        out = call.plainly()
        if slot is not None:
            slot.fill(*slot.keep(before, out))
        return self.led(key, call.name, out, call)

    def _met(self, key: Key, slot: Reference | None, call: Call) -> Any:
        """Compares with the first run as if the detached operands were the first run's."""
        own, remainder = self._meetings[key]
        places = iter(range(sys.maxsize))
        args, kwargs = swapped((call.args, call.kwargs), lambda t: own.get(next(places), t))
        led = replace(call, args=args, kwargs=kwargs)
        led = led.out_of_place() or led
        forced = led.plainly()
        if slot is not None:
            slot.fill(*slot.keep(led, forced))
        copy = call.out_of_place()
        real = (copy or call).plainly()
        remainder.fill([call.name], list(zip(tensors(real), tensors(forced), strict=True)))
        return real if copy is None else call.args[0].copy_(real)

    def led(self, key: Key, name: str, out: Any, call: Call | None = None) -> Any:
        """The first run's decision in place of the reference run's own, where there was one."""
        if key not in self._branches:
            return out
        own = self._branches.pop(key)
        chosen = call is not None and name in ORDERED | EXTREMES
        if _equal(own, out[1] if chosen else out):
            return out
        if call is not None and name in ORDERED:
            self._frames.top.differing.append(name)
            return type(out)((_gathered(call, own), own.clone()))
        own = swapped(own, copied)
        # it only matters if something makes use of it
        found = {id(t): (t, name) for t in tensors(own)}
        self._suspects |= found
        if not found:  # a plain number or truth value is used already
            self._frames.top.differing.append(name)
        return type(out)((out[0], own)) if chosen else own

    def use(self, given: Any) -> None:
        """Notes which decisions of the first run, in place of other ones, make a difference."""
        if self._suspects:
            used = [self._suspects.get(id(t)) for t in tensors(given)]
            self._frames.top.differing += [found[1] for found in used if found]

    def settle(
        self,
        frame: Frame,
        module: nn.Module,
        given: tuple[tuple[Any, ...], dict[str, Any]],
        output: Any,
        paused: Callable[[], AbstractContextManager[None]],
    ) -> Any:
        """Runs a module that was led along another branch once more, as it is."""
        if not frame.differing:
            return None
        if frame.number not in self._remainders:
            self._frames.top.differing += frame.differing
            return None
        if [a._version for a in given[0] if isinstance(a, Tensor)] != frame.versions:
            raise ValueError(_OVERWRITES.format(frame.name))
        if not _only_tensors(given):
            raise ValueError(
                "a module that branches must be given tensors and plain values under rules that "
                f"compare two runs, for it is run twice; {frame.name!r} also gets an object that "
                "may keep state, such as a cache; call the model with use_cache=False"
            )
        versions = [t._version for t in tensors(given)]
        with paused():
            real = module.forward(*given[0], **given[1])
        if [t._version for t in tensors(given)] != versions:
            raise ValueError(_OVERWRITES.format(frame.name))
        remainder, places = self._remainders[frame.number]
        jumps = [(_parts(real)[i], _parts(output)[i]) for i in places]
        if any(a.shape != b.shape for a, b in jumps):
            self._frames.top.differing += frame.differing
            return None
        remainder.fill(frame.differing, jumps)
        return real


def not_in_place(name: str, where: str) -> UnknownOperationError:
    """The refusal of an operation that overwrites an activation where no rule sees it."""
    return UnknownOperationError(
        "an activation must not be overwritten without gradients (in no_grad, by .data or "
        f".detach()) under rules that compare two runs; {name!r} in {where!r} does; write y = f(x)"
    )


_OVERWRITES = (
    "a module that branches must leave its inputs as they are under rules that compare two runs; "
    "{!r} overwrites one; use rules of one run, such as RELP"
)


# -- reading operands and results ------------------------------------------------------------------


def _only_activations(output: Any) -> bool:
    """True if an output is floating-point tensors, one of which carries relevance."""
    parts = _parts(output)
    floats = all(p is None or (isinstance(p, Tensor) and p.is_floating_point()) for p in parts)
    return floats and carries(parts)


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _memory(value: Any) -> set[int]:
    """Where the tensors lie."""
    return {t.untyped_storage().data_ptr() for t in tensors(value)}


def _only_tensors(value: Any) -> bool:
    """True for tensors and plain values, however nested."""
    if isinstance(value, (tuple, list)):
        return all(map(_only_tensors, value))
    if isinstance(value, dict):
        return all(map(_only_tensors, value.values()))
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype))


def _shapes(call: Call) -> list[torch.Size]:
    return [a.shape for a in call.args if isinstance(a, Tensor)]


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return bool(one == two)


def _gathered(call: Call, indices: Tensor) -> Tensor:
    """What an ordering operation would give if it had chosen these entries."""
    x: Tensor = call.args[0]
    place = 2 if call.name in ("topk", "kthvalue") else 1
    given = call.args[place] if len(call.args) > place else -1
    dim = call.kwargs.get("dim", given)
    if indices.dim() == x.dim():
        return x.gather(dim, indices)
    return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim)
