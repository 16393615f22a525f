"""Which kind of operation gets which rule: `Rules` and the published presets.

A kind is what an operation is to relevance (`norm`, `activation`, …); a rule is one of the
formulas of `relp.rules` for that kind. Linear operations always propagate their derivative (the
0-rule, Montavon et al. 2019), so they have no entry here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = [
    "CP_LRP",
    "ATTN_LRP",
    "DEEPLIFT",
    "GIM",
    "GRADIENT",
    "PRESETS",
    "RELP",
    "Rules",
    "preset",
]

KINDS: dict[str, tuple[str, ...]] = {
    "norm": ("derivative", "constant", "secant"),
    "activation": ("derivative", "identity", "secant"),
    "gate": ("derivative", "half", "midpoint"),
    "softmax": ("derivative", "constant", "softer", "secant"),
    "bilinear": ("derivative", "half", "midpoint"),
    "exponent": ("derivative", "constant", "secant"),
}


@dataclass(frozen=True)
class Rules:
    """One rule per kind of operation; frozen, so a preset cannot drift.

    >>> RELP.with_(softmax="constant").name
    'RELP(softmax=constant)'

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

    def __post_init__(self) -> None:
        for kind, known in KINDS.items():
            rule = getattr(self, kind)
            if rule not in known:
                raise ValueError(
                    f"the rule for {kind!r} must be one of {known}; got {rule!r}; "
                    f"for instance RELP.with_({kind}={known[0]!r})"
                )

    def with_(self, name: str | None = None, **rules: str) -> Rules:
        """These rules with some kinds changed; the name says which unless one is given.

        Raises:
            ValueError: a kind or a rule does not exist.
        """
        for kind in rules:
            if kind not in KINDS:
                raise ValueError(
                    f"a kind of operation must be one of {tuple(KINDS)}; got {kind!r}; "
                    "for instance RELP.with_(softmax='constant')"
                )
        changes = ", ".join(f"{kind}={rule}" for kind, rule in rules.items())
        if changes:
            changes = f"({changes})"
        return replace(self, name=name or f"{self.name}{changes}", **rules)

    @property
    def only_derivatives(self) -> bool:
        """True if nothing differs from plain gradients."""
        return all(getattr(self, kind) == "derivative" for kind in KINDS)

    @property
    def needs_reference(self) -> bool:
        """True if some coefficient depends on both runs (secants and midpoints)."""
        return any(getattr(self, kind) in ("secant", "midpoint") for kind in KINDS)


GRADIENT = Rules("GRADIENT")
"""Every derivative as it is: attribution patching, EAP."""
RELP = Rules("RELP", norm="constant", activation="identity", gate="half", exponent="constant")
"""Relevance patching (Jafari et al. 2025, arXiv:2508.21258): LN-, Identity- and Half-rule."""
CP_LRP = RELP.with_("CP_LRP", softmax="constant")
"""RELP with attention patterns constant (AH-rule, arXiv:2202.07304): conserves relevance."""
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

PRESETS: dict[str, Rules] = {r.name: r for r in (GRADIENT, RELP, CP_LRP, ATTN_LRP, GIM, DEEPLIFT)}


def preset(name: str) -> Rules:
    """The preset of that name, upper or lower case, `-` or `_`.

    Raises:
        ValueError: there is none.
    """
    key = name.upper().replace("-", "_")
    if key not in PRESETS:
        raise ValueError(
            f"rules must be one of {', '.join(PRESETS)}; got {name!r}; "
            "build your own with Rules(...) or RELP.with_(...)"
        )
    return PRESETS[key]
