"""What operations are called, and what rule those of one's own have.

Tables name operations as `name_of` does: `torch.mul`, `Tensor.__imul__` and `Tensor.mul_` are all
`mul`; `mylib::mul` is somebody else's, and in no table. One's own operations and modules join by
`register`, for all rules, or by `Rules.with_operation`, for some.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterable
from functools import cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

__all__ = [
    "Entry", "Formula", "Registration", "check_rule", "entry", "label", "name_of", "owner",
    "register", "registered", "spelled",
]  # fmt: skip

_TORCH_OPS = re.compile(r"torch\._?ops\.(\w+)$")
_ALIASES = {
    "rmul": "mul", "imul": "mul", "radd": "add", "iadd": "add", "isub": "sub", "truediv": "div",
    "itruediv": "div", "idiv": "div", "rtruediv": "rdiv", "ipow": "pow", "absolute": "abs",
}  # fmt: skip


@cache
def name_of(func: Any) -> str:
    """`torch.Tensor.__mul__`, `torch.mul`, `Tensor.mul_`, `torch.ops.aten.mul.Tensor` -> `mul`.

    What is not torch's own keeps its full name, for it may compute anything: `mylib::mul` for
    `torch.ops.mylib.mul`, `mymodule.mul` for a function that dispatches as torch's do.
    """
    name, whose = spelled(func), owner(func)
    if whose or _is_attribute(func) or name in ("__getitem__", "__setitem__"):
        return whose + name
    plain = name.strip("_")
    return _ALIASES.get(plain, plain)


@cache
def spelled(func: Any) -> str:
    """The name that a function bears where it is at home."""
    func = _defined(func)
    name = str(getattr(func, "__name__", repr(func)))
    if _TORCH_OPS.match(_home(func)):
        return name.split(".")[0]  # `mul.Tensor`
    return str(func.__qualname__) if isinstance(func, FunctionType) and owner(func) else name


@cache
def owner(func: Any) -> str:
    """What stands before the name of a function that is not torch's own; empty for torch's."""
    home = _home(_defined(func))
    if namespace := _TORCH_OPS.match(home):
        return "" if namespace[1] == "aten" else f"{namespace[1]}::"
    return "" if home.split(".")[0] == "torch" else f"{home}."


def _defined(func: Any) -> Any:
    """What was defined: the attribute that is read or set, the operation of a `custom_op`."""
    if _is_attribute(func):  # `x.T`, `x.shape`, `x.data = y`
        attribute = getattr(func, "__self__", func)
        return getattr(attribute, "fget", attribute)
    return getattr(func, "_opoverload", func)


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")


def _home(defined: Any) -> str:
    """The module of a function, or of the class that a method or an attribute is of."""
    home = getattr(defined, "__module__", None)
    return str(home or getattr(getattr(defined, "__objclass__", None), "__module__", "torch"))


# -- one's own -------------------------------------------------------------------------------------

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
Key = str | type
"""An operation by its name, or a class of modules."""
Entry = tuple[Key, str | Formula]
"""Whose rule it is, and the kind of operation whose rules apply, or a formula."""


def entry(what: Callable[..., Any], rule: str | Formula) -> Entry:
    """A rule for an operation or a class of modules, as tables have it.

    Raises:
        TypeError: `what` is neither; ValueError: there is no such kind.
    """
    check_rule(rule)
    if isinstance(what, type):
        if not issubclass(what, nn.Module):
            raise TypeError(
                f"`what` must be a function or a class of modules; got the class {what.__name__}; "
                "register the nn.Module that holds it"
            )
        return what, rule
    if callable(what) and not isinstance(what, nn.Module):
        return name_of(what), rule
    raise TypeError(
        f"`what` must be a function or a class of modules; got {type(what).__name__}; "
        "pass the class, not an instance"
    )


def check_rule(rule: str | Formula) -> None:
    """Refuses what is neither a kind that an operation may join nor a formula."""
    if not callable(rule) and rule not in ("linear", "activation", "exponent"):
        raise ValueError(
            "`rule` must be 'linear', 'activation', 'exponent' or a formula (g, x, y) -> "
            f"coefficient; got {rule!r}; see register's examples"
        )


def label(given: Entry) -> str:
    """`lgamma=activation`; a formula is told from others of its name by what it computes."""
    key, rule = given
    name = key if isinstance(key, str) else owner(key) + key.__qualname__
    if isinstance(rule, str):
        return f"{name}={rule}"
    called = getattr(rule, "__name__", "formula").replace("<lambda>", "formula")
    return f"{name}={called}#{_digest(rule)}"


def _digest(formula: Formula) -> str:
    """A few digits of all that a formula computes with, the same in every process."""
    seen: dict[int, tuple[str, Any]] = {}  # the values too, so that their ids stay theirs

    def read(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return repr(value)
        if id(value) in seen:
            return seen[id(value)][0]
        seen[id(value)] = f"#{len(seen)}", value
        return type(value).__name__, *map(read, _parts(value, getattr(formula, "__module__", "")))

    return hashlib.sha256(repr(read(formula)).encode()).hexdigest()[:6]


def _parts(value: Any, home: str) -> Iterable[Any]:
    """What tells one value from another: of functions, their code and what they refer to.

    What belongs to other modules than the formula's goes by its name, what cannot be read by its
    address: one formula may then have two labels, but never two formulas one.
    """
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, *value.co_consts
    if isinstance(value, FunctionType) and value.__module__ == home:
        known = [value.__globals__.get(name) for name in _names(value.__code__)]
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__code__, value.__defaults__, value.__kwdefaults__, *known, *cells
    if isinstance(value, partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, dict):
        return *value, *value.values()
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    if name is not None:
        return getattr(value, "__module__", ""), name
    if hasattr(value, "tolist"):
        return (value.tolist(),)
    return (
        type(value),
        type(value).__call__,
        vars(value) if hasattr(value, "__dict__") else id(value),
    )


def _names(code: CodeType) -> list[str]:
    """The names that code looks up, that of functions inside it too."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names(c))]


