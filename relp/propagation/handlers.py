"""One function for each kind of operation: reads its operands and gives it its rule.

Handlers run in the run that will be differentiated. They keep no state: what they may know and
whom they tell what they met is `Here`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from relp.operations import Formula
from relp.propagation.calls import Call, carries, tensors
from relp.propagation.decompositions import WRITTEN_OUT
from relp.propagation.frames import Key, Unit
from relp.propagation.kinds import (
    ACTIVATIONS,
    EXPONENTS,
    EXTREMES,
    FUSED,
    LINEAR,
    ORDERED,
    PRODUCTS,
    RANDOM,
    STATISTICS,
    SUMS_OF_PRODUCTS,
    UnknownOperationError,
    fused,
)
from relp.rulebook import COMPARING, FORMULAS, Rules
from relp.rules import Keep, Reference, extreme_secant, graft, own

__all__ = [
    "HANDLERS", "Handler", "Here", "begin_unit", "end_unit", "must_be_linear", "own_rule",
    "without_rule",
]  # fmt: skip


@dataclass(slots=True, eq=False)  # (not frozen: one is made for every operation)
class Here:
    """Where an operation stands, the rules that hold there, and what a handler tells the run."""

    key: Key
    where: str
    rules: Rules
    count: Callable[[str, str, str], None]
    """Operation, kind and rule go into the report."""
    refuse: Callable[[str, str], None]
    """No rule is right for an operation: an error, or its derivative goes into the report."""
    keep: Callable[[Key, Reference], None]
    """The reference run is to fill a slot."""
    branch: Callable[[Key, str, Any], None]
    """A result decides what the code does next."""
    seen: Callable[[Callable[[], Tensor]], Tensor]
    """Runs code whose operations get their own rules."""

    def formula(self, name: str, kind: str, form: str) -> Callable[..., Tensor] | None:
        """What the rule book has for the operation, which is reported; None for the derivative."""
        rule = getattr(self.rules, kind)
        self.count(name, kind, rule)
        return FORMULAS[kind][form].get(rule)

    def slot(self, name: str, kind: str, keep: Keep) -> Reference:
        """For what the reference run will have here, `keep(call, result)`, if the rule asks."""
        slot = Reference(name, keep)
        if getattr(self.rules, kind) in COMPARING:
            self.keep(self.key, slot)
        return slot


Handler = Callable[[Call, Here], Any]


# -- linear, and what no rule is right for ---------------------------------------------------------


def linear(call: Call, here: Here) -> Any:
    """The derivative, which is the 0-rule."""
    here.count(call.name, "linear", "derivative")
    return call.plainly()


def without_rule(call: Call, here: Here) -> Any:
    """An operation that no handler knows."""
    must_be_linear(call, here)
    return call.plainly()


def must_be_linear(call: Call, here: Here) -> None:
    """Refuses what is not, in strict runs."""
    if call.name in LINEAR:
        here.count(call.name, "linear", "derivative")
    else:
        here.refuse(call.name, "opaque" if call.name in FUSED else "unknown")


def random(call: Call, here: Here) -> Any:
    """Dropout that drops nothing."""
    given = (*call.args[1:], *([None] * 2))
    p, training = call.kwargs.get("p", given[0]), call.kwargs.get("training", given[1])
    if p != 0 and training is not False:
        raise ValueError(
            f"a module must run in eval mode under rules; {call.name!r} in {here.where!r} "
            "drops entries at random; call model.eval()"
        )
    return linear(call, here)


def batch_norm(call: Call, here: Here) -> Any:
    """With statistics of its own: linear."""
    training = call.kwargs.get("training", call.args[5] if len(call.args) > 5 else False)
    if training:
        raise ValueError(
            f"a module must run in eval mode under rules; {call.name!r} in {here.where!r} "
            "mixes the rows of a batch; call model.eval()"
        )
    if carries(call.args[1:]) or carries(call.kwargs):
        here.refuse(f"{call.name} with dependent weights", "unknown")
    return linear(call, here)


def own_rule(call: Call, here: Here, rule: str | Formula) -> Any:
    """One's own operation: as the kind that it joined, or by its formula."""
    if rule == "linear":
        return linear(call, here)
    if isinstance(rule, str):
        return elementwise(call, here, rule)
    if here.rules.only_derivatives:
        here.count(call.name, "registered", "derivative")
        return call.plainly()
    _must_depend_on_one(call.name, (call.args[1:], call.kwargs))
    here.count(call.name, "registered", "formula")
    return own(call.args[0], call.value(), rule)


# -- activation, exponent --------------------------------------------------------------------------


