"""The bar of a sweep: what is left to run, and why it is slow where it is."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

from relp.bridge import Sites

__all__ = ["Progress"]


class Progress:
    """A bar over the work that will be done: what changes nothing is not run, and not counted."""

    def __init__(self, pairs: int, *, shown: bool) -> None:
        self._pairs = self._left = pairs
        self._runs = self._all = self._held = 0
        self._told = False
        # an average rate: cells are of all sizes
        self._bar = tqdm(
            total=0, desc="exact effects", disable=not shown, leave=False, smoothing=0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self) -> None:
        """All pairs are (again) to come."""
        self._left = self._pairs

    def expect(self, work: int, pairs: int, *, runs: int, held: int) -> None:
        """What the next pairs take; those after them are expected to take as much each.

        `runs`: changed runs; `held`: bytes of activations that they begin from.
        """
        self._bar.total = self._bar.n + work * self._left // pairs
        self._all = self._runs + runs * self._left // pairs
        self._held = max(self._held, held)
        self._left -= pairs
        self._say()
        self._bar.refresh()

    def advance(self, work: int, runs: int) -> None:
        """Some of it is done."""
        self._runs += runs
        self._say()
        self._bar.update(work)

    def _say(self) -> None:
        said = f"{self._runs:,} of {self._all:,} runs, {self._held / 1e9:.2g} GB kept"
        self._bar.set_postfix_str(said, refresh=False)

    def say_slow(self, sites: Sites, task: Any) -> None:
        """Once: that, and why, a run cannot begin at the position of its change."""
        if self._told or self._bar.disable:
            return
        self._told = True
        why = f"{sites.model_name!r} keeps no keys and values to go on from"
        if not task.metric.reads_answer_only:
            why = f"the metric {task.metric.name!r} may read all positions"
        self._bar.write(
            f"exact effects: each run is of all positions, because {why}; it takes 2 to 3 times as "
            "long as one from the change on",
            file=sys.stderr,
        )
