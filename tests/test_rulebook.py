"""The presets, cell by cell, and how rules are named and refused."""

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relp
from relp import DEEPLIFT, GRADIENT, PRESETS, RELP, Rules, preset
from relp.rulebook import COMPARING, FORMULAS, KINDS
from relp.rules import constant, half

TABLE = """
kind        GRADIENT    RELP        CP_LRP      ATTN_LRP    GIM         DEEPLIFT    PARTWAY
norm        derivative  constant    constant    constant    constant    secant      secant
activation  derivative  identity    identity    identity    derivative  secant      secant
gate        derivative  half        half        half        half        midpoint    midpoint
softmax     derivative  derivative  constant    derivative  softer      secant      secant
bilinear    derivative  derivative  half        half        half        midpoint    midpoint
exponent    derivative  constant    constant    constant    constant    secant      secant
linear      derivative  derivative  derivative  derivative  derivative  derivative  derivative
"""
HEAD, *ROWS = (line.split() for line in TABLE.strip().splitlines())


@pytest.mark.parametrize("name", HEAD[1:])
def test_a_preset_is_its_column_of_the_table(name: str) -> None:
    rules = getattr(relp, name)
    assert isinstance(rules, Rules) and rules.name == name and PRESETS[name] is rules
    column = {row[0]: row[HEAD.index(name)] for row in ROWS}
    assert {kind: getattr(rules, kind) for kind in KINDS} == column
    assert list(column) == list(KINDS)


def test_there_are_no_other_presets() -> None:
    assert list(PRESETS) == HEAD[1:]


def test_rules_are_frozen_and_compare_by_value() -> None:
    with pytest.raises(FrozenInstanceError):
        RELP.gate = "derivative"  # type: ignore[misc]
    assert len({*PRESETS.values(), replace(RELP), Rules("GRADIENT")}) == len(PRESETS)


@pytest.mark.parametrize(
    "copied",
    [lambda rules: pickle.loads(pickle.dumps(rules)), copy.deepcopy, copy.copy],
    ids=["pickle", "deepcopy", "copy"],
)
@pytest.mark.parametrize("asked", [False, True], ids=["fresh", "asked before"])
def test_copies_are_equal(copied: Callable[[Rules], Rules], asked: bool) -> None:
    placed = RELP.at("blocks.*.attn", softmax="constant", gamma=0.5)
    own = RELP.with_operation(torch.lgamma, "activation").with_operation(nn.GELU, norm)
    for rules in (*PRESETS.values(), placed, own):
        rules = replace(rules)
        if asked:  # what was computed once is kept beside the fields
            assert rules.only_derivatives or rules.norm != "derivative"
            rules.needs_reference, rules.within("blocks.3.attn"), rules.inside_norm()  # noqa: B018
        one = copied(rules)
        assert one is not rules and one == rules and hash(one) == hash(rules)
        assert len({one, rules}) == 1
        for module in ("", "blocks.3.attn"):
            assert one.within(module) == rules.within(module)
        assert one.inside_norm() == rules.inside_norm()
        assert one.only_derivatives == rules.only_derivatives
        assert one.needs_reference == rules.needs_reference
        assert one.with_(gate="derivative") == rules.with_(gate="derivative")


def test_changed_rules_are_named_after_the_change() -> None:
    changed = RELP.with_(softmax="constant", gate="derivative")
    assert changed.name == "RELP(softmax=constant, gate=derivative)"
    assert (changed.softmax, changed.gate) == ("constant", "derivative")
    assert replace(changed, name="RELP", softmax="derivative", gate="half") == RELP
    assert RELP.with_("mine", softmax="constant").name == "mine"
    assert changed.with_(norm="derivative").name == f"{changed.name}(norm=derivative)"
    assert RELP.softmax == "derivative"


def test_rules_that_change_nothing_keep_their_name() -> None:
    assert RELP.with_() == RELP and RELP.with_("same") == replace(RELP, name="same")


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_rule_is_accepted_and_no_other(kind: str) -> None:
    assert KINDS[kind][0] == "derivative"
    for rule in KINDS[kind]:
        assert getattr(GRADIENT.with_(**{kind: rule}), kind) == rule
    message = (
        f"the rule for {kind!r} must be one of {KINDS[kind]}; got 'alpha'; "
        f"for instance RELP.with_({kind}='derivative')"
    )
    for build in (GRADIENT.with_, lambda **rules: Rules("mine", **rules)):
        with pytest.raises(ValueError) as error:
            build(**{kind: "alpha"})
        assert str(error.value) == message


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        RELP.with_(convolution="epsilon")
    assert str(error.value) == (
        "a kind of operation must be one of ('norm', 'activation', 'gate', 'softmax', 'bilinear', "
        "'exponent', 'linear'); got 'convolution'; for instance RELP.with_(softmax='constant')"
    )


