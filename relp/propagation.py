"""Runs any torch code under a `Rules`, operation by operation, and reports what it met.

While `propagate` is active every torch operation passes through a `TorchFunctionMode`. Operations
on tensors that do not require grad are none of our business; a linear operation propagates its
derivative; the others are given to the rule of their kind (`relp.rules`). An operation that no
rule knows is an error. Forward values are torch's own, bit for bit.

Activation *modules* count as one operation: written out in Python (`NewGELUActivation`) their
inner products would otherwise meet the gate's rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from relp import rules as formulas
from relp.rulebook import RELP, Rules

__all__ = ["Propagation", "UnknownOperationError", "coverage", "propagate"]

LINEAR = frozenset(
    """
    __get__ __getitem__ __setitem__ add as_strided as_tensor atleast_1d
    atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d bfloat16 block_diag broadcast_tensors broadcast_to cat chunk clone
    concat concatenate constant_pad_nd contiguous copy cpu cuda cumsum diag diag_embed diagonal
    diff double dropout dstack embedding expand expand_as feature_dropout flatten flip fliplr float
    fold from_numpy gather half hsplit hstack index_add index_copy index_fill index_put
    index_select interpolate masked_fill masked_scatter masked_select mean movedim
    moveaxis narrow nan_to_num neg negative pad permute pixel_shuffle pixel_unshuffle positive
    ravel repeat repeat_interleave requires_grad reshape reshape_as retain_grad roll rot90 rsub
    scatter scatter_add select slice_scatter split split_with_sizes squeeze stack sub
    subtract sum swapaxes swapdims t take take_along_dim tensor_split tile to trace transpose tril
    triu type type_as unbind unflatten unfold unsqueeze upsample view view_as vsplit
    vstack where zero
    """.split()
)
"""Linear in everything that may carry relevance: the derivative is the 0-rule."""

SOURCES = frozenset(
    ["embedding", "tensor", "requires_grad", "zeros", "ones", "rand", "randn", "full"]
)
"""Where relevance may begin: what gives a tensor that requires grad out of none that carries."""

ACTIVATIONS = frozenset(
    """
    gelu silu relu relu6 leaky_relu elu selu celu tanh sigmoid logsigmoid hardswish hardsigmoid
    hardtanh mish softsign softshrink hardshrink tanhshrink prelu rrelu threshold erf abs clamp
    clamp_min clamp_max sin
    """.split()
)
EXPONENTS = frozenset(["exp", "exp2", "expm1", "softplus"])
STATISTICS = frozenset(["rsqrt", "sqrt", "reciprocal"])
PRODUCTS = frozenset(
    "matmul bmm mm mv dot grouped_mm baddbmm addmm addbmm einsum linear bilinear conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
_BY_POSITION = {
    # operands that callers like to name, in their order
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "addmm": ("mat1", "mat2"),
}
SELECTIONS = frozenset(["max", "min", "amax", "amin", "topk", "sort"])
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
# (Softplus is elementwise, but its rule is that of an exponent, as for the function)
_NOT_ELEMENTWISE = (nn.Softplus, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)


class UnknownOperationError(ValueError):
    """An operation carries relevance and no rule says how."""


class Propagation:
    """A run of torch code under some rules, and afterwards the report of what it met.

    Made by `propagate`. Not reusable: one `with` block for the differentiated run, then, for rules
    that compare two runs, one `with report.reference():` for the other.
    """

    def __init__(self, rules: Rules, *, strict: bool = True, root: nn.Module | None = None) -> None:
        self.rules = rules
        self.strict = strict
        self._root = root
        self._names = {id(m): n for n, m in root.named_modules()} if root is not None else {}
        self._path: list[str] = []
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        self._slots: dict[int, formulas.Reference] = {}
        self._calls = 0
        self._first_calls = 0
        self._in_reference = False
        # activation modules whose derivative is wanted and which bring their own
        self._trusted: set[Any] = set()
        # > 0 inside an activation module, whose inner operations are not looked at
        self._inside = 0
        self._modules: list[tuple[Tensor | None, formulas.Reference | None]] = []
        self._mode = _Mode(self)
        self._stack: ExitStack | None = None

    # -- as a context ----------------------------------------------------------------------------

    def __enter__(self) -> Propagation:
        if self._stack is not None:
            raise RuntimeError("a propagation can be entered once; call propagate(rules) again")
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
        self._first_calls = self._calls
        self._path.clear()
        self._modules.clear()
        self._inside = 0

    def _start(self, stack: ExitStack) -> None:
        self._calls = 0
        # torch's annotation forgets that a hook may return new arguments
        before = register_module_forward_pre_hook(cast(Any, self._enter_module))
        stack.callback(before.remove)
        after = register_module_forward_hook(self._leave_module)
        stack.callback(after.remove)
        stack.enter_context(self._mode)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Runs the same code on the other input, to be compared with; without gradients.

        Raises:
            ValueError: the run takes another path through the code than the first did.
        """
        self._in_reference = True
        try:
            with ExitStack() as stack, torch.no_grad():
                self._start(stack)
                yield
            if self._slots and self._calls > self._first_calls:
                raise ValueError(
                    "the reference run must perform the operations of the first run; it did "
                    f"{self._calls - self._first_calls} more; compare runs that take the same "
                    "branches"
                )
            unseen = [s for s in self._slots.values() if not s.filled]
            if unseen:
                raise ValueError(
                    "the reference run must perform the operations of the first run; "
                    f"{len(unseen)} were missing, the first a {unseen[0].name!r}; "
                    "compare runs that take the same branches, or use rules of one run"
                )
        finally:
            self._in_reference = False
            self._path.clear()
            self._modules.clear()
            self._inside = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Code inside is plain torch again, with its own derivatives."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def must_have_seen(self, output: Tensor) -> None:
        """Makes sure that no custom `autograd.Function` of the model went past the rules.

        torch does not tell a mode about those; they show in the graph of `output`.

        Raises:
            UnknownOperationError: there is one, and the rules are not all derivatives.
        """
        if self.rules.only_derivatives or not self.strict:
            return
        seen: set[Any] = set()
        queue = [output.grad_fn]
        while queue:
            node = queue.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name = type(node).__name__.removesuffix("Backward")
            known = name == formulas.FUNCTION or node in self._trusted
            if isinstance(node, BackwardCFunction) and not known:
                raise UnknownOperationError(
                    "every operation that carries relevance must have a rule; the custom "
                    f"autograd function {name!r} hides its operations; run the model's plain "
                    "implementation, or make it a module named after its activation"
                )
            queue += [parent for parent, _ in node.next_functions]

    # -- the report ------------------------------------------------------------------------------

    def to_dataframe(self) -> pd.DataFrame:
        """Every operation that carried relevance: operation, kind, rule, module path, count."""
        rows = [(*key, count) for key, count in self._counts.items()]
        frame = pd.DataFrame(rows, columns=["operation", "kind", "rule", "module", "count"])
        return frame.sort_values(["kind", "operation", "module"], ignore_index=True)

    def _repr_html_(self) -> str:
        return str(self.to_dataframe().to_html(index=False))

    # -- modules ---------------------------------------------------------------------------------

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._path.append(self._names.get(id(module)) or type(module).__name__)
        if not _is_activation(module):
            return None
        self._inside += 1
        x, slot = None, None
        if self._inside == 1 and self.rules.activation != "derivative":
            self._calls += 1
            x = args[0] if args and isinstance(args[0], Tensor) else None
            if self._in_reference:
                slot = self._recorded(type(module).__name__)
            elif torch.is_grad_enabled() and _carries(x):
                slot = self._record(type(module).__name__)
        self._modules.append((x, slot))
        if slot is None or self._in_reference:
            return None
        assert x is not None
        # without a graph inside: the rule is attached to the module's result
        return (x.detach(), *args[1:])

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        name = type(module).__name__
        replaced = None
        if _is_activation(module):
            self._inside -= 1
            x, slot = self._modules.pop()
            if self._in_reference:
                if slot is not None:
                    slot.fill(cast(Tensor, x), output)
            elif slot is not None:
                self._count(name, "activation", self.rules.activation)
                replaced = self._activation(cast(Tensor, x), output, _fused(module), slot)
            elif not self._inside and _carries(output):
                if self.rules.activation != "derivative":
                    raise UnknownOperationError(
                        "an activation module must get its input as first positional argument for "
                        f"the rule {self.rules.activation!r}; {name} in {self._path[-1]!r} did "
                        "not; call it as module(x)"
                    )
                self._count(name, "activation", "derivative")
                self._trusted.add(output.grad_fn)
        self._path.pop()
        return replaced

    # -- operations ------------------------------------------------------------------------------

    def _operation(self, call: _Call) -> Any:
        handler = _HANDLERS.get(call.name)
        if handler is None or self._inside:
            out = call.plainly()
            if self._inside or self._in_reference or not _carries(out):
                return out
            if not call.carries():
                return out if call.name in SOURCES else self._weights_only(call, out)
            if call.name in LINEAR:
                self._count(call.name, "linear", "derivative")
            else:
                self._unknown(call.name)
            return out
        self._calls += 1
        if self._in_reference:
            out = call.plainly()
            slot = self._recorded(call.name)
            if slot is not None:
                slot.fill(*slot.keep(call, out))
            return out
        if not torch.is_grad_enabled():
            return call.plainly()
        if not call.carries():
            return self._weights_only(call, call.plainly())
        return handler(self, call)

    def _weights_only(self, call: _Call, out: Any) -> Any:
        """A weight computed from parameters would look like an activation from here on."""
        if _carries(out):
            raise ValueError(
                f"weights must not require grad under rules; {call.name!r} computes one from "
                "parameters that do; give the module as propagate(rules, root=module), which "
                "freezes them meanwhile"
            )
        return out

    def _unknown(self, name: str) -> None:
        where = self._path[-1] if self._path else "the code under propagate"
        if self.strict:
            raise UnknownOperationError(
                f"every operation that carries relevance must have a rule; {name!r} in {where!r} "
                "has none; pass strict=False to let its derivative through and see it in the report"
            )
        self._count(name, "unknown", "derivative")

    def _count(self, name: str, kind: str, rule: str) -> None:
        self._counts[name, kind, rule, self._path[-1] if self._path else ""] += 1

    def _record(self, name: str, keep: formulas.Keep | None = None) -> formulas.Reference:
        """A slot for what the reference run will have at this call: `keep(call, result)`."""
        slot = formulas.Reference(name, keep or (lambda call, out: ()))
        if self.rules.needs_reference:
            self._slots[self._calls] = slot
        return slot

    def _recorded(self, name: str) -> formulas.Reference | None:
        """The slot that the first run made at this call, if it did."""
        slot = self._slots.get(self._calls)
        if slot is not None and slot.name != name:
            raise ValueError(
                f"the reference run must perform the operations of the first run; where that did "
                f"{slot.name!r} it does {name!r}; compare runs that take the same branches"
            )
        return slot

    # Each handler gives one kind of operation its rule, in the run that will be differentiated.

    def _activation(
        self,
        x: Tensor,
        y: Tensor,
        function: Callable[[Tensor], Tensor],
        slot: formulas.Reference,
    ) -> Tensor:
        if self.rules.activation == "identity":
            return formulas.identity(x, y, function)
        return formulas.rescale(x, y, function, slot)

    def _elementwise(self, call: _Call) -> Any:
        kind = "exponent" if call.name in EXPONENTS else "activation"
        rule = getattr(self.rules, kind)
        self._count(call.name, kind, rule)
        if rule == "derivative":
            return call.plainly()
        if _carries(call.args[1:]) or _carries(call.kwargs):
            raise UnknownOperationError(
                f"an elementwise operation must depend on the input by one operand; {call.name!r} "
                "does by several; write it as products and differences"
            )
        y = call.value()
        if rule == "constant":
            return y

        def function(t: Tensor) -> Tensor:
            out: Tensor = call.func(t, *call.args[1:], **call.kwargs)
            return out

        if rule == "identity":
            return formulas.identity(call.args[0], y, function)
        slot = self._record(call.name, lambda other, out: (other.args[0], out))
        return formulas.rescale(call.args[0], y, function, slot)

    def _select(self, call: _Call) -> Any:
        """Linear, as long as the same entries are chosen: in two runs that must be so."""
        self._count(call.name, "selection", "derivative")
        own = call.plainly()

        def keep(other: _Call, out: Any) -> tuple[()]:
            if not torch.equal(_chosen(call, own), _chosen(other, out)):
                raise ValueError(
                    f"rules that compare two runs need both to take the same branches; "
                    f"{call.name!r} in {self._path[-1] if self._path else 'the code'!r} chooses "
                    "differently in the two; use rules of one run, such as RELP"
                )
            return ()

        self._record(call.name, keep)
        return own

    def _statistic(self, call: _Call, formula: str = "") -> Any:
        rule = self.rules.norm
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        y = call.value()
        if rule == "constant":
            return y
        slot = self._record(call.name, lambda other, out: (out,))
        return formulas.statistic_secant(formula or call.name, call.args[0], y, slot)

    def _power(self, call: _Call) -> Any:
        given = (*call.args[1:], call.kwargs.get("exponent"))
        exponent: Any = 2 if call.name == "square" else given[0]
        if not isinstance(exponent, Tensor) and exponent == 2:
            return self._product(call, lambda c: (c.args[0], c.args[0]))
        statistic = {-0.5: "rsqrt", 0.5: "sqrt", -1: "reciprocal"}
        if not isinstance(exponent, Tensor) and exponent in statistic:
            return self._statistic(call, statistic[exponent])
        return self._elementwise(call)

    def _multiply(self, call: _Call) -> Any:
        return self._product(call, _Call.operands)

    def _product(self, call: _Call, factors: Callable[[_Call], tuple[Any, Any]]) -> Any:
        a, b = factors(call)
        if not (_carries(a) and _carries(b)):
            self._count(call.name, "linear", "derivative")
            return call.plainly()
        rule = self.rules.gate
        self._count(call.name, "gate", rule)
        if rule == "derivative":
            return call.plainly()
        call.must_not_overwrite()
        if rule == "half":
            return formulas.half(call.plainly())
        slot = self._record(call.name, lambda other, out: factors(other))
        return formulas.midpoint_gate(a, b, call.value(), slot)

    def _divide(self, call: _Call) -> Any:
        a, b = call.operands()
        if call.kwargs.get("rounding_mode") is not None:
            self._unknown(f"{call.name} with rounding")
            return call.plainly()
        if not _carries(b):
            self._count(call.name, "linear", "derivative")
            return call.plainly()
        rule = self.rules.norm
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        if rule == "constant" and _carries(a):  # by the same function, which may work in place
            return call.func(a, b.detach(), *call.args[2:])
        y = call.value()
        if rule == "constant":
            return y
        a = a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=y.dtype, device=y.device)

        def keep(other: _Call, out: Tensor) -> tuple[Tensor, Tensor]:
            one, two = other.operands()
            return torch.as_tensor(one), two

        return formulas.division_secant(a, b, y, self._record(call.name, keep))

    def _bilinear(self, call: _Call) -> Any:
        dependent = [i for i, a in enumerate(call.args) if _carries(a)]
        added = call.name in ("baddbmm", "addmm", "addbmm") and dependent[:1] == [0]
        factors = dependent[1:] if added else dependent
        by_name = sum(_carries(v) for v in call.kwargs.values())
        if len(factors) + by_name < 2:
            self._count(call.name, "linear", "derivative")
            return call.plainly()
        rule = self.rules.bilinear
        self._count(call.name, "bilinear", rule)
        if rule == "derivative":
            return call.plainly()
        if (
            added
            or by_name
            or len(factors) > 2
            or not all(isinstance(call.args[i], Tensor) for i in factors)
        ):
            raise UnknownOperationError(
                "a product of dependent tensors must be of two, given by position, to be split; "
                f"{call.name!r} has {len(dependent) + by_name}; write it as products of two, with "
                "frozen weights"
            )
        call.must_not_overwrite()
        if rule == "half":
            return formulas.half(call.plainly())
        a, b = (call.args[i] for i in factors)
        slot = self._record(call.name, lambda other, out: tuple(other.args[i] for i in factors))
        if call.name in ("matmul", "bmm", "mm") and a.dim() >= 2 and b.dim() >= 2:
            return formulas.midpoint_matmul(a, b, call.value(), slot)

        def function(*operands: Tensor) -> Tensor:
            filled = list(call.args)
            for i, operand in zip(factors, operands, strict=True):
                filled[i] = operand
            out: Tensor = call.func(*filled, **call.kwargs)
            return out

        return formulas.midpoint_bilinear(function, (a, b), call.value(), slot)

    def _softmax(self, call: _Call) -> Any:
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

    def _log_softmax(self, call: _Call) -> Any:
        """x - lse(x): the log of the sum is the only part that is not linear."""
        rule = self.rules.softmax
        self._count(call.name, "softmax", rule)
        if rule in ("derivative", "softer"):
            return call.plainly()

        x, dim = call.softmax_arguments()
        y = call.value()
        if rule == "constant":
            return formulas.attach(y, lambda g: (g,), (x,))
        slot = self._record(call.name, lambda other, out: (other.softmax_arguments()[0], out))
        return formulas.log_softmax_secant(x, y, dim, slot)

    def _layer_norm(self, call: _Call) -> Any:
        x, shape, weight, bias, eps = call.norm_arguments()
        rule = self.rules.norm
        self._count(call.name, "norm", rule)
        if rule == "derivative":
            return call.plainly()
        if _carries(weight) or _carries(bias):
            raise UnknownOperationError(
                f"the weight and bias of {call.name!r} must not depend on the input under the rule "
                f"{rule!r}; they do; write the norm as a division and a product"
            )
        y, dims, centre = call.value(), tuple(range(-len(shape), 0)), call.name == "layer_norm"
        if rule == "constant":
            return formulas.layer_norm_constant(x, y, dims, weight, eps, centre=centre)
        slot = self._record(call.name, lambda other, out: (other.args[0],))
        return formulas.layer_norm_secant(x, y, dims, weight, eps, slot, centre=centre)

    def _attention(self, call: _Call) -> Any:
        """The fused kernel's value, with the coefficients of the same attention written out."""
        if self.rules.softmax == self.rules.bilinear == "derivative":
            self._count(call.name, "softmax", "derivative")
            self._count(call.name, "bilinear", "derivative")
            return call.plainly()

        def written_out(of: _Call) -> Tensor:
            with self._mode:
                return _written_out(*of.args, **of.kwargs)

        def keep(other: _Call, out: Tensor) -> tuple[()]:
            written_out(other)  # its operations fill their own slots
            return ()

        self._record(call.name, keep)
        return formulas.graft(call.value(), written_out(call))


