"""Which kind of operation gets which rule: `Rules` and the published presets.

A kind is what an operation is to relevance (`norm`, `activation`, …); a rule is one of the
formulas of `relp.rules` for that kind. Both stand in one table, `FORMULAS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from relp import rules as r
from relp.choices import Preset
from relp.operations import Entry, Formula, check_rule, entry, label

__all__ = [
    "CP_LRP", "ATTN_LRP", "COMPARING", "DEEPLIFT", "FORMULAS", "GIM", "GRADIENT", "KINDS",
    "PARTWAY", "PRESETS", "RELP", "Rules", "preset",
]  # fmt: skip

FORMULAS: dict[str, dict[str, dict[str, Callable[..., Tensor]]]] = {
    # kind of operation -> its forms -> name of a rule -> formula
    "norm": {
        "layer norm": {"constant": r.layer_norm_constant, "secant": r.layer_norm_secant},
        "statistic": {"constant": r.constant, "secant": r.statistic_secant},
        "vector norm": {"constant": r.constant, "secant": r.vector_norm_secant},
        "division": {"constant": r.division_constant, "secant": r.division_secant},
    },
    "activation": {"elementwise": {"identity": r.identity, "secant": r.rescale}},
    "gate": {"product": {"half": r.half, "midpoint": r.midpoint_gate}},
    "softmax": {
        "softmax": {"constant": r.constant, "softer": r.softmax_softer, "secant": r.softmax_secant},
        "log softmax": {"constant": r.log_softmax_constant, "secant": r.log_softmax_secant},
        "logsumexp": {"constant": r.constant, "secant": r.logsumexp_secant},
    },
    "bilinear": {
        "product": {"half": r.half, "midpoint": r.midpoint_bilinear},
        "matrices": {"half": r.half, "midpoint": r.midpoint_matmul},
    },
    "exponent": {"elementwise": {"constant": r.constant, "secant": r.rescale}},
    "linear": {"product": {"epsilon": r.epsilon, "gamma": r.gamma}},
}
"""The rule book: every kind has `derivative` too, torch's own, which is also what a form has under
a rule of its kind that says nothing of it."""
KINDS: dict[str, tuple[str, ...]] = {
    kind: ("derivative", *dict.fromkeys(rule for form in forms.values() for rule in form))
    for kind, forms in FORMULAS.items()
}
COMPARING = ("secant", "midpoint")
"""Rules whose coefficients depend on both runs."""
SIZES = ("epsilon", "gamma")


@dataclass(frozen=True)
class Rules:
    """One rule per kind of operation; frozen, so a preset cannot drift.

    >>> RELP.with_(softmax="constant").name
    'RELP(softmax=constant)'
    >>> RELP.at("blocks.3", activation="derivative").name
    'RELP(blocks.3: activation=derivative)'

    The steps from the gradient to CP_LRP are one argument each:
    `GRADIENT.with_(norm="constant")` (LN only), `…with_(activation="identity")`,
    `…with_(gate="half")`, `…with_(softmax="constant")` (AH).

    Raises:
        ValueError: a rule does not exist for its kind.
    """

    name: str
    norm: str = "derivative"
    """Layer norm, RMS norm, division by a function of the input: `constant` is the LN-rule
    (Ali et al. 2022, arXiv:2202.07304), `secant` the exact difference between two runs."""
    activation: str = "derivative"
    """GELU, SiLU, ReLU, tanh, …: `identity` is the ratio y/x (Jafari et al. 2024,
    arXiv:2406.07592), `secant` DeepLIFT's Rescale (Shrikumar et al. 2017, arXiv:1704.02685)."""
    gate: str = "derivative"
    """Elementwise product of two dependent tensors: `half` gives each factor half
    (arXiv:2406.07592), `midpoint` the mean of the other factor over two runs."""
    softmax: str = "derivative"
    """Attention and routers: `constant` is the AH-rule (arXiv:2202.07304), `softer` the derivative
    at temperature 2 (GIM, arXiv:2505.17630)."""
    bilinear: str = "derivative"
    """Matrix product of two dependent tensors: `half` as in AttnLRP (arXiv:2402.05602)."""
    exponent: str = "derivative"
    """exp and softplus outside a softmax: `constant` as in MambaLRP (arXiv:2406.07592)."""

    linear: str = "derivative"
    """Linear layers, convolutions, products with weights: `derivative` is the 0-rule, `epsilon`
    and `gamma` the ε- and γ-rule (Montavon et al. 2019) of the sizes below."""
    epsilon: float = 1e-6
    gamma: float = 0.25
    places: tuple[tuple[str, tuple[tuple[str, str | float], ...]], ...] = ()
    """What `at` changed, and where; later entries win."""
    operations: tuple[Entry, ...] = ()
    """What `with_operation` added."""
    partway: bool = False
    """`attribute` takes what compares two runs only so far as each part moves the run from the one
    to the other (`relp.partway`). Where no parts are told apart, as in `propagate`, all the way."""

    def __post_init__(self) -> None:
        for _, given in self.operations:
            check_rule(given)
        for kind, known in KINDS.items():
            rule = getattr(self, kind)
            if rule not in known:
                raise ValueError(
                    f"the rule for {kind!r} must be one of {known}; got {rule!r}; "
                    f"for instance RELP.with_({kind}={known[0]!r})"
                )
        if self.partway and not self.needs_reference:
            raise ValueError(
                "`partway` is for rules that compare two runs; got rules of one run; for instance "
                "PARTWAY.with_(softmax='constant')"
            )
        for size in SIZES:
            value = getattr(self, size)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(
                    f"{size!r} must be a positive number; got {value!r}; "
                    f"for instance RELP.with_(linear={size!r}, {size}={getattr(Rules, size)})"
                )

    def with_(self, name: str | None = None, **changes: str | float) -> Rules:
        """These rules with some kinds changed; the name says which unless one is given.

        >>> RELP.with_(linear="gamma", gamma=0.1)

        Raises:
            ValueError: a kind or a rule does not exist.
        """
        _must_be_kinds(changes)
        suffix = f"({_listed(changes)})" if changes else ""
        return replace(self, name=name or f"{self.name}{suffix}", **changes)  # type: ignore[arg-type]

    def at(self, module: str, name: str | None = None, **changes: str | float) -> Rules:
        """These rules with some kinds changed inside some modules only.

        >>> RELP.at("blocks.3", activation="derivative")     # no Identity-rule in block 3
        >>> RELP.at("blocks.*.attn", softmax="constant")

        Args:
            module: name of a module under the root, as `coverage` lists them, or a pattern with
                `*` and `?`; it holds for everything inside that module too. Where several `at`
                fit, the last counts. A pattern that no operation of the kind meets is an error of
                the run.
            name: of the result; says what was changed if None.

        Raises:
            ValueError: a kind or a rule does not exist, or nothing is changed.
        """
        _must_be_kinds(changes)
        if not changes:
            raise ValueError(
                f"at({module!r}) must change a kind of operation; got none; for instance "
                f"RELP.at({module!r}, softmax='constant')"
            )
        replace(self, **changes)  # type: ignore[arg-type]  # refuses what does not exist
        name = name or f"{self.name}({module}: {_listed(changes)})"
        return replace(self, name=name, places=(*self.places, (module, tuple(changes.items()))))

    def with_operation(
        self, what: Callable[..., Any], rule: str | Formula, name: str | None = None
    ) -> Rules:
        """These rules, which also know an operation or a class of modules of one's own.

        >>> RELP.with_operation(torch.lgamma, "activation").name
        'RELP(lgamma=activation)'
        >>> class MyNorm(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x / x.norm(dim=-1, keepdim=True)
        >>> rules = RELP.with_operation(MyNorm, lambda g, x, y: g / x.norm(dim=-1, keepdim=True))
        >>> coverage(MyNorm(), torch.ones(1, 4), rules=rules)["kind"].tolist()
        ['registered']

        Args:
            what: as for `register`, which says it for all rules; what is said here comes first.
            rule: as for `register`.
            name: of the result; says what was added if None, and which formula by some digits.

        Raises:
            TypeError, ValueError: as `register`.
        """
        added = entry(what, rule)
        name = name or f"{self.name}({label(added)})"
        operations = tuple({**dict(self.operations), added[0]: added[1]}.items())
        return replace(self, name=name, operations=operations)

    @lru_cache(maxsize=4096)  # noqa: B019 (some presets times the modules of a model)
    def within(self, module: str) -> Rules:
        """The rules that hold in the module of that name, the same everywhere inside."""
        changes = {k: v for _, k, v in self.deciding(module)}
        return replace(self, places=(), **changes)  # type: ignore[arg-type]

    @lru_cache(maxsize=256)  # noqa: B019
    def inside_norm(self) -> Rules:
        """The rules for operations that are steps of a norm: all follow the norm's own rule."""
        if self.norm == "constant":  # the statistic does not carry relevance: nothing to follow
            return self
        steps = GRADIENT if self.norm == "derivative" else DEEPLIFT
        return replace(self, gate=steps.gate, activation=steps.activation, bilinear=steps.bilinear)

    @lru_cache(maxsize=4096)  # noqa: B019
    def deciding(self, module: str) -> tuple[tuple[str, str, str | float], ...]:
        """`(pattern, kind, rule)` of every change that holds in the module of that name."""
        parts = module.split(".")
        around = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return tuple(
            (pattern, kind, rule)
            for pattern, changes in self.places
            if any(fnmatchcase(name, pattern) for name in around)
            for kind, rule in changes
        )

    def uses(self, kind: str, *rules: str) -> bool:
        """True if a kind of operation gets one of these rules anywhere."""
        local = [rule for _, changes in self.places for k, rule in changes if k == kind]
        return any(rule in rules for rule in (getattr(self, kind), *local))

    @cached_property
    def only_derivatives(self) -> bool:
        """True if nothing differs from plain gradients."""
        return not any(self.uses(kind, *known[1:]) for kind, known in KINDS.items())

    @cached_property
    def needs_reference(self) -> bool:
        """True if some coefficient depends on both runs (secants and midpoints)."""
        return any(self.uses(kind, *COMPARING) for kind in KINDS)


