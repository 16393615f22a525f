"""What a run met: every operation that carried relevance, the rule it got, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import pandas as pd

from relp.operations import Entry, label
from relp.propagation.kinds import UnknownOperationError
from relp.rulebook import KINDS, Rules

__all__ = ["Tally", "must_have_attached"]


class Tally:
    """Counts of operations by name, kind, rule and module; the registrations that were used."""

    def __init__(self, rules: Rules, *, strict: bool) -> None:
        self.rules = rules
        self.strict = strict
        self._counts: Counter[tuple[str, str, str, str]] = Counter()
        self._attached: set[tuple[str, str]] = set()
        self._used: dict[int, Entry] = {}

    def count(self, where: str, name: str, kind: str, rule: str) -> None:
        """An operation in a module got a rule."""
        self._counts[name, kind, rule, where] += 1
        if self.rules.places:
            deciding = self.rules.deciding(where)
            self._attached |= {(pattern, k) for pattern, k, _ in deciding if k == kind}

    def use(self, registration: Entry) -> None:
        """An operation got its rule from `register`."""
        self._used[id(registration)] = registration

    @property
    def name(self) -> str:
        """The name of the rules, with the registrations that were used."""
        labels = ", ".join(sorted(set(map(label, self._used.values()))))
        return f"{self.rules.name} + {labels}" if labels else self.rules.name

    def refuse(self, where: str, name: str, kind: str) -> None:
        """An operation without a rule: an error, unless its derivative is welcome."""
        if self.rules.only_derivatives or not self.strict:
            return self.count(where, name, kind, "derivative")
        place = repr(where) if where else "the code under propagate"
        if kind == "opaque":
            raise UnknownOperationError(
                f"every operation that carries relevance must have a rule; {name!r} before or in "
                f"{place} hides its operations (a custom autograd function, TorchScript, a fused "
                "kernel, a full backward hook); run the plain implementation, register the module "
                "that holds it with relp.register, or pass strict=False"
            )
        raise UnknownOperationError(
            f"every operation that carries relevance must have a rule; {name!r} in {place} has "
            "none; give it one with relp.register, or pass strict=False to let its derivative "
            "through and see it in the report"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each operation, kind, rule and module."""
        rows = [(*key, count) for key, count in self._counts.items()]
        frame = pd.DataFrame(rows, columns=["operation", "kind", "rule", "module", "count"])
        return frame.sort_values(["kind", "operation", "module"], ignore_index=True)

    def must_find_places(self, names: Iterable[str]) -> None:
        """Rules for some modules (`Rules.at`) fit the names of some."""
        names = list(names)
        for pattern, _ in self.rules.places:
            if not names:
                raise ValueError(
                    "rules for some modules need their names; got none; give the module as "
                    "propagate(rules, root=module)"
                )
            if not any(p == pattern for n in names for p, _, _ in self.rules.deciding(n)):
                raise ValueError(
                    f"the pattern {pattern!r} must fit the name of a module; it fits none of "
                    f"{names[1:4]} …; see the column `module` of coverage"
                )

    @property
    def attached(self) -> frozenset[tuple[str, str]]:
        """Pattern and kind of the rules for some modules that met an operation there."""
        return frozenset(self._attached)


def must_have_attached(rules: Rules, attached: Collection[tuple[str, str]]) -> None:
    """Rules for some modules must have met an operation of their kind there.

    Raises:
        ValueError: one has not.
    """
    for pattern, changes in rules.places:
        for kind, _ in changes:
            if kind in KINDS and (pattern, kind) not in attached:
                raise ValueError(
                    f"a rule for some modules must meet an operation there; no {kind!r} that "
                    f"carries relevance was met in {pattern!r}; see coverage for what is there"
                )