def elementwise(call: Call, here: Here, kind: str = "") -> Any:
    """A function of each entry of its first operand."""
    kind = kind or ("exponent" if call.name in EXPONENTS else "activation")
    formula = here.formula(call.name, kind, "elementwise")
    if formula is None:
        return call.plainly()
    _must_depend_on_one(call.name, (call.args[1:], call.kwargs))
    slot = here.slot(call.name, kind, lambda other, out: (other.args[0], out))
    uniform = not any(True for _ in tensors((call.args[1:], call.kwargs)))
    x, y = call.args[0], call.value()
    return formula(x, y, lambda t: cast(Tensor, call.on({0: t})), uniform, slot)


def _must_depend_on_one(name: str, others: Any) -> None:
    if carries(others):
        raise UnknownOperationError(
            f"an elementwise operation must depend on the input by one operand; {name!r} does by "
            "several; write it as products and differences"
        )


# -- selection -------------------------------------------------------------------------------------


def extreme(call: Call, here: Here) -> Any:
    """The winner takes all; between two runs, the two winners share."""
    if not here.rules.needs_reference:
        here.count(call.name, "selection", "derivative")
        return call.plainly()
    here.count(call.name, "selection", "secant")
    out: Any = call.value()
    places = [i for i, a in enumerate(call.args) if carries(a)]

    def values(*operands: Tensor) -> Tensor:
        found = call.on(dict(zip(places, operands, strict=True)))
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)

    slot = Reference(call.name, lambda other, out: tuple(other.args[i] for i in places))
    here.keep(here.key, slot)
    value = out[0] if isinstance(out, tuple) else out
    y = extreme_secant(values, [call.args[i] for i in places], value, slot)
    if not isinstance(out, tuple):
        return y
    here.branch(here.key, call.name, out[1])
    return type(out)((y, out[1]))


def ordered(call: Call, here: Here) -> Any:
    """Linear, as long as the same entries are chosen."""
    here.count(call.name, "selection", "derivative")
    out = call.plainly()
    if isinstance(out, tuple):
        here.branch(here.key, call.name, out[1])
    elif here.rules.needs_reference:
        here.refuse(f"{call.name} without an axis", "unknown")
    return out


# -- norm ------------------------------------------------------------------------------------------


def layer_norm(call: Call, here: Here) -> Any:
    """A layer or RMS norm in one call."""
    x, shape, weight, bias, eps = call.norm_arguments()
    if here.rules.norm != "derivative" and (carries(weight) or carries(bias)):
        return write_out(call, here)
    formula = here.formula(call.name, "norm", "layer norm")
    if formula is None:
        return call.plainly()
    slot = here.slot(call.name, "norm", lambda other, out: (other.args[0],))
    dims, centre = tuple(range(-len(shape), 0)), call.name == "layer_norm"
    return formula(x, call.value(), dims, weight, eps, centre, slot)


def statistic(call: Call, here: Here, name: str = "") -> Any:
    """A root or a reciprocal."""
    formula = here.formula(call.name, "norm", "statistic")
    if formula is None:
        return call.plainly()
    slot = here.slot(call.name, "norm", lambda other, out: (out,))
    return formula(call.args[0], call.value(), name or call.name, slot)


def vector_norm(call: Call, here: Here) -> Any:
    """The Euclidean norm; under rules that do not look inside any other."""
    formula = here.formula(call.name, "norm", "vector norm")
    if formula is None:
        return call.plainly()
    given = dict(zip(("x", "ord", "dim", "keepdim"), call.args, strict=False)) | call.kwargs
    if here.rules.norm in COMPARING and given.get("ord", 2) != 2:
        here.refuse(f"{call.name} of order {given['ord']}", "unknown")
        return call.plainly()
    slot = here.slot(call.name, "norm", lambda other, out: (other.args[0],))
    keepdim = bool(given.get("keepdim", False))
    return formula(call.args[0], call.value(), given.get("dim"), keepdim, slot)


def divide(call: Call, here: Here) -> Any:
    """By a number: linear; by a function of the input: a norm."""
    a, b = call.operands()
    if call.kwargs.get("rounding_mode") is not None:
        here.refuse(f"{call.name} with rounding", "unknown")
        return call.plainly()
    if not carries(b):
        return linear(call, here)
    formula = here.formula(call.name, "norm", "division")
    if formula is None:
        return call.plainly()

    def quotient(divisor: Tensor) -> Tensor:
        with torch.set_grad_enabled(carries(a)):
            return cast(Tensor, call.on({0 if call.name == "rdiv" else 1: divisor}))

    def keep(other: Call, out: Tensor) -> tuple[Tensor, Tensor]:
        one, two = other.operands()
        return torch.as_tensor(one), two

    return formula(quotient, a, b, here.slot(call.name, "norm", keep))