def _must_be_kinds(changes: Mapping[str, object]) -> None:
    for kind in changes:
        if kind not in KINDS and kind not in SIZES:
            raise ValueError(
                f"a kind of operation must be one of {tuple(KINDS)}; got {kind!r}; "
                "for instance RELP.with_(softmax='constant')"
            )


def _listed(changes: Mapping[str, object]) -> str:
    return ", ".join(f"{kind}={rule}" for kind, rule in changes.items())


GRADIENT = Rules("GRADIENT")
"""Every derivative as it is: attribution patching, EAP."""
RELP = Rules("RELP", norm="constant", activation="identity", gate="half", exponent="constant")
"""Relevance patching (Jafari et al. 2025, arXiv:2508.21258): LN-, Identity- and Half-rule."""
CP_LRP = RELP.with_("CP_LRP", softmax="constant", bilinear="half")
"""RELP with attention patterns constant (AH-rule, arXiv:2202.07304): conserves relevance.

In a transformer no product of two activations is left then; `half` is for state-space models."""
ATTN_LRP = RELP.with_("ATTN_LRP", bilinear="half")
"""RELP with matrix products split in halves (Achtibat et al. 2024, arXiv:2402.05602)."""
GIM = Rules(
    "GIM", norm="constant", gate="half", softmax="softer", bilinear="half", exponent="constant"
)
"""Gradient interaction modifications (Edin et al. 2025, arXiv:2505.17630)."""
DEEPLIFT = Rules(
    "DEEPLIFT",
    norm="secant",
    activation="secant",
    gate="midpoint",
    softmax="secant",
    bilinear="midpoint",
    exponent="secant",
)
"""Exact differences between the two runs (arXiv:1704.02685; products as in DeepSHAP,
arXiv:1705.07874): scores over any cut of the network sum to the metric gap."""

PARTWAY = replace(DEEPLIFT, name="PARTWAY", partway=True)
"""Between GRADIENT and DEEPLIFT, by how far a part moves the run from the one to the other: exact
for a whole cut, the derivative for a small part (`relp.partway`)."""

PRESETS: dict[str, Rules] = {
    r.name: r for r in (GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT, PARTWAY)
}


def preset(name: str) -> Rules:
    """The preset of that name, upper or lower case, `-` or `_`.

    >>> preset("attn-lrp").name
    'ATTN_LRP'

    Raises:
        ValueError: there is none.
    """
    return PRESETS[Preset(name)]
