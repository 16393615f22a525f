"""Runs any torch code under a `Rules`, operation by operation, and reports what it met.

While `propagate` is active every torch operation passes through a `TorchFunctionMode`. Operations
on tensors that do not require grad are none of our business; a linear operation propagates its
derivative; the others are given to the handler of their kind. An operation that no rule knows is an
error, and so is a result that no operation explains (a custom autograd function, TorchScript).
Forward values are torch's own, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from relp.operations import Entry, name_of, registered
from relp.propagation.calls import Call, carries
from relp.propagation.frames import Frame, Frames, Key, Unit, frozen
from relp.propagation.handlers import (
    HANDLERS,
    Handler,
    Here,
    begin_unit,
    end_unit,
    must_be_linear,
    own_rule,
    without_rule,
)
from relp.propagation.kinds import ATTRIBUTES, LINEAR, SOURCES, UnknownOperationError, is_activation
from relp.propagation.tally import Tally, must_have_attached
from relp.propagation.two_runs import TwoRuns, not_in_place
from relp.propagation.witness import Witness
from relp.rulebook import RELP, Rules

__all__ = ["Propagation", "coverage", "propagate"]


class Propagation:
    """A run of torch code under some rules, and afterwards the report of what it met.

    Made by `propagate`. Not reusable: one `with` block for the differentiated run, then, for rules
    that compare two runs, one `with report.reference():` for the other.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        strict: bool = True,
        root: nn.Module | None = None,
        part: bool = False,
    ) -> None:
        self._rules = rules
        self._root = root
        # of a run: whoever runs the parts looks at the end at what they have met together
        self._part = part
        self._own = dict(rules.operations)
        self._frames = Frames(root)
        self._witness = Witness()
        self._runs = TwoRuns(self._frames, compares=rules.needs_reference)
        self._tally = Tally(rules, strict=strict)
        self._thread = 0
        self._opening: list[Any] = []
        # > 0 inside an activation module or a pause: operations are not looked at
        self._inside = 0
        self._mode = _Mode()
        self._stack: ExitStack | None = None

    @property
    def rules(self) -> Rules:
        """The rules that hold where the run is now."""
        rules = self._rules.within(self._frames.where) if self._rules.places else self._rules
        stack = self._frames.stack
        return rules.inside_norm() if stack and stack[-1].normalises else rules

    # -- as a context ----------------------------------------------------------------------------

    def __enter__(self) -> Propagation:
        if self._stack is not None:
            raise RuntimeError("a propagation can be entered once; call propagate(rules) again")
        self._tally.must_find_places(self._frames.names.values())
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
        if kind is None and not self._part:
            must_have_attached(self._rules, self._tally.attached)

    def _start(self, stack: ExitStack) -> Frame:
        """Begins to look, until the stack is closed; gives the frame around all modules."""

        def clear() -> None:
            self._witness.clear()
            self._runs.clear()
            self._frames.stack.clear()
            self._opening.clear()
            self._mode.owner = None
            self._inside = 0

        stack.callback(clear)
        self._thread = threading.get_ident()
        self._witness.start()
        with _LOCK:  # torch counts its handles without one
            # torch's annotation forgets that a hook may return new arguments
            before = register_module_forward_pre_hook(cast(Any, self._enter_module))
            stack.callback(before.remove)
            # (always: a module may raise, and the model go on)
            after = register_module_forward_hook(
                cast(Any, self._leave_module), with_kwargs=True, always_call=True
            )
            stack.callback(after.remove)
        bottom = self._frames.start()
        self._mode.owner = self
        stack.enter_context(self._mode)
        return bottom

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Runs the same code on the other input, to be compared with; without gradients.

        A module in which the two runs branch differently is run twice: it must not keep state or
        overwrite its inputs.

        Raises:
            ValueError: the run performs other operations than the first did, or takes another
                branch outside of any module.
        """
        with self._runs.reference():
            with ExitStack() as stack, torch.no_grad():
                bottom = self._start(stack)
                yield
            if bottom.differing:
                raise ValueError(
                    "rules that compare two runs need both to take the same branches; "
                    f"{bottom.differing[0]!r} chooses differently, and no module with "
                    "floating-point outputs stands around it; put the code into a module, or use "
                    "rules of one run"
                )

    @contextmanager
    def with_itself(self) -> Iterator[None]:
        """A backward inside compares the run with itself: what compares runs is the derivative.

        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> with propagate(DEEPLIFT) as report:
        ...     y = torch.tanh(x)
        >>> with report.with_itself():
        ...     torch.autograd.grad(y, x, retain_graph=True)      # 1 - tanh(1)²
        (tensor([0.4200]),)
        >>> with report.reference():
        ...     _ = torch.tanh(torch.tensor([3.0]))
        >>> torch.autograd.grad(y, x)                             # (tanh(3) - tanh(1)) / 2
        (tensor([0.1167]),)
        """
        self._runs.comparison.with_itself = True
        try:
            yield
        finally:
            self._runs.comparison.with_itself = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Code inside is plain torch again, with its own derivatives."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    # -- the report ------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the rules, with what the run used of `register`: `RELP + lgamma=activation`.

        Complete after the run; what `Rules.with_operation` added is part of the rules' own name.
        """
        return self._tally.name

    @property
    def attached(self) -> frozenset[tuple[str, str]]:
        """Pattern and kind of the rules for some modules that met an operation there."""
        return self._tally.attached

    def to_dataframe(self) -> pd.DataFrame:
        """Every operation that carried relevance: operation, kind, rule, module path, count."""
        return self._tally.to_dataframe()

    def remainder(self) -> pd.DataFrame:
        """What coefficients cannot explain, because the two runs take different branches.

        Columns: module, operation (which chose differently), remainder (in units of the result
        that was differentiated, summed over the batch). Σ Δ·c over a cut of the network plus
        the remainders of the modules after it is the difference of the result, exactly. Empty if
        both runs take the same branches. Call it after the backward.
        """
        found = self._runs.remainders
        rows = [(r.module, ", ".join(r.operations), r.total) for r in found if r.total]
        return pd.DataFrame(rows, columns=["module", "operation", "remainder"])

    def _repr_html_(self) -> str:
        return str(self.to_dataframe().to_html(index=False))

    def must_have_seen(self, output: Any) -> None:
        """Makes sure that nothing between the last operation and `output` went past the rules.

        Raises:
            UnknownOperationError: something did, and the rules are not all derivatives.
        """
        with _plain_torch():
            for name in self._witness.unexplained(output):
                self._tally.refuse(self._frames.where, name, "opaque")

    def _here(self, key: Key) -> Here:
        where, tally, runs = self._frames.where, self._tally, self._runs
        count, refuse = partial(tally.count, where), partial(tally.refuse, where)
        return Here(key, where, self.rules, count, refuse, runs.keep, runs.branch, self._seen)

    def _seen(self, code: Callable[[], Any]) -> Any:
        """Runs code from within a handler, operation by operation."""
        with self._mode:
            return code()

    def _registered(self, keys: Iterable[Any]) -> tuple[Entry | None, bool]:
        """A rule of one's own for the first of these that has one; True if all rules have it."""
        if self._own:
            for key in keys:
                if key in self._own:
                    return (key, self._own[key]), False
        return registered(keys), True

    # -- modules ---------------------------------------------------------------------------------

    # (torch calls these for every module of the process; other threads are none of our business)

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != self._thread:
            return None
        with _plain_torch():
            frame = self._frames.enter(module, args, looked_at=not self._inside)
            found, everywhere = self._registered(type(module).__mro__)
            if found is None and not is_activation(module):
                return None
            rule = "activation" if found is None else found[1]
            frame.unit = Unit(rule, found if everywhere else None, args=args)
            self._inside += 1
            return self._enter_unit(module, frame) if self._inside == 1 else None

    def _enter_unit(self, module: nn.Module, frame: Frame) -> tuple[Any, ...] | None:
        """A module that counts as one operation begins."""
        unit = cast(Unit, frame.unit)
        key = (frame.number, type(module).__name__, -1)
        unit.x = unit.args[0] if unit.args and isinstance(unit.args[0], Tensor) else None
        if not self._runs.repeating:
            self.must_have_seen(unit.args)
            return begin_unit(module, unit, self._here(key))
        unit.slot = self._runs.slot(key)
        if unit.slot is not None and getattr(module, "inplace", False):
            unit.x = cast(Tensor, unit.x).clone()
        return None

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        with _plain_torch():
            frame, replaced = self._frames.top, None
            self._inside -= frame.unit is not None
            # if it raised, torch calls without the keywords, and the model may go on
            looked_at = len(rest) == 2 and not self._inside
            try:
                if looked_at and frame.unit is not None:
                    replaced = self._leave_unit(module, frame, (args, rest[0]), rest[1])
                elif looked_at and not self._runs.repeating:
                    self.must_have_seen(rest[1])
            finally:
                self._frames.stack.pop()
            if not looked_at or replaced is not None:
                return replaced
            if self._runs.repeating:
                return self._runs.settle(frame, module, (args, rest[0]), rest[1], self.paused)
            return self._witness.explain(self._runs.end_branch(frame, rest[1]))

    def _leave_unit(
        self, module: nn.Module, frame: Frame, given: tuple[tuple[Any, ...], Any], output: Any
    ) -> Any:
        """A module that counts as one operation ends: its result in place of its own, if any."""
        unit, name = cast(Unit, frame.unit), type(module).__name__
        if unit.handed is not None and not (given[0] and given[0][0] is unit.handed):
            raise UnknownOperationError(
                "a module that counts as one operation must be run on the input it is given; a "
                f"pre-hook of {name} in {frame.name!r} replaces it; hook the module before it"
            )
        key = (frame.number, name, -1)
        if self._runs.repeating:
            self._runs.use(given)
            if unit.slot is not None:
                y = output.clone() if getattr(module, "inplace", False) else output
                unit.slot.fill(cast(Tensor, unit.x), y)
            led = self._runs.led(key, name, output)
            return None if led is output else led
        carried = unit.handed is not None or carries(output)
        if not (carried or carries(given) or self._runs.follows(given)):
            return None
        if unit.registration is not None:
            self._tally.use(unit.registration)
        if not carried:  # of a detached activation, or inside a no_grad
            return self._runs.branch(key, name, output)
        replaced = end_unit(module, unit, given, output, self._here(key))
        self._witness.explain(output if replaced is None else replaced)
        return replaced

    # -- operations ------------------------------------------------------------------------------

    def operation(self, call: Call) -> Any:
        """What the mode does with each call of torch."""
        if self._inside:
            return self._witness.explain(call.plainly())
        handler, registration = self._handler(call.name)
        if handler is None and call.name not in LINEAR and call.func not in self._opening:
            opened = call.opened()
            if opened is not None:
                return self._open(call.func, opened)
        key = self._frames.place(call.name)
        if self._runs.repeating:
            return self._runs.replay(key, call, ruled=handler is not None)
        if handler is not None:
            self._runs.performs(key, call)
        met = self._runs.meets(call)
        if not call.carries():
            return self._begin(key, call, met)
        self.must_have_seen((call.args, call.kwargs) if call.kwargs else call.args)
        if met and handler is None and call.out_of_place() is not None:
            handler = without_rule
        if handler is None or not torch.is_grad_enabled():
            return self._follow(key, call, met)
        if registration is not None:
            self._tally.use(registration)
        return self._handle(handler, key, call, met)

    def _handler(self, name: str) -> tuple[Handler | None, Entry | None]:
        """Who knows the operation, and the registration by which they do."""
        found, everywhere = self._registered((name,))
        if found is None:
            return HANDLERS.get(name), None
        return partial(own_rule, rule=found[1]), found if everywhere else None

    def _open(self, func: Any, opened: Callable[[], Any]) -> Any:
        """Looks at a function that torch writes in Python from within."""
        self._opening.append(func)
        try:
            return self._seen(opened)
        finally:
            self._opening.pop()

    def _handle(self, handler: Handler, key: Key, call: Call, met: dict[int, Tensor]) -> Any:
        """An operation that carries relevance, and that its kind's handler gives its rule."""
        explain = self._witness.explain
        copy = call.out_of_place()
        out = explain(handler(copy or call, self._here(key)))
        if met and carries(out):
            out = explain(self._runs.watched(key, met, out))
        if copy is not None:
            out = explain(call.args[0].copy_(out))
        return out

    def _follow(self, key: Key, call: Call, met: dict[int, Tensor]) -> Any:
        """An operation that gets relevance and no rule: it is linear, or gives none on."""
        compares = self._runs.compares
        if compares and not torch.is_grad_enabled() and call.overwrites():
            raise not_in_place(call.name, self._frames.where)
        out = call.plainly()
        if out is not None and not carries(out):
            self._runs.branch(key, call.name, out)
            self._runs.lend(out, (call.args, call.kwargs))
        elif call.name in LINEAR:
            self._tally.count(self._frames.where, call.name, "linear", "derivative")
        else:
            must_be_linear(call, self._here(key))
        result = call.args[:1] if out is None else out  # x[i] = y gives nothing back
        self._witness.explain(result)
        if met and carries(result):
            return self._witness.explain(self._runs.watched(key, met, out))
        return out

    def _begin(self, key: Key, call: Call, met: dict[int, Tensor]) -> Any:
        """An operation that no relevance goes into.

        A weight computed from parameters would look like an activation from here on.
        """
        if met and self._runs.is_lent(call.args[:1]) and call.out_of_place() is not None:
            raise not_in_place(call.name, self._frames.where)
        out = call.plainly()
        if carries(out):
            if call.name not in SOURCES:
                raise ValueError(
                    f"weights must not require grad under rules; {call.name!r} computes one from "
                    "parameters that do; give the module as propagate(rules, root=module), which "
                    "freezes them meanwhile"
                )
            self._witness.explain(out)
        if met:
            self._runs.branch(key, call.name, call.args[0] if out is None else out)
        return out


class _Mode(TorchFunctionMode):
    owner: Propagation | None = None
    """Set while a run lasts, so that no cycle keeps its tensors alive afterwards."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert self.owner is not None
        if name_of(func) in ATTRIBUTES:
            return func(*args, **(kwargs or {}))
        return self.owner.operation(Call.of(func, args, kwargs or {}))


_LOCK = threading.Lock()
_plain_torch = torch._C.DisableTorchFunction
"""Our own arithmetic is no operation of the model: inside, the mode sees nothing."""


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