# -- gate, bilinear --------------------------------------------------------------------------------


def multiply(call: Call, here: Here) -> Any:
    """An elementwise product."""
    return _gate(call, here, Call.operands)


def power(call: Call, here: Here) -> Any:
    """Of the kind that the exponent makes it."""
    exponent: Any = 2 if call.name == "square" else call.args[1]
    if not isinstance(exponent, Tensor) and exponent == 2:
        return _gate(call, here, lambda c: (c.args[0], c.args[0]))
    names = {-0.5: "rsqrt", 0.5: "sqrt", -1: "reciprocal"}
    if not isinstance(exponent, Tensor) and exponent in names:
        return statistic(call, here, names[exponent])
    return elementwise(call, here)


def _gate(call: Call, here: Here, factors: Callable[[Call], tuple[Any, Any]]) -> Any:
    if not all(map(carries, factors(call))):
        return linear(call, here)
    formula = here.formula(call.name, "gate", "product")
    if formula is None:
        return call.plainly()
    slot = here.slot(call.name, "gate", lambda other, out: factors(other))
    return formula(call.plainly, factors(call), slot)


def product(call: Call, here: Here) -> Any:
    """Of an activation and a weight (linear), or of two activations (bilinear)."""
    dependent = [i for i, a in enumerate(call.args) if carries(a)]
    # an addend or a bias is no factor
    beside = {0} if call.name in SUMS_OF_PRODUCTS else {2} if call.has_bias else set()
    factors = [i for i in dependent if i not in beside]
    kind = "bilinear" if len(factors) > 1 else "linear"
    rule = getattr(here.rules, kind) if factors else "derivative"
    if rule != "derivative" and (len(factors) < len(dependent) or carries(call.kwargs)):
        return write_out(call, here)
    if rule == "derivative":
        here.count(call.name, kind, rule)
        return call.plainly()
    if kind == "bilinear":
        return _bilinear(call, here, factors)
    return _weighted(call, here, factors[0], beside)


def _bilinear(call: Call, here: Here, places: list[int]) -> Any:
    factors = [call.args[i] for i in places]
    if len(factors) > 2 or not all(isinstance(f, Tensor) for f in factors):
        raise UnknownOperationError(
            "a product of dependent tensors must be of two to be split; "
            f"{call.name!r} in {here.where!r} has {len(factors)}; write it as products of two"
        )
    matrices = call.name in ("matmul", "bmm", "mm") and all(f.dim() >= 2 for f in factors)
    formula = here.formula(call.name, "bilinear", "matrices" if matrices else "product")
    assert formula is not None
    slot = here.slot(call.name, "bilinear", lambda other, _: tuple(other.args[i] for i in places))

    def function(one: Tensor, two: Tensor) -> Tensor:
        return cast(Tensor, call.on(dict(zip(places, (one, two), strict=True))))

    return formula(call.plainly, factors, function, slot)


def _weighted(call: Call, here: Here, place: int, beside: set[int]) -> Any:
    rule = here.rules.linear
    operands = [i for i, a in enumerate(call.args) if isinstance(a, Tensor) and i not in beside]
    if rule == "gamma" and len(operands) != 2:
        raise UnknownOperationError(
            f"the γ-rule needs a product of two operands; {call.name!r} in {here.where!r} "
            "has another number; write it as products of two"
        )
    formula = here.formula(call.name, "linear", "product")
    assert formula is not None
    first, second = call.factors()
    other = second if place == first else first

    def function(x: Tensor, w: Tensor) -> Tensor:
        return call.product(x, w) if place == first else call.product(w, x)

    weight = call.args[other] if len(operands) == 2 else None
    return formula(call.plainly, call.args[place], function, weight, getattr(here.rules, rule))


# -- softmax ---------------------------------------------------------------------------------------


def softmax(call: Call, here: Here) -> Any:
    """A softmax or its logarithm, along an axis."""
    formula = here.formula(call.name, "softmax", call.name.replace("_", " "))
    if formula is None:
        return call.plainly()

    def keep(other: Call, out: Tensor) -> tuple[Tensor, ...]:
        scores = other.softmax_arguments()[0]
        return (scores, out) if call.name == "softmax" else (scores,)

    x, dim = call.softmax_arguments()
    return formula(x, call.value(), dim, here.slot(call.name, "softmax", keep))


def logsumexp(call: Call, here: Here) -> Any:
    """The logarithm of the sum alone."""
    formula = here.formula(call.name, "softmax", "logsumexp")
    if formula is None:
        return call.plainly()
    given = dict(zip(("x", "dim", "keepdim"), call.args, strict=False)) | call.kwargs
    slot = here.slot(call.name, "softmax", lambda other, out: (other.args[0],))
    keepdim = bool(given.get("keepdim", False))
    return formula(call.args[0], call.value(), given["dim"], keepdim, slot)


