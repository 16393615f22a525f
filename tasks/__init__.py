"""Tasks: prompts whose answer hangs on one thing, and models small enough to ship."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tasks import planted, zoo

if TYPE_CHECKING:
    from tasks.arithmetic import arithmetic
    from tasks.capital_country import capital_country
    from tasks.colored_objects import colored_objects
    from tasks.docstring import docstring
    from tasks.gendered_pronoun import gendered_pronoun
    from tasks.greater_than import greater_than
    from tasks.induction import induction
    from tasks.ioi import ioi
    from tasks.metrics import (
        Continuation,
        KLDivergence,
        logit_difference,
        mean_logit_difference,
        probability_difference,
    )
    from tasks.multiple_choice import multiple_choice
    from tasks.pair import Pair
    from tasks.registry import known_circuit
    from tasks.subject_verb import subject_verb
    from tasks.task import Task

__all__ = [
    "Continuation",
    "KLDivergence",
    "Pair",
    "Task",
    "arithmetic",
    "capital_country",
    "colored_objects",
    "docstring",
    "gendered_pronoun",
    "greater_than",
    "induction",
    "ioi",
    "known_circuit",
    "logit_difference",
    "mean_logit_difference",
    "multiple_choice",
    "planted",
    "probability_difference",
    "subject_verb",
    "zoo",
]

_HOME = {
    "Continuation": "metrics",
    "KLDivergence": "metrics",
    "Pair": "pair",
    "Task": "task",
    "known_circuit": "registry",
    "logit_difference": "metrics",
    "mean_logit_difference": "metrics",
    "probability_difference": "metrics",
    **{
        name: name
        for name in (
            "arithmetic", "capital_country", "colored_objects", "docstring", "gendered_pronoun",
            "greater_than", "induction", "ioi", "multiple_choice", "subject_verb",
        )
    },
}  # fmt: skip


class _Package(ModuleType):
    """As `relp.lazy`, which this room does not import: a name is imported when it is first used.

    The module `tasks.ioi` does not take the place of the function `ioi`, whoever comes first.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *_HOME})


sys.modules[__name__].__class__ = _Package
