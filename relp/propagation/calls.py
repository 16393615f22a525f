"""Reading torch's calls: what goes in, and the same call on other operands."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relp.operations import name_of, owner, spelled
from relp.propagation.kinds import PRODUCTS, SUMS_OF_PRODUCTS

__all__ = ["Call", "carries", "copied", "swapped", "tensors"]

PARAMETERS: dict[str, tuple[str, ...]] = {
    # operands that callers like to name, in their order
    **dict.fromkeys(["mul", "multiply", "div", "divide", "true_divide", "matmul"],
                    ("input", "other")),
    **dict.fromkeys(["max", "min", "maximum", "minimum", "fmax", "fmin"], ("input", "other")),
    "where": ("condition", "input", "other"),
    **dict.fromkeys(["bmm", "mm"], ("input", "mat2")),
    **dict.fromkeys(["linear", *(n for n in PRODUCTS if n.startswith("conv"))],
                    ("input", "weight", "bias")),
    "pow": ("input", "exponent"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
    "addmm": ("input", "mat1", "mat2"),
    "addmv": ("input", "mat", "vec"),
    "addr": ("input", "vec1", "vec2"),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One torch operation as it was called, its operands by position where they have a place."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Reads what a `TorchFunctionMode` was given."""
        name = name_of(func)
        if kwargs:
            kwargs = dict(kwargs)
            first = () if owner(func) else ("input",)
            for place, parameter in enumerate(PARAMETERS.get(name, first)):
                if parameter in kwargs and len(args) == place:
                    args = (*args, kwargs.pop(parameter))
        if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        return cls(name, func, args, kwargs)

    def carries(self) -> bool:
        """True if relevance comes in."""
        return carries(self.args) or (bool(self.kwargs) and carries(self.kwargs))

    def plainly(self) -> Any:
        """torch's own result with torch's own derivative."""
        return self.func(*self.args, **self.kwargs)

    def value(self) -> Any:
        """torch's own result, without a graph."""
        with torch.no_grad():
            return self.func(*self.args, **self.kwargs)

    def on(self, operands: dict[int, Tensor]) -> Any:
        """The same call with some operands replaced."""
        args = tuple(operands.get(i, a) for i, a in enumerate(self.args))
        return self.func(*args, **self.kwargs)

    def operands(self) -> tuple[Any, Any]:
        """The two operands of an elementwise call, numerator first."""
        a, b = self.args[:2]
        return (b, a) if self.name == "rdiv" else (a, b)

    def overwrites(self) -> bool:
        """True if the call works in place on what carries relevance."""
        return carries(self.args[:1]) and self.out_of_place() is not None

    def out_of_place(self) -> Call | None:
        """The call that computes on a copy what this one overwrites; None if it does not."""
        name = spelled(self.func)
        first = self.args[0] if self.args else None
        if not isinstance(first, Tensor):
            return None
        if (name.endswith("_") and not name.endswith("__")) or name[:3] == "__i":
            if owner(self.func):
                plain = _on_a_copy(self.func)
            else:
                plain = getattr(torch.Tensor, self.name, None) or getattr(F, self.name)
            return replace(self, func=plain, args=(first.clone(), *self.args[1:]))
        if self.kwargs.get("inplace"):
            copied = (first.clone(), *self.args[1:])
            return replace(self, args=copied, kwargs={**self.kwargs, "inplace": False})
        if isinstance(self.func, FunctionType) and any(a is True for a in self.args):
            given = inspect.signature(self.func).bind(*self.args, **self.kwargs).arguments
            if given.get("inplace"):
                return replace(
                    self, args=(first.clone(),), kwargs={**_but_first(given), "inplace": False}
                )
        return None

    def opened(self) -> Callable[[], Any] | None:
        """The call of a function that torch writes in Python, to be seen from within."""
        func = self.func
        if (
            not isinstance(func, FunctionType)
            or func.__name__.startswith("__")
            or owner(func)
            or func.__module__.startswith("torch._ops")
        ):
            return None
        body = _OPENED.get(func)
        if body is None:
            # the first thing such a function does is to ask whether a mode wants all of it
            unasked = dict.fromkeys(_ASKS, lambda *_: False)
            names = {**func.__globals__, **unasked}
            body = FunctionType(
                func.__code__, names, func.__name__, func.__defaults__, func.__closure__
            )
            body.__kwdefaults__ = func.__kwdefaults__
            _OPENED[func] = body
        return lambda: body(*self.args, **self.kwargs)

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

    @property
    def has_bias(self) -> bool:
        """True if the third operand is a bias."""
        return "bias" in PARAMETERS.get(self.name, ())

    def factors(self) -> tuple[int, int]:
        """Places of the two operands that a product multiplies."""
        return (1, 2) if self.name in (*SUMS_OF_PRODUCTS, "einsum") else (0, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product alone, of other factors: no bias, no addend."""
        if self.name in SUMS_OF_PRODUCTS:
            scaled: Tensor = self.kwargs.get("alpha", 1) * SUMS_OF_PRODUCTS[self.name](a, b)
            return scaled
        kwargs = {k: v for k, v in self.kwargs.items() if k != "bias"}
        args = list(self.args)
        for place, operand in zip(self.factors(), (a, b), strict=True):
            args[place] = operand
        if self.has_bias and len(args) > 2:
            args[2] = None
        out: Tensor = self.func(*args, **kwargs)
        return out


def _but_first(given: dict[str, Any]) -> dict[str, Any]:
    return dict(list(given.items())[1:])


_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_OPENED: dict[Any, FunctionType] = {}


def _on_a_copy(func: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function that overwrites its first operand, as one that gives the result back instead."""

    def copied(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first = first.clone()
        func(first, *args, **kwargs)
        return first

    return copied


def carries(value: Any) -> bool:
    """True if a tensor in `value` carries relevance: it requires grad and is not a parameter."""
    if isinstance(value, Tensor):
        # (asked of every operand, and torch asks for a parameter in Python: most are plain)
        return value.requires_grad and (
            type(value) is Tensor or not isinstance(value, nn.Parameter)
        )
    if isinstance(value, _NESTING):
        for part in _held(value):
            if isinstance(part, _MAY_HOLD) and carries(part):
                return True
    return False


_NESTING = (tuple, list, dict, slice)
_MAY_HOLD = (Tensor, *_NESTING)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _NESTING):
        for part in _held(value):
            if isinstance(part, Tensor):  # (asked here too: most parts are, or nest nothing)
                yield part
            elif isinstance(part, _NESTING):
                yield from tensors(part)


def _held(value: Any) -> Iterable[Any]:
    """What a tuple, a list, a dict or a slice consists of."""
    if isinstance(value, (tuple, list)):
        return value
    return value.values() if isinstance(value, dict) else (value.start, value.stop, value.step)


def swapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: swapped(v, change) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(swapped(v, change) for v in value)
    if isinstance(value, slice):
        return slice(*(swapped(v, change) for v in (value.start, value.stop, value.step)))
    if isinstance(value, tuple):  # torch's own, such as (values, indices)
        return type(value)([swapped(v, change) for v in value])
    return value


def copied(t: Tensor) -> Tensor:
    """The same values in memory of their own, without a graph."""
    return t.detach().clone()
