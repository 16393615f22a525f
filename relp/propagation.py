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
from types import TracebackType
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    "matmul bmm mm mv dot baddbmm addmm addbmm einsum linear bilinear conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
_NOT_ELEMENTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)


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
        self._in_reference = False
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
            unseen = [s for s in self._slots.values() if s._tensors is None]
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
        if self._inside > 1 or self.rules.activation == "derivative":
            self._modules.append((None, None))
            return None
        slot = self._slot(type(module).__name__)
        x = args[0] if args else None
        if slot is not None and self._in_reference:
            self._modules.append((x, slot))
            return None
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad):
            self._modules.append((None, None))
            return None
        self._modules.append((x, self._new_slot(type(module).__name__)))
        # without a graph inside: the rule is attached to the module's result
        return (x.detach(), *args[1:])

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        name = self._path.pop()
        if not _is_activation(module):
            return None
        self._inside -= 1
        x, slot = self._modules.pop()
        if self._inside:
            return None
        rule = self.rules.activation
        if rule == "derivative":
            if isinstance(output, Tensor) and output.requires_grad:
                self._path.append(name)
                self._count(type(module).__name__, "activation", rule)
                self._path.pop()
            return None
        if x is None:
            if _carries(output):
                raise UnknownOperationError(
                    "an activation module must get its input as first positional argument for "
                    f"the rule {rule!r}; {type(module).__name__} in {name!r} did not; "
                    "call it as module(x)"
                )
            return None
        if self._in_reference:
            assert slot is not None
            slot.fill(x, output)
            return None
        self._path.append(name)
        self._count(type(module).__name__, "activation", rule)
        self._path.pop()
        return self._activation(x, output, _fused(module), slot)

    # -- operations ------------------------------------------------------------------------------

    def _operation(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = _name(func)
        handler = _HANDLERS.get(name)
        if handler is None or self._inside:
            out = func(*args, **kwargs)
            if self._inside or self._in_reference or not _carries(out):
                return out
            if _carries(args) or _carries(kwargs):
                if name in LINEAR:
                    self._count(name, "linear", "derivative")
                else:
                    self._unknown(name)
            return out
        if self._in_reference:
            return handler(self, name, func, args, kwargs)
        if not torch.is_grad_enabled() or not (_carries(args) or _carries(kwargs)):
            self._calls += 1
            return func(*args, **kwargs)
        return handler(self, name, func, args, kwargs)

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

    def _slot(self, name: str) -> formulas.Reference | None:
        """In the reference run: the slot that the first run made at this call, if it did."""
        self._calls += 1
        slot = self._slots.get(self._calls) if self._in_reference else None
        if slot is not None and slot.name != name:
            raise ValueError(
                f"the reference run must perform the operations of the first run; where that did "
                f"{slot.name!r} it does {name!r}; compare runs that take the same branches"
            )
        return slot

    def _new_slot(self, name: str) -> formulas.Reference:
        slot = formulas.Reference(name)
        if self.rules.needs_reference:
            self._slots[self._calls] = slot
        return slot

    # Each handler below runs in both runs; in the reference run it only fills the slot.

    def _activation(
        self,
        x: Tensor,
        y: Tensor,
        function: Callable[[Tensor], Tensor],
        slot: formulas.Reference | None,
    ) -> Tensor:
        if self.rules.activation == "identity":
            return formulas.identity(x, y, function)
        assert slot is not None
        return formulas.rescale(x, y, function, slot)

    def _elementwise(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        kind = "exponent" if name in EXPONENTS else "activation"
        rule = getattr(self.rules, kind)
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(args[0], out)
            return out
        self._count(name, kind, rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        _refuse_in_place(name, func, args, kwargs)
        with torch.no_grad():
            y = func(*args, **kwargs)
        if rule == "constant":
            return y
        slot = self._new_slot(name)
        x, rest = args[0], args[1:]
        if rule == "identity":
            return formulas.identity(x, y, lambda t: func(t, *rest, **kwargs))
        return formulas.rescale(x, y, lambda t: func(t, *rest, **kwargs), slot)

    def _statistic(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        rule = self.rules.norm
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(out)
            return out
        self._count(name, "norm", rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        with torch.no_grad():
            y = func(*args, **kwargs)
        if rule == "constant":
            return y
        return formulas.statistic_secant(name, args[0], y, self._new_slot(name))

    def _power(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        exponent = 2 if name == "square" else (args[1] if len(args) > 1 else kwargs.get("exponent"))
        if exponent == 2:
            return self._product_of(name, args[0], args[0], func, args, kwargs)
        if exponent in (-0.5, 0.5, -1):
            alias = {-0.5: "rsqrt", 0.5: "sqrt", -1: "reciprocal"}[exponent]
            return self._statistic(alias, func, args, kwargs)
        return self._elementwise(name, func, args, kwargs)

    def _multiply(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        a, b = _operands(args, kwargs)
        return self._product_of(name, a, b, func, args, kwargs)

    def _product_of(self, name: str, a: Any, b: Any, func: Any, args: Any, kwargs: Any) -> Any:
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(a, b)
            return out
        if not (_carries(a) and _carries(b)):
            self._count(name, "linear", "derivative")
            return func(*args, **kwargs)
        rule = self.rules.gate
        self._count(name, "gate", rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        _refuse_in_place(name, func, args, kwargs)
        if rule == "half":
            return formulas.half(func(*args, **kwargs))
        with torch.no_grad():
            y = func(*args, **kwargs)
        return formulas.midpoint_gate(a, b, y, self._new_slot(name))

    def _divide(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        a, b = _operands(args, kwargs)
        if name == "rdiv":
            a, b = b, a
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(torch.as_tensor(a), b)
            return out
        if not _carries(b):
            self._count(name, "linear", "derivative")
            return func(*args, **kwargs)
        rule = self.rules.norm
        self._count(name, "norm", rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        _refuse_in_place(name, func, args, kwargs)
        if rule == "constant" and _carries(a):
            return torch.div(a, b.detach())
        with torch.no_grad():
            y = func(*args, **kwargs)
        if rule == "constant":
            return y
        a = a if isinstance(a, Tensor) else torch.as_tensor(a, dtype=y.dtype, device=y.device)
        return formulas.division_secant(a, b, y, self._new_slot(name))

    def _bilinear(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        at = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(*(args[i] for i in slot.positions))
            return out
        dependent = [i for i, a in at if _carries(a)]
        factors = [i for i in dependent if not (name in ("baddbmm", "addmm", "addbmm") and i == 0)]
        if len(factors) < 2:
            self._count(name, "linear", "derivative")
            return func(*args, **kwargs)
        rule = self.rules.bilinear
        self._count(name, "bilinear", rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        if len(factors) > 2 or len(dependent) != len(factors) or _carries(kwargs):
            raise UnknownOperationError(
                f"a product of dependent tensors must have two factors to be split; {name!r} has "
                f"{len(dependent)}; write it as products of two, with frozen weights"
            )
        if rule == "half":
            return formulas.half(func(*args, **kwargs))
        with torch.no_grad():
            y = func(*args, **kwargs)
        slot = self._new_slot(name)
        slot.positions = tuple(factors)
        a, b = (args[i] for i in factors)
        if name in ("matmul", "bmm", "mm") and a.dim() >= 2 and b.dim() >= 2:
            return formulas.midpoint_matmul(a, b, y, slot)

        def call(*operands: Tensor) -> Tensor:
            filled = list(args)
            for i, operand in zip(factors, operands, strict=True):
                filled[i] = operand
            result: Tensor = func(*filled, **kwargs)
            return result

        return formulas.midpoint_bilinear(call, (a, b), y, slot)

    def _softmax(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]
        dim = kwargs["dim"] if "dim" in kwargs else args[1]
        dtype = kwargs.get("dtype")
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(x if dtype is None else x.to(dtype), out)
            return out
        rule = self.rules.softmax
        self._count(name, "softmax", rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        with torch.no_grad():
            y = func(*args, **kwargs)
        if rule == "constant":
            return y
        x = x if dtype is None else x.to(dtype)
        if rule == "softer":
            return formulas.softmax_softer(x, y, dim)
        return formulas.softmax_secant(x, y, dim, self._new_slot(name))

    def _layer_norm(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        x, shape, weight, bias, eps = _norm_arguments(name, args, kwargs)
        slot = self._slot(name)
        if self._in_reference:
            out = func(*args, **kwargs)
            if slot is not None:
                slot.fill(x)
            return out
        rule = self.rules.norm
        self._count(name, "norm", rule)
        if rule == "derivative":
            return func(*args, **kwargs)
        if _carries(weight) or _carries(bias):
            raise UnknownOperationError(
                f"the weight and bias of {name!r} must not depend on the input under the rule "
                f"{rule!r}; they do; write the norm as a division and a product"
            )
        with torch.no_grad():
            y = func(*args, **kwargs)
        dims = tuple(range(-len(shape), 0))
        centre = name == "layer_norm"
        if rule == "constant":
            return formulas.layer_norm_constant(x, y, dims, weight, eps, centre=centre)
        slot = self._new_slot(name)
        return formulas.layer_norm_secant(x, y, dims, weight, eps, slot, centre=centre)

    def _attention(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """The fused kernel's value, with the coefficients of the same attention written out."""
        slot = self._slot(name)
        if self._in_reference:
            if slot is None:
                return func(*args, **kwargs)
            slot.fill()
        elif self.rules.softmax == self.rules.bilinear == "derivative":
            self._count(name, "softmax", "derivative")
            self._count(name, "bilinear", "derivative")
            return func(*args, **kwargs)
        else:
            self._new_slot(name)
        with torch.no_grad():
            value = func(*args, **kwargs)
        with self._mode:
            surrogate = _written_out(*args, **kwargs)
        return value if self._in_reference else formulas.graft(value, surrogate)


class _Mode(TorchFunctionMode):
    def __init__(self, owner: Propagation) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._owner._operation(func, args, kwargs or {})


_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(ACTIVATIONS | EXPONENTS, Propagation._elementwise),
    **dict.fromkeys(STATISTICS, Propagation._statistic),
    **dict.fromkeys(["mul", "multiply"], Propagation._multiply),
    **dict.fromkeys(["div", "divide", "true_divide", "rdiv"], Propagation._divide),
    **dict.fromkeys(["pow", "square"], Propagation._power),
    **dict.fromkeys(PRODUCTS, Propagation._bilinear),
    "softmax": Propagation._softmax,
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
    gradients of parameters mean nothing here.

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


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The two operands of an elementwise call, however they were passed."""
    both = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)]
    return both[0], both[1]


def _norm_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    names = ["input", "normalized_shape", "weight", "bias", "eps"]
    if name == "rms_norm":
        names.remove("bias")
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given["input"]
    eps = given.get("eps")
    if eps is None:
        eps = 1e-5 if name == "layer_norm" else torch.finfo(x.dtype).eps
    shape = given["normalized_shape"]
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return x, shape, given.get("weight"), given.get("bias"), eps


def _refuse_in_place(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    spelled = getattr(func, "__name__", "")
    in_place = (spelled.endswith("_") and not spelled.endswith("__")) or spelled.startswith("__i")
    if in_place or kwargs.get("inplace"):
        raise UnknownOperationError(
            f"a rule needs the operation's input after it; {name!r} overwrites it in place; "
            "build the module with inplace=False, or write y = f(x)"
        )


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in _ACTIVATION_MODULES and not isinstance(
        module, (*_NOT_ELEMENTWISE, nn.MultiheadAttention)
    )


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
