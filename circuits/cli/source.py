"""Where the pairs of a command come from: a task by name, or a file of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.markup import escape

from circuits.cli.screen import say
from tasks.registry import TASKS, builder, check_task
from tasks.tables import SUFFIXES, Table, columns_of, read_table

__all__ = ["Drawn", "File", "source_of"]


@dataclass(frozen=True)
class Drawn:
    """A task that is known by name, which draws as many pairs as are asked for."""

    name: str

    @property
    def identity(self) -> str:
        """What tells it from others."""
        return self.name

    def draw(self, tokenizer: Any, pairs: int, seed: int) -> Any:
        """Some pairs; the task is imported now."""
        return builder(self.name)(tokenizer, pairs=pairs, seed=seed)

    def others(self, tokenizer: Any, pairs: int, seed: int) -> tuple[Any, str]:
        """As many pairs that are drawn anew, and which these are."""
        return self.draw(tokenizer, pairs, seed + 1), f"the pairs of seed {seed + 1}"


@dataclass(frozen=True)
class File:
    """A file of prompts, which has as many pairs as it has rows."""

    name: str
    rows: Table

    @property
    def identity(self) -> str:
        """What tells it from others, and from what may stand in the file later."""
        digest = hashlib.sha256(repr(self.rows.columns).encode()).hexdigest()[:16]
        return f"{self.rows.source} ({digest})"

    def draw(self, tokenizer: Any, pairs: int, seed: int) -> Any:
        """The first rows, or the first after a shuffle; how many is said."""
        order = self._order(seed)[:pairs]
        of = f"all {len(self.rows)} rows"
        if len(order) < len(self.rows):
            drawn = f"{len(order)} rows drawn by seed {seed}" if seed else f"the first {len(order)}"
            of = f"{drawn} of {len(self.rows):,} rows (--pairs)"
        say(f"{escape(self.rows.source)}: {of}")
        return self._of(tokenizer, order)

    def others(self, tokenizer: Any, pairs: int, seed: int) -> tuple[Any, str]:
        """The rows that come next, and which these are; none if there is no row left."""
        order = self._order(seed)[pairs : 2 * pairs]
        if not order:
            return None, (
                f"{escape(self.rows.source)} has no rows but those that the edges were scored on; "
                "give fewer --pairs, or more rows"
            )
        return self._of(tokenizer, order), f"{len(order)} other rows of {self.rows.source}"

    def _order(self, seed: int) -> list[int]:
        order = list(range(len(self.rows)))
        if seed:
            Random(seed).shuffle(order)
        return order

    def _of(self, tokenizer: Any, order: Sequence[int]) -> Any:
        from tasks import Task

        return Task.from_table(tokenizer, self.rows.select(order), name=self.name)


def source_of(name: str) -> Drawn | File:
    """Where the pairs come from: a task, or a file, which is read now."""
    path = Path(name)
    if name in TASKS or not (path.suffix.lower() in SUFFIXES or path.is_file()):
        check_task(name)
        return Drawn(name)
    if not path.is_file():
        raise ValueError(
            f"the task must be one of {', '.join(TASKS)}, or a file of prompts; there is no file "
            f"{name!r}; check the path"
        )
    rows = read_table(path)
    columns_of(rows)
    return File(path.stem, rows)
