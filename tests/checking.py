"""The annotations of each function are checked at its first calls in a test, then taken as right.

At every call the checks would take most of the time of the tests; and jaxtyping would make them
anew whenever a function inside a function is defined. To be imported before what is checked.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping

CALLS = 4
calls: Counter[int] = Counter()
"""By the code's identity, in this test."""
defined: set[int] = set()
"""Functions inside functions that have their checks."""


def jaxtyped(original: Any = jaxtyping.jaxtyped, **options: Any) -> Callable[[Any], Any]:
    """In place of jaxtyping's decorator, which its import hook puts everywhere."""
    decorate = original(**options)

    def decorated(function: Any) -> Any:
        if not inspect.isfunction(function):
            return decorate(function)
        code = id(function.__code__)
        if "<locals>" in function.__qualname__:
            if code in defined:
                return function
            defined.add(code)
        checked = decorate(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if calls[code] >= CALLS:
                return function(*args, **kwargs)
            calls[code] += 1
            return checked(*args, **kwargs)

        return call

    return decorated


jaxtyping.jaxtyped = jaxtyped
