"""The tasks by name, for the command and for sweeps over tasks.

Each is one file of this package with a function `name(tokenizer, pairs, seed) -> Task`; its line
here is all that makes it known.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.task import Task

__all__ = ["TASKS", "builder", "check_task"]

TASKS = {"ioi": "tasks.ioi"}
"""The module of each task."""


def builder(name: str) -> Callable[..., Task]:
    """The function that makes a task of a tokenizer; its first line says what the task is.

    >>> from tasks.registry import builder
    >>> builder("ioi")(model.tokenizer, pairs=4, seed=0).name
    'ioi'

    Raises:
        ValueError: there is no such task.
    """
    check_task(name)
    found: Callable[..., Task] = getattr(import_module(TASKS[name]), name)
    return found


def check_task(name: str) -> None:
    """Raises ValueError if there is no task of that name; nothing is imported for it."""
    if name not in TASKS:
        raise ValueError(
            f"the task must be one of {', '.join(TASKS)}; got {name!r}; `relp tasks` lists them"
        )
