"""For the reference: examples of docstrings (`>>> …` and what comes) are blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*\n?(?:(?P=indent).*\S.*\n?)*", re.M)


class Examples(griffe.Extension):
    """Fences them, so that Markdown does not take `>>>` for a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Every docstring, as it is read."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(example: re.Match[str]) -> str:
    """The lines of an example, as a block of the language `pycon`."""
    indent, lines = example["indent"], example[0].rstrip("\n")
    return f"{indent}```pycon\n{lines}\n{indent}```\n"