_REGISTERED: dict[Key, tuple[Registration, ...]] = {}
"""For all rules of the process; the last counts."""
_LOCK = threading.Lock()


class Registration:
    """What `register` gives back; `remove()` undoes it, and so does leaving a `with` block."""

    def __init__(self, given: Entry) -> None:
        self.entry = given
        with _LOCK:
            _REGISTERED[given[0]] = (*_REGISTERED.get(given[0], ()), self)

    def remove(self) -> None:
        """The operation or module has the rule that it would have without this registration."""
        key = self.entry[0]
        with _LOCK:
            left = tuple(r for r in _REGISTERED.get(key, ()) if r is not self)
            _REGISTERED[key] = left
            if not left:
                del _REGISTERED[key]

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def registered(keys: Iterable[Key]) -> Entry | None:
    """What `register` says of the first of these that it knows."""
    for key in keys:
        if found := _REGISTERED.get(key):
            return found[-1].entry
    return None


def register(what: Callable[..., Any], rule: str | Formula) -> Registration:
    """Says how relevance passes an operation or a class of modules of one's own.

    >>> class MyNorm(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x / x.norm(dim=-1, keepdim=True)
    >>> handle = register(torch.lgamma, "activation")       # an elementwise function
    >>> handle.remove()                                     # it is unknown again
    >>> with register(MyNorm, "linear"):                    # a module: its derivative, unopened
    ...     coverage(MyNorm(), torch.ones(1, 4))
    >>> with register(MyNorm, lambda g, x, y: g / x.norm(dim=-1, keepdim=True)):
    ...     coverage(MyNorm(), torch.ones(1, 4))

    A registered module counts as one operation; it must be called as `module(x)`. It holds for all
    rules of the process that say nothing of `what` themselves (`Rules.with_operation`), and results
    that made use of it are labelled so: `RELP + lgamma=activation`.

    Args:
        what: a function of torch (`torch.lgamma`, `F.grid_sample`), an operation of one's own
            (`torch.ops.mylib.scan`, what `torch.library.custom_op` gives), or a subclass of
            `nn.Module`.
        rule: `"linear"` (the derivative under all rules), `"activation"` or `"exponent"`
            (elementwise in the first argument: the rules of that kind apply), or a formula
            `(g, x, y) -> coefficient at x`, with `g` the coefficient at the output `y`; it is used
            under all rules but those that are derivatives throughout.

    Returns:
        A handle with `remove()`, which is a context manager too.

    Raises:
        TypeError: `what` is neither; ValueError: there is no such kind.
    """
    return Registration(entry(what, rule))