@pytest.mark.parametrize("size", ["epsilon", "gamma"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_size_is_positive(size: str, value: float) -> None:
    default = {"epsilon": 1e-06, "gamma": 0.25}[size]
    with pytest.raises(ValueError) as error:
        GRADIENT.with_(linear=size, **{size: value})
    assert str(error.value) == (
        f"{size!r} must be a positive number; got {value!r}; "
        f"for instance RELP.with_(linear={size!r}, {size}={default})"
    )


def test_rules_for_a_place_are_refused_as_rules_for_all() -> None:
    with pytest.raises(ValueError, match=r"^the rule for 'gate' must be one of .*; got 'alpha'"):
        RELP.at("blocks.3", gate="alpha")
    with pytest.raises(ValueError, match="^a kind of operation must be one of .*; got 'norms'"):
        RELP.at("blocks.3", norms="constant")
    with pytest.raises(ValueError) as error:
        RELP.at("blocks.3")
    assert str(error.value) == (
        "at('blocks.3') must change a kind of operation; got none; for instance "
        "RELP.at('blocks.3', softmax='constant')"
    )


def test_a_rule_for_a_place_counts_as_one_that_is_used() -> None:
    assert GRADIENT.only_derivatives and not GRADIENT.at("0", gate="half").only_derivatives
    assert not GRADIENT.needs_reference and GRADIENT.at("0", gate="midpoint").needs_reference
    assert not GRADIENT.at("0", gate="half").needs_reference


def test_steps_of_a_norm_follow_its_rule() -> None:
    assert RELP.inside_norm() == RELP
    plain = RELP.with_(norm="derivative").inside_norm()
    assert (plain.gate, plain.activation, plain.bilinear) == ("derivative",) * 3
    exact = RELP.with_(norm="secant").inside_norm()
    assert (exact.gate, exact.activation, exact.bilinear) == ("midpoint", "secant", "midpoint")


@pytest.mark.parametrize("name", ["ATTN_LRP", "attn_lrp", "attn-lrp", "Attn-LRP"])
def test_a_preset_is_found_however_it_is_spelled(name: str) -> None:
    assert preset(name) is relp.ATTN_LRP


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(ValueError) as error:
        preset("LRP-0")
    assert str(error.value) == (
        "rules must be one of GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT, PARTWAY; "
        "got 'LRP-0'; build your own with Rules(...) or RELP.with_(...)"
    )


def test_only_rules_that_compare_two_runs_need_both() -> None:
    assert [r.name for r in PRESETS.values() if r.needs_reference] == ["DEEPLIFT", "PARTWAY"]
    for kind, rules in KINDS.items():
        for rule in rules:
            both = rule in ("secant", "midpoint")
            assert GRADIENT.with_(**{kind: rule}).needs_reference == both
    # a name proves nothing
    assert not Rules("secant").needs_reference
    without = {row[0]: "derivative" for row in ROWS}
    assert DEEPLIFT.needs_reference and not DEEPLIFT.with_(**without).needs_reference


def norm(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return g / x.norm()


def test_every_form_of_a_kind_has_formulas_of_its_rules() -> None:
    assert {rule for rules in KINDS.values() for rule in rules} > set(COMPARING)
    for kind, forms in FORMULAS.items():
        assert KINDS[kind][0] == "derivative"
        for formulas in forms.values():
            assert set(formulas) <= set(KINDS[kind]) - {"derivative"}
            # of one form, so that they can be called alike
            given = {len(inspect.signature(f).parameters) for f in formulas.values()
                     if f not in (constant, half)}  # fmt: skip
            assert len(given) <= 1
        whole = {rule for formulas in forms.values() for rule in formulas}
        assert whole == set(KINDS[kind]) - {"derivative"}


def test_operations_of_ones_own_are_part_of_the_rules() -> None:
    one = RELP.with_operation(torch.lgamma, "activation")
    assert one.name == "RELP(lgamma=activation)" and one != RELP and not RELP.operations
    assert one == RELP.with_operation(torch.Tensor.lgamma_, "activation")
    assert len({one, RELP.with_operation(torch.lgamma, "activation"), RELP}) == 2
    assert one != RELP.with_operation(torch.lgamma, "exponent")
    two = one.with_operation(nn.GELU, norm)
    assert two.name.startswith("RELP(lgamma=activation)(GELU=norm#")
    assert two == one.with_operation(nn.GELU, norm) and hash(two) == hash(
        one.with_operation(nn.GELU, norm)
    )
    assert two != one.with_operation(nn.GELU, lambda g, x, y: g)
    # the last counts, and a name of one's own is kept
    last = two.with_operation(torch.lgamma, "linear", "mine")
    assert last.operations == (("lgamma", "linear"), (nn.GELU, norm)) and last.name == "mine"
    assert last.with_(gate="derivative").operations == last.operations
    with pytest.raises(FrozenInstanceError):
        two.operations = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("what", "rule"), [(torch.lgamma, "norm"), (int, "linear"), (nn.GELU(), "linear")]
)
def test_what_cannot_be_registered_is_refused_by_rules_too(what: Any, rule: str) -> None:
    errors = []
    for add in (inspect.unwrap(relp.register), inspect.unwrap(Rules.with_operation)):
        with pytest.raises((TypeError, ValueError)) as error:
            add(*((RELP,) if add.__name__ == "with_operation" else ()), what, rule)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
    with pytest.raises(ValueError, match="^`rule` must be 'linear', 'activation', 'exponent' or"):
        Rules("mine", operations=(("lgamma", "norm"),))
