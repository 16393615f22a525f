"""Runs any torch code under a `Rules`, operation by operation, and reports what it met.

While `propagate` is active every torch operation passes through a `TorchFunctionMode`. Operations
on tensors that do not require grad are none of our business; a linear operation propagates its
derivative; the others are given to the rule of their kind (`relp.rules`). An operation that no
rule knows is an error, and so is a result that no operation explains (a custom autograd function,
TorchScript). Forward values are torch's own, bit for bit.

Rules that compare two runs need both to take the same path through the code. Where the model
branches on its activations (a router's top-k, a comparison), the reference run is led along the
first run's branch; the module around it is then run once more as it is, its true outputs go on,
and what they differ by is the remainder, which `Propagation.remainder` reports.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from relp import rules as formulas
from relp.operations import (
    ACTIVATIONS,
    ATTRIBUTES,
    CONSTRUCTORS,
    EXPONENTS,
    EXTREMES,
    FUSED,
    LINEAR,
    ORDERED,
    PRODUCTS,
    RANDOM,
    REGISTERED,
    SOURCES,
    STATISTICS,
    SUMS_OF_PRODUCTS,
    WRITTEN_OUT,
    Call,
    Formula,
    carries,
    fused,
    is_activation,
    is_norm,
    name_of,
    swapped,
    tensors,
)
from relp.rulebook import KINDS, RELP, Rules

__all__ = ["Propagation", "UnknownOperationError", "coverage", "propagate"]


class UnknownOperationError(ValueError):
    """An operation carries relevance and no rule says how.

    >>> with propagate(RELP):
    ...     torch.lgamma(torch.ones(3, requires_grad=True))
    Traceback (most recent call last):
    UnknownOperationError: every operation that carries relevance must have a rule; ...
    """


Key = tuple[int, str, int]
"""Where an operation stands: the call of a module, its name, how often it was there before."""


@dataclass
class _Frame:
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


class Propagation:
    """A run of torch code under some rules, and afterwards the report of what it met.

    Made by `propagate`. Not reusable: one `with` block for the differentiated run, then, for rules
    that compare two runs, one `with report.reference():` for the other.
    """

    def __init__(self, rules: Rules, *, strict: bool = True, root: nn.Module | None = None) -> None:
        self._rules = rules
        self.strict = strict
        self._root = root
        self._names = {} if root is None else module_names(root)
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        # what the reference run must find again, by where it stands
        self._slots: dict[Key, formulas.Reference] = {}
        self._branches: dict[Key, Any] = {}
        self._remainders: dict[int, tuple[formulas.Remainder, list[int]]] = {}
        self._performed: dict[Key, list[torch.Size]] = {}
        self._repeated: set[Key] = set()
        # detached activations, whose difference between the runs no coefficient can explain, and
        # what the first run had where they meet what carries relevance
        self._stopped: dict[int, Tensor] = {}
        self._lent: set[int] = set()
        self._meetings: dict[Key, tuple[dict[int, Tensor], formulas.Remainder]] = {}
        # decisions of the first run in place of other ones, kept so that their ids stay theirs
        self._suspects: dict[int, tuple[Tensor, str]] = {}
        self._numbers: dict[tuple[int, str, int], int] = {}
        self._frames: list[_Frame] = []
        self._in_reference = self._referenced = False
        # results that came about under our eyes, or that nothing had to explain
        self._explained: set[Any] = set()
        self._before: set[Any] = set()
        self._first_node = 0
        self._thread = 0
        self._opening: list[Any] = []
        self._key: Key = (0, "", 0)
        # > 0 inside an activation module or a pause: operations are not looked at
        self._inside = 0
        self._modules: list[tuple[Any, ...]] = []
        self._attached: set[tuple[str, str]] = set()
        self._mode = _Mode()
        self._stack: ExitStack | None = None

    @property
    def rules(self) -> Rules:
        """The rules that hold where the run is now."""
        rules = self._rules.within(self._where) if self._rules.places else self._rules
        return rules.inside_norm() if self._frames and self._frames[-1].normalises else rules

    # -- as a context ----------------------------------------------------------------------------

    def __enter__(self) -> Propagation:
        if self._stack is not None:
            raise RuntimeError("a propagation can be entered once; call propagate(rules) again")
        self._must_find_places()
        self._stack = ExitStack()
        if self._root is not None:
            self._stack.enter_context(frozen(self._root))
        self._start(self._stack)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._stack is not None
        self._stack.close()
        if kind is None:
            self._must_have_attached()

    def _start(self, stack: ExitStack) -> None:
        def clear() -> None:
            self._explained.clear()
            self._before.clear()
            self._frames.clear()
            self._modules.clear()
            self._opening.clear()
            self._suspects.clear()
            self._stopped.clear()
            self._lent.clear()
            self._mode.owner = None
            self._inside = 0

        stack.callback(clear)
        self._frames.append(_Frame("", 0, [], False))
        self._thread = threading.get_ident()
        self._first_node = _nodes_so_far()
        with _LOCK:  # torch counts its handles without one
            # torch's annotation forgets that a hook may return new arguments
            before = register_module_forward_pre_hook(cast(Any, self._enter_module))
            stack.callback(before.remove)
            # (always: a module may raise, and the model go on)
            after = register_module_forward_hook(
                cast(Any, self._leave_module), with_kwargs=True, always_call=True
            )
            stack.callback(after.remove)
        self._mode.owner = self
        stack.enter_context(self._mode)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Runs the same code on the other input, to be compared with; without gradients.

        A module in which the two runs branch differently is run twice: it must not keep state or
        overwrite its inputs.

        Raises:
            ValueError: the run performs other operations than the first did, or takes another
                branch outside of any module.
        """
        if self._referenced:
            raise RuntimeError("a reference run can be made once; call propagate(rules) again")
        self._in_reference = self._referenced = True
        try:
            with ExitStack() as stack, torch.no_grad():
                self._start(stack)
                yield
                differing = self._frames[0].differing
            if differing:
                raise ValueError(
                    "rules that compare two runs need both to take the same branches; "
                    f"{differing[0]!r} chooses differently, and no module with floating-point "
                    "outputs stands around it; put the code into a module, or use rules of one run"
                )
            unseen = [k[1] for k, slot in self._slots.items() if not slot.filled]
            unseen += [k[1] for k in self._branches if k not in self._repeated]
            if unseen:
                raise ValueError(
                    "the reference run must perform the operations of the first run; "
                    f"{len(unseen)} were missing, the first a {unseen[0]!r}; "
                    "compare runs of the same code, or use rules of one run"
                )
        finally:
            self._in_reference = False
            # from here on they belong to the graph, and go when that goes
            self._slots.clear()
            self._branches.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Code inside is plain torch again, with its own derivatives."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    # -- the report ------------------------------------------------------------------------------

    def to_dataframe(self) -> pd.DataFrame:
        """Every operation that carried relevance: operation, kind, rule, module path, count."""
        rows = [(*key, count) for key, count in self._counts.items()]
        frame = pd.DataFrame(rows, columns=["operation", "kind", "rule", "module", "count"])
        return frame.sort_values(["kind", "operation", "module"], ignore_index=True)

    def remainder(self) -> pd.DataFrame:
        """What coefficients cannot explain, because the two runs take different branches.

        Columns: module, operation (which chose differently), remainder (in units of the result
        that was differentiated, summed over the batch). Σ Δ·c over a cut of the network plus
        the remainders of the modules after it is the difference of the result, exactly. Empty if
        both runs take the same branches. Call it after the backward.
        """
        found = [r for r, _ in self._remainders.values()]
        found += [r for _, r in self._meetings.values()]
        rows = [(r.module, ", ".join(r.operations), r.total) for r in found if r.total]
        return pd.DataFrame(rows, columns=["module", "operation", "remainder"])

    def _repr_html_(self) -> str:
        return str(self.to_dataframe().to_html(index=False))

    def _count(self, name: str, kind: str, rule: str) -> None:
        self._counts[name, kind, rule, self._where] += 1
        if self._rules.places:
            deciding = self._rules.deciding(self._where)
            self._attached |= {(pattern, k) for pattern, k, _ in deciding if k == kind}

    @property
    def _where(self) -> str:
        return self._frames[-1].name if self._frames else ""

    # -- what must not go past the rules ---------------------------------------------------------

    def must_have_seen(self, output: Any) -> None:
        """Makes sure that nothing between the last operation and `output` went past the rules.

        Raises:
            UnknownOperationError: something did, and the rules are not all derivatives.
        """
        with _plain_torch():
            nodes = [t.grad_fn for t in tensors(output)]
        for node in nodes:
            if node is not None and not self._harmless(node):
                self._explained.add(node)
                self._refuse(type(node).__name__.removesuffix("Backward"), "opaque")

    def _explain(self, out: Any) -> Any:
        for t in tensors(out):
            if t.grad_fn is not None:
                self._explained.add(t.grad_fn)
            if t._base is not None:  # what is written into a view changes the whole
                self._explained.add(t._base.grad_fn)
        return out

    def _harmless(self, node: Any) -> bool:
        """True for what was there before the run, and for views that torch makes anew."""
        views, rest = set(), [node]
        while rest:
            node = rest.pop()
            if node is None or node in self._explained or node in views:
                continue
            if not self._first_node <= node._sequence_nr() < _nodes_so_far():
                if not self._was_before(node):
                    return False
            elif isinstance(node, BackwardCFunction) or _kind_of(node) not in _VIEWS:
                return False
            else:
                views.add(node)
                rest += [parent for parent, _ in node.next_functions]
        self._explained |= views  # each is looked at once, however long the chain becomes
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
            if node in self._explained and node._sequence_nr() >= self._first_node:
                return False
            found.add(node)
            rest += [parent for parent, _ in node.next_functions]
        self._before |= found
        return True

    def _refuse(self, name: str, kind: str) -> None:
        if self._rules.only_derivatives or not self.strict:
            return self._count(name, kind, "derivative")
        where = repr(self._where) if self._where else "the code under propagate"
        if kind == "opaque":
            raise UnknownOperationError(
                f"every operation that carries relevance must have a rule; {name!r} before or in "
                f"{where} hides its operations (a custom autograd function, TorchScript, a fused "
                "kernel, a full backward hook); run the plain implementation, register the module "
                "that holds it with relp.register, or pass strict=False"
            )
        raise UnknownOperationError(
            f"every operation that carries relevance must have a rule; {name!r} in {where} has "
            "none; give it one with relp.register, or pass strict=False to let its derivative "
            "through and see it in the report"
        )

    def _must_find_places(self) -> None:
        for pattern, _ in self._rules.places:
            if self._root is None:
                raise ValueError(
                    "rules for some modules need their names; got none; give the module as "
                    "propagate(rules, root=module)"
                )
            here = [n for n in self._names.values() if self._rules.deciding(n)]
            if not any(p == pattern for n in here for p, _, _ in self._rules.deciding(n)):
                raise ValueError(
                    f"the pattern {pattern!r} must fit the name of a module; it fits none of "
                    f"{list(self._names.values())[1:4]} …; see the column `module` of coverage"
                )

    def _must_have_attached(self) -> None:
        for pattern, changes in self._rules.places:
            for kind, _ in changes:
                if kind in KINDS and (pattern, kind) not in self._attached:
                    raise ValueError(
                        f"a rule for some modules must meet an operation there; no {kind!r} that "
                        f"carries relevance was met in {pattern!r}; see coverage for what is there"
                    )

    # -- modules ---------------------------------------------------------------------------------

    # (torch calls these for every module of the process; other threads are none of our business)

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._is_here():
            return None
        with _plain_torch():
            return self._entered(module, args)

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if not self._is_here():
            return None
        with _plain_torch():
            if len(rest) == 2:
                return self._left(module, args, *rest)
            # it raised: torch calls without the keywords then, and the model may go on
            if _as_one(module) is not None:
                self._inside -= 1
                self._modules.pop()
            self._frames.pop()
            return None

    def _is_here(self) -> bool:
        return threading.get_ident() == self._thread

    def _entered(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        name = self._names.get(id(module)) or type(module).__name__
        versions = [a._version for a in args if isinstance(a, Tensor)]
        self._frames.append(_Frame(name, self._number(name), versions, is_norm(module)))
        if (kind := _as_one(module)) is None:
            return None
        self._inside += 1
        self._modules.append(())  # there to be left also if it is refused
        rule = self._rule_of(kind) if self._inside == 1 else "derivative"
        if self._inside == 1 and not self._in_reference:
            self.must_have_seen(args)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        slot = None
        if rule != "derivative" and x is not None:
            key = self._key = (self._frames[-1].number, type(module).__name__, -1)
            if self._in_reference:
                slot = self._slots.get(key)
                x = x.clone() if getattr(module, "inplace", False) else x
            elif torch.is_grad_enabled() and carries(x):
                slot = self._record(type(module).__name__)
                x = x.clone() if getattr(module, "inplace", False) else x
        # without a graph inside: the rule is attached to the module's result
        handed = None if slot is None or self._in_reference else args[0].detach()
        self._modules[-1] = (x, slot, args, handed)
        return None if handed is None else (handed, *args[1:])

    def _left(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        replaced = None
        kind = _as_one(module)
        if kind is not None:
            self._inside -= 1
            replaced = self._leave_one(module, kind, (args, kwargs), output)
        elif not self._inside and not self._in_reference:
            self.must_have_seen(output)
        frame = self._frames.pop()
        if replaced is None and not self._inside:
            replaced = self._settle(frame, module, args, kwargs, output)
        return replaced

    def _leave_one(
        self, module: nn.Module, kind: str | Formula, given: tuple[Any, ...], output: Any
    ) -> Any:
        """A module that counts as one operation: gives its result the rule."""
        name = type(module).__name__
        x, slot, before, handed = self._modules.pop()
        if handed is not None and not (given[0] and given[0][0] is handed):
            raise UnknownOperationError(
                "a module that counts as one operation must be run on the input it is given; a "
                f"pre-hook of {name} in {self._where!r} replaces it; hook the module before it"
            )
        if self._suspects:
            self._use((given,))
        if slot is not None and (in_place := getattr(module, "inplace", False)):
            output = output.clone()
        key = self._key = (self._frames[-1].number, name, -1)
        if self._in_reference:
            if slot is not None:
                slot.fill(cast(Tensor, x), output)
            return self._led(key, name, output) if key in self._branches else None
        rule = self._rule_of(kind) if not self._inside else "derivative"
        if slot is not None and carries((given[0][1:], given[1])):
            raise UnknownOperationError(_ONE_OPERAND.format(name))
        if slot is not None:
            x, y = cast(Tensor, x), output
            self._count(name, kind if isinstance(kind, str) else "registered", _word(rule))
            if callable(rule):
                replaced = formulas.own(x, y, rule)
            else:
                uniform = next(module.parameters(), None) is None
                replaced = self._elementwise_rule(x, y, fused(module), slot, rule, uniform)
            if in_place:
                replaced = before[0].copy_(replaced)
            return self._explain(replaced)
        if not self._inside and carries(output):
            if rule != "derivative":
                raise UnknownOperationError(
                    "a module that counts as one operation must get its input as first positional "
                    f"argument for the rule {_word(rule)!r}; {name} in {self._where!r} did not; "
                    "call it as module(x)"
                )
            self._count(name, kind if isinstance(kind, str) else "registered", "derivative")
            self._explain(output)
        elif not self._inside and (carries(given) or self._follows(given)):
            self._branch(name, output)  # of a detached activation, or inside a no_grad
        return None

    def _rule_of(self, kind: str | Formula) -> str | Formula:
        """The rule of a module that counts as one operation."""
        if isinstance(kind, str):
            return "derivative" if kind == "linear" else str(getattr(self.rules, kind))
        return "derivative" if self.rules.only_derivatives else kind

    def _number(self, name: str) -> int:
        """The same for the same call of a module in both runs."""
        if self._inside:
            return -1
        parent = self._frames[-1]
        called = f"{name}()"
        again = parent.counts[called]
        parent.counts[called] += 1
        place = (parent.number, name, again)
        return self._numbers.setdefault(place, len(self._numbers) + 1)

    # -- branches --------------------------------------------------------------------------------

    def _branch(self, name: str, out: Any) -> None:
        """Notes what the activations decided here: the reference run must go the same way.

        A detached activation decides nothing by itself; it is followed until it does, or until it
        meets what carries relevance.
        """
        if not self._rules.needs_reference or name in CONSTRUCTORS:
            return
        if name in ORDERED | EXTREMES and isinstance(out, tuple):
            self._stopped |= {id(out[0]): out[0]} if not carries(out[0]) else {}
            out = out[1]
        if name in ("numpy", "array"):
            raise UnknownOperationError(
                "activations must stay with torch under rules that compare two runs; "
                f"{name!r} in {self._where!r} takes them out; compute with torch"
            )
        found = list(tensors(out))
        if (name in _VALUES and not found) or any(not t.is_floating_point() for t in found):
            self._branches[self._key] = swapped(out, _copied)
            self._frames[-1].branched = True
        else:
            found += [t._base for t in found if t._base is not None]  # written through a view
            self._stopped |= {id(t): t for t in found}

    def _meets(self, call: Call) -> dict[int, Tensor]:
        """The detached activations among the operands, by their place."""
        if not self._stopped:
            return {}
        given = enumerate(tensors((call.args, call.kwargs)))
        return {p: _copied(t) for p, t in given if id(t) in self._stopped and not carries(t)}

    def _follows(self, given: Any) -> bool:
        """True if a detached activation goes in."""
        return bool(self._stopped) and any(id(t) in self._stopped for t in tensors(given))

    def _watched(self, key: Key, met: dict[int, Tensor], out: Any) -> Any:
        """Operands that were detached differ between the runs: what that adds is a remainder."""
        parts = list(tensors(out))
        if not parts or not all(t.is_floating_point() for t in parts):
            raise UnknownOperationError(
                "an activation that was detached must not be assigned in place under rules that "
                f"compare two runs; {key[1]!r} in {self._where!r} does; write y = f(x)"
            )
        remainder = formulas.Remainder(self._where)
        self._meetings[key] = met, remainder
        watched = iter(remainder.watch(parts))
        return self._explain(swapped(out, lambda _: next(watched)))

    def _led(self, key: Key, name: str, out: Any, call: Call | None = None) -> Any:
        """The first run's decision in place of the reference run's own."""
        own = self._branches[key]
        self._repeated.add(key)
        chosen = call is not None and name in ORDERED | EXTREMES
        if _equal(own, out[1] if chosen else out):
            return out
        if call is not None and name in ORDERED:
            self._frames[-1].differing.append(name)
            return type(out)((_gathered(call, own), own.clone()))
        own = swapped(own, _copied)
        # it only matters if something makes use of it
        found = {id(t): (t, name) for t in tensors(own)}
        self._suspects |= found
        if not found:  # a plain number or truth value is used already
            self._frames[-1].differing.append(name)
        return type(out)((out[0], own)) if chosen else own

    def _use(self, given: Any) -> None:
        """Notes which decisions of the first run, in place of other ones, make a difference."""
        used = [self._suspects.get(id(t)) for t in tensors(given)]
        self._frames[-1].differing += [found[1] for found in used if found]

    def _settle(self, frame: _Frame, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Ends a branch at the first module around it whose outputs are activations only."""
        if not self._in_reference:
            if not frame.branched:
                return None
            if not _only_activations(output):
                self._frames[-1].branched = True
                return None
            remainder = formulas.Remainder(frame.name)
            places = [i for i, part in enumerate(_parts(output)) if carries(part)]
            self._remainders[frame.number] = remainder, places
            watched = iter(remainder.watch([_parts(output)[i] for i in places]))
            return self._explain(swapped(output, lambda t: next(watched) if carries(t) else t))
        if not frame.differing:
            return None
        if frame.number not in self._remainders:
            self._frames[-1].differing += frame.differing
            return None
        if [a._version for a in args if isinstance(a, Tensor)] != frame.versions:
            raise ValueError(_OVERWRITES.format(frame.name))
        given = list(tensors((args, kwargs)))
        versions = [t._version for t in given]
        if not _only_tensors((args, kwargs)):
            raise ValueError(
                "a module that branches must be given tensors and plain values under rules that "
                f"compare two runs, for it is run twice; {frame.name!r} also gets an object that "
                "may keep state, such as a cache; call the model with use_cache=False"
            )
        with self.paused():
            real = module.forward(*args, **kwargs)
        if [t._version for t in given] != versions:
            raise ValueError(_OVERWRITES.format(frame.name))
        remainder, places = self._remainders[frame.number]
        jumps = [(_parts(real)[i], _parts(output)[i]) for i in places]
        if any(a.shape != b.shape for a, b in jumps):
            self._frames[-1].differing += frame.differing
            return None
        remainder.fill(frame.differing, jumps)
        return real

    # -- operations ------------------------------------------------------------------------------

    def _operation(self, call: Call) -> Any:
        if self._inside:
            return self._explain(call.plainly())
        handler = _HANDLERS.get(call.name)
        if call.name in REGISTERED:
            handler = Propagation._registered
        elif handler is None and call.name not in LINEAR:
            opened = None if call.func in self._opening else call.opened()
            if opened is not None:
                self._opening.append(call.func)
                try:
                    with self._mode:
                        return opened()
                finally:
                    self._opening.pop()
        frame = self._frames[-1]
        key = self._key = (frame.number, call.name, frame.counts[call.name])
        frame.counts[call.name] += 1
        if self._in_reference:
            return self._replay(key, handler, call)
        if handler is not None:
            self._performed[key] = _shapes(call)
        met = self._meets(call)
        if not call.carries():
            if met and _memory(call.args[:1]) & self._lent and call.out_of_place() is not None:
                raise UnknownOperationError(_NOT_IN_PLACE.format(call.name, self._where))
            out = self._begins(call, call.plainly())
            if met:
                self._branch(call.name, call.args[0] if out is None else out)
            return out
        self.must_have_seen((call.args, call.kwargs))
        if met and handler is None and call.out_of_place() is not None:
            handler = Propagation._without_rule
        if handler is not None and torch.is_grad_enabled():
            copy = call.out_of_place()
            out = self._explain(handler(self, copy or call))
            out = self._watched(key, met, out) if met and carries(out) else out
            if copy is not None:
                out = self._explain(call.args[0].copy_(out))
            return out
        if not torch.is_grad_enabled() and self._rules.needs_reference and call.overwrites():
            raise UnknownOperationError(_NOT_IN_PLACE.format(call.name, self._where))
        out = call.plainly()
        if not carries(out) and out is not None:
            self._branch(call.name, out)
            if self._rules.needs_reference:  # x.data: another tensor, the same memory
                self._lent |= _memory(out) & _memory((call.args, call.kwargs))
        else:
            self._must_be_linear(call)
        self._explain(call.args[:1] if out is None else out)  # x[i] = y gives nothing back
        used = met and (carries(out) or (out is None and carries(call.args[:1])))
        return self._watched(key, met, out) if used else out

    def _replay(self, key: Key, handler: Any, call: Call) -> Any:
        """An operation in the reference run."""
        if handler is not None and key not in self._performed:
            raise ValueError(
                "the reference run must perform the operations of the first run; it does another "
                f"{call.name!r} in {self._where!r}; compare runs of the same code, or use rules of "
                "one run"
            )
        if self._suspects:
            self._use((call.args, call.kwargs))
        slot = self._slots.get(key)
        if slot is not None and _shapes(call) != self._performed[key]:
            raise ValueError(
                "the reference run must have the shapes of the first run; "
                f"{call.name!r} in {self._where!r} got {list(map(list, _shapes(call)))}, first "
                f"{list(map(list, self._performed[key]))}; compare inputs of one shape"
            )
        before = call if slot is None else call.out_of_place() or call
        if key in self._meetings:
            return self._met(key, slot, call)
        out = call.plainly()
        if slot is not None:
            slot.fill(*slot.keep(before, out))
        return self._led(key, call.name, out, call) if key in self._branches else out

    def _met(self, key: Key, slot: formulas.Reference | None, call: Call) -> Any:
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

    def _begins(self, call: Call, out: Any) -> Any:
        """A weight computed from parameters would look like an activation from here on."""
        if carries(out):
            if call.name not in SOURCES:
                raise ValueError(
                    f"weights must not require grad under rules; {call.name!r} computes one from "
                    "parameters that do; give the module as propagate(rules, root=module), which "
                    "freezes them meanwhile"
                )
            self._explain(out)
        return out

    def _record(self, name: str, keep: formulas.Keep | None = None) -> formulas.Reference:
        """A slot for what the reference run will have at this call: `keep(call, result)`."""
        slot = formulas.Reference(name, keep or (lambda call, out: ()))
        if self._rules.needs_reference:
            self._slots[self._key] = slot
        return slot

    # Each handler gives one kind of operation its rule, in the run that will be differentiated.

    def _linear(self, call: Call) -> Any:
        self._count(call.name, "linear", "derivative")
        return call.plainly()

    def _without_rule(self, call: Call) -> Any:
        self._must_be_linear(call)
        return call.plainly()

    def _must_be_linear(self, call: Call) -> None:
        if call.name in LINEAR:
            self._count(call.name, "linear", "derivative")
        else:
            self._refuse(call.name, "opaque" if call.name in FUSED else "unknown")

    def _random(self, call: Call) -> Any:
        given = (*call.args[1:], *([None] * 2))
        p, training = call.kwargs.get("p", given[0]), call.kwargs.get("training", given[1])
        if p != 0 and training is not False:
            raise ValueError(
                f"a module must run in eval mode under rules; {call.name!r} in {self._where!r} "
                "drops entries at random; call model.eval()"
            )
        return self._linear(call)

    def _batch_norm(self, call: Call) -> Any:
        training = call.kwargs.get("training", call.args[5] if len(call.args) > 5 else False)
        if training:
            raise ValueError(
                f"a module must run in eval mode under rules; {call.name!r} in {self._where!r} "
                "mixes the rows of a batch; call model.eval()"
            )
        if carries(call.args[1:]) or carries(call.kwargs):
            self._refuse(f"{call.name} with dependent weights", "unknown")
        return self._linear(call)

    def _registered(self, call: Call) -> Any:
        rule = REGISTERED[call.name][-1]
        if rule == "linear":
            return self._linear(call)
        if isinstance(rule, str):
            return self._elementwise(call, rule)
        if self.rules.only_derivatives:
            self._count(call.name, "registered", "derivative")
            return call.plainly()
        if carries(call.args[1:]) or carries(call.kwargs):
            raise UnknownOperationError(_ONE_OPERAND.format(call.name))
        self._count(call.name, "registered", _word(rule))
        return formulas.own(call.args[0], call.value(), rule)

    def _elementwise(self, call: Call, kind: str = "") -> Any:
        kind = kind or ("exponent" if call.name in EXPONENTS else "activation")
        rule = getattr(self.rules, kind)
        self._count(call.name, kind, rule)
        if rule == "derivative":
            return call.plainly()
        if carries(call.args[1:]) or carries(call.kwargs):
            raise UnknownOperationError(_ONE_OPERAND.format(call.name))
        slot = self._record(call.name, lambda other, out: (other.args[0], out))
        return self._elementwise_rule(
            call.args[0],
            call.value(),
            lambda t: cast(Tensor, call.on({0: t})),
            slot,
            rule,
            not any(True for _ in tensors((call.args[1:], call.kwargs))),
        )

    @staticmethod
    def _elementwise_rule(
        x: Tensor,
        y: Tensor,
        function: Callable[[Tensor], Tensor],
        slot: formulas.Reference,
        rule: str,
        uniform: bool,
    ) -> Tensor:
        if rule == "constant":
            return y.detach()
        if rule == "identity":
            return formulas.identity(x, y, function, uniform=uniform)
        return formulas.rescale(x, y, function, slot)

    def _extreme(self, call: Call) -> Any:
        """The winner takes all; between two runs, the two winners share."""
        if not self.rules.needs_reference:
            self._count(call.name, "selection", "derivative")
            return call.plainly()
        self._count(call.name, "selection", "secant")
        out: Any = call.value()
        places = [i for i, a in enumerate(call.args) if carries(a)]

        def values(*operands: Tensor) -> Tensor:
            found = call.on(dict(zip(places, operands, strict=True)))
            return cast(Tensor, found[0] if isinstance(found, tuple) else found)

        slot = self._record(call.name, lambda other, out: tuple(other.args[i] for i in places))
        value = out[0] if isinstance(out, tuple) else out
        y = formulas.extreme_secant(values, [call.args[i] for i in places], value, slot)
        if not isinstance(out, tuple):
            return y
        self._branch(call.name, out[1])
        return type(out)((y, out[1]))

    def _ordered(self, call: Call) -> Any:
        """Linear, as long as the same entries are chosen."""
        self._count(call.name, "selection", "derivative")
        out = call.plainly()
        if isinstance(out, tuple):
            self._branch(call.name, out[1])
        elif self.rules.needs_reference:
            self._refuse(f"{call.name} without an axis", "unknown")
        return out

    def _statistic(self, call: Call, formula: str = "") -> Any:
        rule = self.rules.norm
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        y = call.value()
        if rule == "constant":
            return y
        slot = self._record(call.name, lambda other, out: (out,))
        return formulas.statistic_secant(formula or call.name, call.args[0], y, slot)

    def _vector_norm(self, call: Call) -> Any:
        rule = self.rules.norm
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        y = call.value()
        if rule == "constant":
            return y
        names = ("x", "ord", "dim", "keepdim")
        given = dict(zip(names, call.args, strict=False)) | call.kwargs
        if given.get("ord", 2) != 2:
            self._refuse(f"{call.name} of order {given['ord']}", "unknown")
            return call.plainly()
        slot = self._record(call.name, lambda other, out: (other.args[0],))
        return formulas.vector_norm_secant(
            call.args[0], y, given.get("dim"), slot, keepdim=bool(given.get("keepdim", False))
        )

    def _power(self, call: Call) -> Any:
        exponent: Any = 2 if call.name == "square" else call.args[1]
        if not isinstance(exponent, Tensor) and exponent == 2:
            return self._product(call, lambda c: (c.args[0], c.args[0]))
        statistic = {-0.5: "rsqrt", 0.5: "sqrt", -1: "reciprocal"}
        if not isinstance(exponent, Tensor) and exponent in statistic:
            return self._statistic(call, statistic[exponent])
        return self._elementwise(call)

    def _multiply(self, call: Call) -> Any:
        return self._product(call, Call.operands)

    def _product(self, call: Call, factors: Callable[[Call], tuple[Any, Any]]) -> Any:
        a, b = factors(call)
        if not (carries(a) and carries(b)):
            return self._linear(call)
        rule = self.rules.gate
        self._count(call.name, "gate", rule)
        if rule == "derivative":
            return call.plainly()
        if rule == "half":
            return formulas.half(call.plainly())
        slot = self._record(call.name, lambda other, out: factors(other))
        return formulas.midpoint_gate(a, b, call.value(), slot)

    def _divide(self, call: Call) -> Any:
        a, b = call.operands()
        if call.kwargs.get("rounding_mode") is not None:
            self._refuse(f"{call.name} with rounding", "unknown")
            return call.plainly()
        if not carries(b):
            return self._linear(call)
        rule = self.rules.norm
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        if rule == "constant" and carries(a):
            return call.on({0 if call.name == "rdiv" else 1: b.detach()})
        y = call.value()
        if rule == "constant":
            return y
        a = a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=y.dtype, device=y.device)

        def keep(other: Call, out: Tensor) -> tuple[Tensor, Tensor]:
            one, two = other.operands()
            return torch.as_tensor(one), two

        return formulas.division_secant(a, b, y, self._record(call.name, keep))

    def _bilinear(self, call: Call) -> Any:
        """Products: of an activation and a weight, or of two activations."""
        dependent = [i for i, a in enumerate(call.args) if carries(a)]
        # an addend or a bias is no factor
        beside = {0} if call.name in SUMS_OF_PRODUCTS else {2} if call.has_bias else set()
        factors = [i for i in dependent if i not in beside]
        kind = "bilinear" if len(factors) > 1 else "linear"
        rule = str(getattr(self.rules, kind)) if factors else "derivative"
        if rule != "derivative" and (len(factors) < len(dependent) or carries(call.kwargs)):
            return self._write_out(call)
        self._count(call.name, kind, rule)
        if rule == "derivative":
            return call.plainly()
        if len(factors) > 2 or not all(isinstance(call.args[i], Tensor) for i in factors):
            raise UnknownOperationError(
                "a product of dependent tensors must be of two to be split; "
                f"{call.name!r} in {self._where!r} has {len(factors)}; write it as products of two"
            )
        if rule == "half":
            return formulas.half(call.plainly())
        if rule == "epsilon":
            return formulas.epsilon(call.plainly(), self.rules.epsilon)
        if rule == "gamma":
            operands = [i for i, a in enumerate(call.args) if isinstance(a, Tensor)]
            if len([i for i in operands if i not in beside]) != 2:
                raise UnknownOperationError(
                    f"the γ-rule needs a product of two operands; {call.name!r} in {self._where!r} "
                    "has another number; write it as products of two"
                )
            return self._gamma(call, factors[0])
        a, b = (call.args[i] for i in factors)
        slot = self._record(call.name, lambda other, out: tuple(other.args[i] for i in factors))
        if call.name in ("matmul", "bmm", "mm") and a.dim() >= 2 and b.dim() >= 2:
            return formulas.midpoint_matmul(a, b, call.value(), slot)

        def function(one: Tensor, two: Tensor) -> Tensor:
            return cast(Tensor, call.on(dict(zip(factors, (one, two), strict=True))))

        return formulas.midpoint_bilinear(function, (a, b), call.value(), slot)

    def _gamma(self, call: Call, place: int) -> Any:
        first, second = call.factors()
        weight = call.args[second if place == first else first]

        def function(x: Tensor, w: Tensor) -> Tensor:
            return call.product(x, w) if place == first else call.product(w, x)

        return formulas.gamma(function, call.args[place], weight, call.value(), self.rules.gamma)

    def _softmax(self, call: Call) -> Any:
        rule = self.rules.softmax
        self._count(call.name, "softmax", rule)
        if rule == "derivative":
            return call.plainly()
        y = call.value()
        if rule == "constant":
            return y

        x, dim = call.softmax_arguments()
        if rule == "softer":
            return formulas.softmax_softer(x, y, dim)
        slot = self._record(call.name, lambda other, out: (other.softmax_arguments()[0], out))
        return formulas.softmax_secant(x, y, dim, slot)

    def _log_softmax(self, call: Call) -> Any:
        """x - lse(x): the log of the sum is the only part that is not linear."""
        rule = self.rules.softmax
        self._count(call.name, "softmax", rule)
        if rule in ("derivative", "softer"):
            return call.plainly()

        x, dim = call.softmax_arguments()
        y = call.value()
        if rule == "constant":
            return formulas.attach(y, lambda g: (g,), (x,))
        slot = self._record(call.name, lambda other, out: (other.softmax_arguments()[0],))
        return formulas.log_softmax_secant(x, y, dim, slot)

    def _logsumexp(self, call: Call) -> Any:
        rule = self.rules.softmax
        self._count(call.name, "softmax", rule)
        if rule in ("derivative", "softer"):
            return call.plainly()
        y = call.value()
        if rule == "constant":
            return y
        given = dict(zip(("x", "dim", "keepdim"), call.args, strict=False)) | call.kwargs
        slot = self._record(call.name, lambda other, out: (other.args[0],))
        return formulas.logsumexp_secant(
            call.args[0], y, given["dim"], slot, keepdim=bool(given.get("keepdim", False))
        )

    def _layer_norm(self, call: Call) -> Any:
        x, shape, weight, bias, eps = call.norm_arguments()
        rule = self.rules.norm
        if rule != "derivative" and (carries(weight) or carries(bias)):
            return self._write_out(call)
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        y, dims, centre = call.value(), tuple(range(-len(shape), 0)), call.name == "layer_norm"
        if rule == "constant":
            return formulas.layer_norm_constant(x, y, dims, weight, eps, centre=centre)
        slot = self._record(call.name, lambda other, out: (other.args[0],))
        return formulas.layer_norm_secant(x, y, dims, weight, eps, slot, centre=centre)

    def _attention(self, call: Call) -> Any:
        if self.rules.softmax == self.rules.bilinear == "derivative":
            self._count(call.name, "softmax", "derivative")
            self._count(call.name, "bilinear", "derivative")
            return call.plainly()
        return self._write_out(call)

    def _write_out(self, call: Call) -> Any:
        """torch's own value, with the coefficients of the same from operations of one kind each."""
        if self.rules.only_derivatives:
            self._count(call.name, "composite", "derivative")
            return call.plainly()
        if call.name not in WRITTEN_OUT:
            raise UnknownOperationError(
                f"bias and addend of {call.name!r} in {self._where!r} must not carry relevance "
                "under rules for products; they do; write product and sum as two operations"
            )

        def written_out(of: Call) -> Tensor:
            with self._mode:
                return cast(Tensor, WRITTEN_OUT[of.name](*of.args, **of.kwargs))

        def keep(other: Call, out: Tensor) -> tuple[()]:
            written_out(other)  # its operations fill their own slots
            return ()

        self._record(call.name, keep)
        return formulas.graft(call.value(), written_out(call))


class _Mode(TorchFunctionMode):
    owner: Propagation | None = None
    """Set while a run lasts, so that no cycle keeps its tensors alive afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert self.owner is not None
        if name_of(func) in ATTRIBUTES:
            return func(*args, **(kwargs or {}))
        return self.owner._operation(Call.of(func, args, kwargs or {}))


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(WRITTEN_OUT, Propagation._write_out),
    **dict.fromkeys(ACTIVATIONS | EXPONENTS, Propagation._elementwise),
    **dict.fromkeys(STATISTICS, Propagation._statistic),
    **dict.fromkeys(EXTREMES, Propagation._extreme),
    **dict.fromkeys(ORDERED, Propagation._ordered),
    **dict.fromkeys(RANDOM, Propagation._random),
    **dict.fromkeys(["mul", "multiply"], Propagation._multiply),
    **dict.fromkeys(["div", "divide", "true_divide", "rdiv"], Propagation._divide),
    **dict.fromkeys(["pow", "square"], Propagation._power),
    **dict.fromkeys((*PRODUCTS, *SUMS_OF_PRODUCTS), Propagation._bilinear),
    **dict.fromkeys(["layer_norm", "rms_norm"], Propagation._layer_norm),
    "softmax": Propagation._softmax,
    "log_softmax": Propagation._log_softmax,
    "logsumexp": Propagation._logsumexp,
    "linalg_vector_norm": Propagation._vector_norm,
    "batch_norm": Propagation._batch_norm,
    "scaled_dot_product_attention": Propagation._attention,
}


def propagate(
    rules: Rules = RELP, *, strict: bool = True, root: nn.Module | None = None
) -> Propagation:
    """A context in which torch code propagates `rules` instead of derivatives.

    >>> x = torch.tensor([0.5, -1.0], requires_grad=True)
    >>> with propagate(RELP) as report:
    ...     y = torch.nn.functional.gelu(x).sum()
    >>> torch.autograd.grad(y, x)[0]        # gelu(x) / x, the Identity-rule
    tensor([0.6915, 0.1587])

    Values are torch's own. For rules that compare two runs (DEEPLIFT) run the other input inside
    `with report.reference():` before the backward. Relevance flows to activations and inputs;
    gradients of parameters mean nothing here, so give the module as `root`.

    Args:
        rules: which rule each kind of operation gets.
        strict: an operation that no rule knows is an error; else its derivative is used, as it
            is by rules that are derivatives throughout.
        root: the module that is run. Its parameters do not require grad inside the block (the
            backward is much cheaper so), and its names for its parts appear in the report.

    Raises:
        UnknownOperationError: inside the block, at an operation that no rule knows.
        ValueError: rules for some modules (`Rules.at`) fit none, or met no operation.
    """
    if not isinstance(rules, Rules):
        raise TypeError(
            f"`rules` must be a Rules value such as relp.RELP; got {type(rules).__name__}; "
            "turn a name into rules with relp.preset(name)"
        )
    return Propagation(rules, strict=strict, root=root)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` requires grad inside; afterwards each does as before."""
    whole = getattr(module, "original_model", module)  # a bridge does not list all parameters
    parameters = {*module.parameters(), *whole.parameters()}
    with _LOCK:
        # what another thread has frozen must stay so until the last of us is done
        wanted = [p for p in parameters if p.requires_grad or p in _FROZEN]
        _FROZEN.update(wanted)
        for p in wanted:
            p.requires_grad_(False)
    try:
        yield
    finally:
        with _LOCK:
            _FROZEN.subtract(wanted)
            for p in wanted:
                if not _FROZEN[p]:
                    del _FROZEN[p]
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


def coverage(
    module: nn.Module, *inputs: Any, rules: Rules = RELP, strict: bool = False, **kwargs: Any
) -> pd.DataFrame:
    """Which operations of `module(*inputs)` carry relevance, and the rule that each gets.

    >>> coverage(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), torch.ones(1, 3))
      operation        kind        rule module  count
    0      ReLU  activation    identity      1      1
    1    linear      linear  derivative      0      1
    >>> coverage(model, task.clean)

    Floating-point inputs carry relevance; so do the outputs of embeddings, for token inputs.
    Columns: operation, kind, rule, module, count. Kind `unknown` is what no rule knows, kind
    `opaque` what hides its operations; both have their derivative.

    Raises:
        UnknownOperationError: with `strict=True`, at an operation that no rule knows.
        ValueError: nothing in the call carried relevance.
    """

    def carrying(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().requires_grad_()
        return value

    here = threading.get_ident()

    def embedded(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if output.requires_grad or threading.get_ident() != here:
            return output
        return output.requires_grad_()

    report = propagate(rules, strict=strict, root=module)
    with ExitStack() as stack:
        # a bridge does not list all modules of the model that it wraps
        for part in getattr(module, "original_model", module).modules():
            if isinstance(part, nn.Embedding):
                stack.callback(part.register_forward_hook(embedded).remove)
        with report:
            out = module(*map(carrying, inputs), **{k: carrying(v) for k, v in kwargs.items()})
            report.must_have_seen(out)
    frame = report.to_dataframe()
    if frame.empty:
        raise ValueError(
            f"an input of {type(module).__name__} must carry relevance; none of its operations "
            "depended on the inputs; pass floating-point tensors or token ids of an embedding"
        )
    return frame


_plain_torch = torch._C.DisableTorchFunction
"""Our own arithmetic is no operation of the model: inside, the mode sees nothing."""

_nodes_so_far: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""How many nodes this thread has made: the number of its next one."""

_LOCK = threading.RLock()
_FROZEN: Counter[Tensor] = Counter()
"""Parameters that do not require grad for the time being, and how many blocks want it so."""


# -- reading modules and results -------------------------------------------------------------------

_VIEWS = (
    "AsStrided", "View", "UnsafeView", "Slice", "Select", "Narrow", "Transpose", "Permute",
    "Expand", "Squeeze", "Unsqueeze", "Split", "Unbind", "Diagonal", "Alias", "T",
    "SplitWithSizes", "ViewAs", "Swapaxes", "Unfold",
)  # fmt: skip
_OVERWRITES = (
    "a module that branches must leave its inputs as they are under rules that compare two runs; "
    "{!r} overwrites one; use rules of one run, such as RELP"
)
_NOT_IN_PLACE = (
    "an activation must not be overwritten without gradients (in no_grad, by .data or .detach()) "
    "under rules that compare two runs; {!r} in {!r} does; write y = f(x)"
)
_ONE_OPERAND = (
    "an elementwise operation must depend on the input by one operand; {!r} does by several; write "
    "it as products and differences"
)
_VALUES = frozenset("item tolist bool int float index equal allclose is_nonzero contains".split())


def _kind_of(node: Any) -> str:
    """`SelectBackward0` -> `Select`."""
    return re.sub(r"Backward\d*$", "", type(node).__name__)


def _as_one(module: nn.Module) -> str | Formula | None:
    """The kind of a module that counts as one operation; None for the others."""
    if REGISTERED:
        for kind in type(module).__mro__:
            if kind in REGISTERED:
                return REGISTERED[kind][-1]
    return "activation" if is_activation(module) else None


def _word(rule: str | Formula) -> str:
    return rule if isinstance(rule, str) else "formula"


def _only_activations(output: Any) -> bool:
    """True if an output is floating-point tensors, one of which carries relevance."""
    parts = _parts(output)
    floats = all(p is None or (isinstance(p, Tensor) and p.is_floating_point()) for p in parts)
    return floats and carries(parts)


def _parts(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _copied(t: Tensor) -> Tensor:
    return t.detach().clone()


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