# -- of several kinds ------------------------------------------------------------------------------


def attention(call: Call, here: Here) -> Any:
    """Scores, their softmax, and values in one call."""
    if here.rules.softmax == here.rules.bilinear == "derivative":
        here.count(call.name, "softmax", "derivative")
        here.count(call.name, "bilinear", "derivative")
        return call.plainly()
    return write_out(call, here)


def write_out(call: Call, here: Here) -> Any:
    """torch's own value, with the coefficients of the same from operations of one kind each."""
    if here.rules.only_derivatives:
        here.count(call.name, "composite", "derivative")
        return call.plainly()
    if call.name not in WRITTEN_OUT:
        raise UnknownOperationError(
            f"bias and addend of {call.name!r} in {here.where!r} must not carry relevance "
            "under rules for products; they do; write product and sum as two operations"
        )
    seen = here.seen

    def written_out(of: Call) -> Tensor:
        return seen(lambda: cast(Tensor, WRITTEN_OUT[of.name](*of.args, **of.kwargs)))

    def keep(other: Call, out: Tensor) -> tuple[()]:
        written_out(other)  # its operations fill their own slots
        return ()

    here.keep(here.key, Reference(call.name, keep))
    return graft(call.value(), written_out(call))


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(WRITTEN_OUT, write_out),
    **dict.fromkeys(ACTIVATIONS | EXPONENTS, elementwise),
    **dict.fromkeys(STATISTICS, statistic),
    **dict.fromkeys(EXTREMES, extreme),
    **dict.fromkeys(ORDERED, ordered),
    **dict.fromkeys(RANDOM, random),
    **dict.fromkeys(["mul", "multiply"], multiply),
    **dict.fromkeys(["div", "divide", "true_divide", "rdiv"], divide),
    **dict.fromkeys(["pow", "square"], power),
    **dict.fromkeys((*PRODUCTS, *SUMS_OF_PRODUCTS), product),
    **dict.fromkeys(["layer_norm", "rms_norm"], layer_norm),
    **dict.fromkeys(["softmax", "log_softmax"], softmax),
    "logsumexp": logsumexp,
    "linalg_vector_norm": vector_norm,
    "batch_norm": batch_norm,
    "scaled_dot_product_attention": attention,
}


# -- modules that count as one operation -----------------------------------------------------------


def begin_unit(module: nn.Module, unit: Unit, here: Here) -> tuple[Any, ...] | None:
    """Arguments for it to run on without a graph inside, if its result will get a rule."""
    if _rule_of(unit, here.rules) == "derivative" or unit.x is None:
        return None
    if not (torch.is_grad_enabled() and carries(unit.x)):
        return None
    name = type(module).__name__
    if isinstance(unit.rule, str):
        unit.slot = here.slot(name, unit.rule, lambda call, out: ())
    else:
        unit.slot = Reference(name, lambda call, out: ())
    unit.handed = unit.x.detach()
    unit.x = unit.x.clone() if getattr(module, "inplace", False) else unit.x
    return (unit.handed, *unit.args[1:])


def end_unit(
    module: nn.Module, unit: Unit, given: tuple[tuple[Any, ...], Any], output: Any, here: Here
) -> Any:
    """Its result with its rule; None if it has the derivative."""
    name, rule = type(module).__name__, _rule_of(unit, here.rules)
    kind = unit.rule if isinstance(unit.rule, str) else "registered"
    word = rule if isinstance(rule, str) else "formula"
    if unit.slot is None:
        if word != "derivative":
            raise UnknownOperationError(
                "a module that counts as one operation must get its input as first positional "
                f"argument for the rule {word!r}; {name} in {here.where!r} did not; "
                "call it as module(x)"
            )
        here.count(name, kind, word)
        return None
    _must_depend_on_one(name, (given[0][1:], given[1]))
    here.count(name, kind, word)
    x, y = cast(Tensor, unit.x), output
    in_place = getattr(module, "inplace", False)
    y = y.clone() if in_place else y
    if isinstance(rule, str):
        uniform = next(module.parameters(), None) is None
        formula = FORMULAS[kind]["elementwise"][rule]
        replaced = formula(x, y, fused(module), uniform, unit.slot)
    else:
        replaced = own(x, y, rule)
    return unit.args[0].copy_(replaced) if in_place else replaced


def _rule_of(unit: Unit, rules: Rules) -> str | Formula:
    """The rule of a module that counts as one operation."""
    if isinstance(unit.rule, str):
        return "derivative" if unit.rule == "linear" else str(getattr(rules, unit.rule))
    return "derivative" if rules.only_derivatives else unit.rule