@dataclass(frozen=True)
class _Call:
    """One torch operation as it was called, its first operand always by position."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        name = _name(func)
        if "input" in kwargs and name in _HANDLERS:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"), *args)
        for parameter in _BY_POSITION.get(name, ()):
            if parameter in kwargs:
                kwargs = dict(kwargs)
                args = (*args, kwargs.pop(parameter))
        if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        return cls(name, func, args, kwargs)

    def carries(self) -> bool:
        """True if relevance comes in."""
        return _carries(self.args) or _carries(self.kwargs)

    def plainly(self) -> Any:
        """torch's own result with torch's own derivative."""
        return self.func(*self.args, **self.kwargs)

    def value(self) -> Tensor:
        """torch's own result, without a graph."""
        self.must_not_overwrite()
        with torch.no_grad():
            out: Tensor = self.func(*self.args, **self.kwargs)
        return out

    def must_not_overwrite(self) -> None:
        """A rule needs the operation's input afterwards, and gives back another tensor.

        Raises:
            UnknownOperationError: the call works in place.
        """
        spelled = getattr(self.func, "__name__", "")
        in_place = (spelled.endswith("_") and not spelled.endswith("__")) or spelled[:3] == "__i"
        if in_place or self.kwargs.get("inplace"):
            raise UnknownOperationError(
                f"a rule needs the operation's input after it; {self.name!r} overwrites it in "
                "place; build the module with inplace=False, or write y = f(x)"
            )

    def operands(self) -> tuple[Any, Any]:
        """The two operands of an elementwise call, numerator first."""
        a, b = (*self.args, *(self.kwargs[k] for k in ("other",) if k in self.kwargs))[:2]
        return (b, a) if self.name == "rdiv" else (a, b)

    def softmax_arguments(self) -> tuple[Tensor, int]:
        """The scores, in the type that they are summed in, and the axis."""
        x: Tensor = self.args[0]
        dtype = self.kwargs.get("dtype")
        dim = self.kwargs["dim"] if "dim" in self.kwargs else self.args[1]
        return x if dtype is None else x.to(dtype), dim

    def norm_arguments(self) -> tuple[Any, ...]:
        """Input, normalised shape, weight, bias and eps of a layer or RMS norm."""
        names = ["input", "normalized_shape", "weight", "bias", "eps"]
        if self.name == "rms_norm":
            names.remove("bias")
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        x, shape, eps = given["input"], given["normalized_shape"], given.get("eps")
        if eps is None:
            eps = 1e-5 if self.name == "layer_norm" else torch.finfo(x.dtype).eps
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return x, shape, given.get("weight"), given.get("bias"), eps


