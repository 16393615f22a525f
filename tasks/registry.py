"""Which tasks there are, by name, for the command and for sweeps over tasks.

Each is one file of this package with a function `name(tokenizer, pairs, seed) -> Task`; its lines
here are all that makes it known. A task whose constructions or corruptions are tasks of their own
has a line for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tasks.task import Task

__all__ = ["TASKS", "about", "builder", "check_task", "known_circuit"]


class Known(NamedTuple):
    """Where a task is made: a function of the module of its name, and what it is given."""

    function: str
    options: Mapping[str, str] = MappingProxyType({})


TASKS = {
    "ioi": Known("ioi"),
    "ioi_abc": Known("ioi", {"corruption": "abc"}),
    "greater_than": Known("greater_than"),
    "gendered_pronoun": Known("gendered_pronoun"),
    "subject_verb_simple": Known("subject_verb", {"structure": "simple"}),
    "subject_verb_prepositional": Known("subject_verb", {"structure": "prepositional"}),
    "subject_verb_relative": Known("subject_verb", {"structure": "relative"}),
    "induction": Known("induction"),
    "docstring": Known("docstring"),
    "colored_objects": Known("colored_objects"),
    "capital_country": Known("capital_country"),
    "arithmetic": Known("arithmetic"),
    "multiple_choice": Known("multiple_choice"),
}
"""The tasks by name."""


def builder(name: str) -> Callable[..., Task]:
    """The function that makes a task of a tokenizer.

    >>> from tasks.registry import builder
    >>> builder("ioi")(model.tokenizer, pairs=4, seed=0).name
    'ioi'

    Raises:
        ValueError: there is no such task.
    """
    check_task(name)
    function, options = TASKS[name]
    found: Callable[..., Task] = getattr(import_module(f"tasks.{function}"), function)
    return partial(found, **options) if options else found


def about(name: str) -> str:
    """What a task is called in the field, and which of its forms it is.

    >>> from tasks.registry import about
    >>> about("ioi_abc")
    'Indirect object identification (abc)'

    Raises:
        ValueError: there is no such task.
    """
    check_task(name)
    function, options = TASKS[name]
    made = getattr(import_module(f"tasks.{function}"), function)
    title = (made.__doc__ or "").strip().partition(":")[0]
    return f"{title} ({', '.join(options.values())})" if options else title


def known_circuit(name: str, model_name: str) -> dict[str, tuple[str, ...]]:
    """The circuit that was published for a task and a model: roles, and the components of each.

    >>> from tasks.registry import known_circuit
    >>> known_circuit("ioi", "gpt2")["duplicate token"]
    ('L0H1', 'L0H10', 'L3H0')

    Raises:
        ValueError: there is no such task, or none is known of this task and model.
    """
    check_task(name)
    module = import_module(f"tasks.{TASKS[name].function}")
    if not hasattr(module, "known_circuit"):
        raise ValueError(
            f"the task must be one whose circuit was published; none is known of {name!r}; judge "
            "circuits by exact patching, or by planted ones"
        )
    found: dict[str, tuple[str, ...]] = module.known_circuit(model_name)
    return found


def check_task(name: str) -> None:
    """Raises ValueError if there is no task of that name; nothing is imported for it."""
    if name not in TASKS:
        raise ValueError(
            f"the task must be one of {', '.join(TASKS)}; got {name!r}; `relp tasks` lists them"
        )
