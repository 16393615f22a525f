"""Exact effects: what patching a component or an edge really does."""

from typing import TYPE_CHECKING

from relp import lazy

if TYPE_CHECKING:
    from circuits.exact.cells import Cell
    from circuits.exact.runs import Runs, measure
    from circuits.exact.shards import merge_effects
    from circuits.exact.sweep import Sweep, merge

__all__ = ["Cell", "Runs", "Sweep", "measure", "merge", "merge_effects"]

lazy.lazily(
    __name__,
    {"cells": "Cell", "runs": "Runs measure", "shards": "merge_effects", "sweep": "Sweep merge"},
)