class _Mode(TorchFunctionMode):
    def __init__(self, owner: Propagation) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._owner._operation(_Call.of(func, args, kwargs or {}))


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ACTIVATIONS | EXPONENTS, Propagation._elementwise),
    **dict.fromkeys(STATISTICS, Propagation._statistic),
    **dict.fromkeys(SELECTIONS, Propagation._select),
    **dict.fromkeys(["mul", "multiply"], Propagation._multiply),
    **dict.fromkeys(["div", "divide", "true_divide", "rdiv"], Propagation._divide),
    **dict.fromkeys(["pow", "square"], Propagation._power),
    **dict.fromkeys(PRODUCTS, Propagation._bilinear),
    "softmax": Propagation._softmax,
    "log_softmax": Propagation._log_softmax,
    **dict.fromkeys(["layer_norm", "rms_norm"], Propagation._layer_norm),
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
        strict: an operation that no rule knows is an error; else its derivative is used.
        root: the module that is run. Its parameters do not require grad inside the block (the
            backward is much cheaper so), and its names for its parts appear in the report.

    Raises:
        UnknownOperationError: inside the block, at an operation that no rule knows.
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
    wanted = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def coverage(
    module: nn.Module, *inputs: Any, rules: Rules = RELP, strict: bool = False, **kwargs: Any
) -> pd.DataFrame:
    """Which operations of `module(*inputs)` carry relevance, and the rule that each gets.

    Floating-point inputs carry relevance; so do the outputs of embeddings, for token inputs.
    Columns: operation, kind, rule, module, count; kind `unknown` is what no rule knows.

    Raises:
        UnknownOperationError: with `strict=True`, at an operation that no rule knows.
        ValueError: nothing in the call carried relevance.
    """

    def carries(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().requires_grad_()
        return value

    def embedded(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if not output.requires_grad else output

    report = propagate(rules, strict=strict, root=module)
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                stack.callback(part.register_forward_hook(embedded).remove)
        with report:
            module(*map(carries, inputs), **{k: carries(v) for k, v in kwargs.items()})
    frame = report.to_dataframe()
    if frame.empty:
        raise ValueError(
            f"an input of {type(module).__name__} must carry relevance; none of its operations "
            "depended on the inputs; pass floating-point tensors or token ids of an embedding"
        )
    return frame


# -- reading a call --------------------------------------------------------------------------------

_NAMES: dict[Any, str] = {}
_ACTIVATIONS_BY_CLASS: dict[type, bool] = {}


def _name(func: Any) -> str:
    """`torch.Tensor.__mul__`, `torch.mul`, `Tensor.mul_` -> `mul`."""
    name = _NAMES.get(func)
    if name is None:
        name = getattr(func, "__name__", repr(func))
        if name not in LINEAR:
            plain = name.strip("_")
            name = {"rmul": "mul", "imul": "mul", "radd": "add", "iadd": "add", "isub": "sub",
                    "truediv": "div", "itruediv": "div", "idiv": "div", "rtruediv": "rdiv",
                    "rdiv": "rdiv", "rpow": "rpow", "rmatmul": "rmatmul", "ipow": "pow",
                    }.get(plain, plain)  # fmt: skip
        _NAMES[func] = name
    return name


def _carries(value: Any) -> bool:
    """True if a tensor in `value` carries relevance: it requires grad and is not a parameter."""
    if isinstance(value, Tensor):
        return value.requires_grad and not isinstance(value, nn.Parameter)
    if isinstance(value, (tuple, list)):
        return any(_carries(v) for v in value)
    if isinstance(value, dict):
        return any(_carries(v) for v in value.values())
    return False


def _chosen(call: _Call, out: Any) -> Tensor:
    """Which entries a selection took: its indices, or where its input attains its result."""
    if isinstance(out, tuple):
        return cast(Tensor, out[1])
    x = call.args[0]
    if out.dim() == x.dim() or out.dim() == 0:
        return cast(Tensor, x == out)
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
    return cast(Tensor, x == out.unsqueeze(dim))


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    known = _ACTIVATIONS_BY_CLASS.get(kind)
    if known is None:
        # models that bring their own (`BloomGelu`) call it what it is and give it no weights
        own = kind.__name__.lower().endswith(("gelu", "silu", "relu", "swish"))
        known = (
            (kind.__module__ in _ACTIVATION_MODULES or own)
            and not issubclass(kind, (*_NOT_ELEMENTWISE, nn.MultiheadAttention))
            and not (own and next(module.children(), None) is not None)
        )
        _ACTIVATIONS_BY_CLASS[kind] = known
    return known


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same function as one torch operation where there is one: its derivative is cheaper."""
    if type(module).__name__ in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh"):
        return lambda t: F.gelu(t, approximate="tanh")
    forward: Callable[[Tensor], Tensor] = type(module).forward.__get__(module)
    return forward


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as its documentation writes it."""
    if dropout_p:
        raise ValueError(
            f"attention must run without dropout; got dropout_p={dropout_p}; call model.eval()"
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        n, m = scores.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value
