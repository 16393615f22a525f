"""Tasks: prompts whose answer hangs on one thing, and models small enough to ship."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tasks import planted, zoo

if TYPE_CHECKING:
    from tasks.ioi import ioi
    from tasks.metrics import KLDivergence, logit_difference, probability_difference
    from tasks.task import Task

__all__ = [
    "KLDivergence",
    "Task",
    "ioi",
    "logit_difference",
    "planted",
    "probability_difference",
    "zoo",
]

_HOME = {
    "KLDivergence": "metrics",
    "Task": "task",
    "ioi": "ioi",
    "logit_difference": "metrics",
    "probability_difference": "metrics",
}


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
