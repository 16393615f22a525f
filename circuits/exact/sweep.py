"""What exact effects have been measured so far, cell by cell, and the file that keeps them.

The file is a `.safetensors` one: the numbers of a `Sweep`, and in its header the cells that they
are of and what makes a sweep the same sweep. It is whole whenever the work is interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from textwrap import shorten
from time import monotonic
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from circuits.exact.cells import Cell
from relp import TaskLike, written_whole
from relp.bridge import Features, Sites, fingerprint, fingerprints, versions

__all__ = [
    "Sweep",
    "identity",
    "merge",
    "must_be_alike",
    "must_measure_alike",
    "precision",
    "safetensors_path",
]

SECONDS = 5.0
"""How much work an interrupted sweep may lose."""
NUMBERS = ("effects", "clean", "corrupt", "resolution")
"""The tensors of a sweep."""


def identity(
    sites: Sites,
    task: TaskLike,
    direction: str,
    ablation: str,
    features: Sequence[Features] = (),
) -> dict[str, str]:
    """What makes a sweep the same sweep, whichever cells it is of.

    `features`: of dictionaries; which of them are kept says what the rest is.
    """
    dtype, weights = fingerprint(sites.model)
    prompts = [task.clean, task.corrupt, task.lengths, task.answers, task.foils, task.spans["end"]]
    if task.metric.targets is not None:
        prompts.append(task.metric.targets)
    return {
        "model": sites.model_name,
        "task": task.name,
        "metric": task.metric.name,
        "direction": direction,
        "ablation": ablation,
        "prompts": hashlib.sha256(str([t.tolist() for t in prompts]).encode()).hexdigest()[:16],
        "neurons": " ".join(sites.neurons),
        "dictionaries": fingerprints(features),
        "features": " ".join(f.name(n) for f in features for n in f.kept),
        "dtype": dtype,
        "weights": weights,
        "versions": versions(),
    }


@dataclass(frozen=True, eq=False)
class Sweep:
    """What is measured of some cells; NaN is what is not yet.

    >>> from circuits.exact import Cell, measure
    >>> sweep = measure(model, task, [Cell("L3H5", pos=15)])
    >>> sweep[Cell("L3H5", pos=15)]            # the effect on each pair
    """

    identity: Mapping[str, str]
    """What it is a sweep of, see `identity`."""
    cells: tuple[Cell, ...]
    """What each column of the effects is of."""
    effects: Float[Tensor, "pair cell"]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]
    resolution: Float[Tensor, " pair"]
    """Effects up to this are rounding: the last place of the pair's larger metric, or by how much
    runs differ in which nothing is changed."""

    @cached_property
    def column(self) -> Mapping[Cell, int]:
        """The place of each cell."""
        return {cell: i for i, cell in enumerate(self.cells)}

    def __getitem__(self, cell: Cell) -> Float[Tensor, " pair"]:
        if cell not in self.column:
            raise KeyError(
                f"a cell of the sweep must be asked for; {str(cell)!r} is none of its "
                f"{len(self.cells):,}; see `cells`, or measure it too"
            )
        return self.effects[:, self.column[cell]]

    def of(self, cells: Sequence[Cell]) -> Sweep:
        """The same sweep with these cells, each once; NaN where it does not know one."""
        cells = tuple(dict.fromkeys(cells))
        if cells == self.cells:
            return self
        known = [self.column.get(cell, -1) for cell in cells]
        columns = torch.tensor(known, dtype=torch.long)
        effects = self.effects.new_full((len(self.clean), len(cells)), torch.nan)
        effects[:, columns >= 0] = self.effects[:, columns[columns >= 0]]
        return replace(self, cells=cells, effects=effects)

    @classmethod
    def begun(
        cls, path: Path | None, labels: Mapping[str, str], cells: Sequence[Cell], pairs: int
    ) -> Sweep:
        """What the file knows of these cells, and behind them the others that it holds.

        Raises:
            ValueError: the file holds something else, or is of another identity.
        """
        if path is None or not path.exists():
            clean, corrupt = torch.full((2, pairs), torch.nan)
            effects, resolution = torch.empty(pairs, 0), torch.zeros(pairs)
            return cls(labels, (), effects, clean, corrupt, resolution).of(cells)
        found = cls.load(path, "`resume`")
        if name := _differing(found.identity, labels):
            was, now = found.identity.get(name), labels.get(name)
            raise ValueError(
                f"`resume` must be the file of the same sweep; {str(path)!r} differs in "
                f"{name}: {was!r}, now {now!r}; choose another name, or delete it"
            )
        return found.of((*cells, *found.cells))

    @classmethod
    def load(cls, path: str | Path, argument: str = "`path`") -> Sweep:
        """Reads the file that a sweep was kept in, finished or not; `argument`: what gave it.

        Raises:
            ValueError: it holds something else.
            OSError: the file does not exist or cannot be read.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                labels, names = json.loads(header["relp.sweep"]), header["relp.cells"].split()
                numbers = {name: file.get_tensor(name) for name in NUMBERS}
            return cls(labels, tuple(map(Cell.parse, names)), **numbers)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{argument} must be a file that an interrupted sweep wrote; {str(path)!r} is not "
                f"({error}); choose another name"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes it as `load` reads it.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        header = {"relp.sweep": json.dumps(dict(self.identity)), "relp.cells": self._names}
        with written_whole(Path(path)) as temporary:
            temporary.write_bytes(to_bytes({n: getattr(self, n) for n in NUMBERS}, header))

    @cached_property
    def _names(self) -> str:
        return " ".join(map(str, self.cells))

    @contextmanager
    def kept(self, path: Path | None) -> Iterator[Callable[[], None]]:
        """Gives a function to call after each batch, which saves now and then; so does the end."""
        if path is None:
            yield lambda: None
            return
        self.save(path)  # a folder that cannot be written is noticed before the work
        last = monotonic()

        def now_and_then() -> None:
            nonlocal last
            if monotonic() - last > SECONDS:
                self.save(path)
                last = monotonic()

        try:
            yield now_and_then
        finally:
            self.save(path)

    def interrupted(self, path: Path | None) -> str:
        """What to say to whom has interrupted it: what is kept, and how to go on."""
        if path is None:
            return (
                "interrupted: nothing is kept; give `resume='sweep.safetensors'` to keep what is "
                "finished and to go on from there"
            )
        done, all_ = int((~self.effects.isnan()).sum()), self.effects.numel()
        return (
            f"interrupted: {done:,} of {all_:,} effects are kept in {str(path)!r}; make the same "
            "call again, with this `resume`, to go on"
        )

    def take(self, part: Sweep) -> None:
        """Takes over what another process has measured of some of the cells, on all pairs.

        Raises:
            ValueError: its runs have given other metrics.
        """
        eps = precision(self.identity["dtype"])
        for side in ("clean", "corrupt"):
            here, there = getattr(self, side), getattr(part, side)
            if _differ(here, there, eps, scale=here):
                raise ValueError(
                    f"a worker's model must do what the one of this process does; its {side} "
                    f"metrics differ by up to {float((here - there).abs().max()):.2g}; let the "
                    "recipe set the hooks that the model has here"
                )
        self.effects[:, [self.column[cell] for cell in part.cells]] = part.effects
        torch.maximum(self.resolution, part.resolution, out=self.resolution)

    def note(
        self,
        side: str,
        index: Int[Tensor, " row"],
        found: Float[Tensor, " row"],
        *,
        eps: float,
        noise: float,
    ) -> None:
        """Keeps the metric of some pairs' `clean` or `corrupt` run, and how fine it is.

        `eps`: the precision of the model; `noise`: by how much runs differ that are not changed.

        Raises:
            ValueError: the sweep goes on, and the metric was another.
        """
        metric: Tensor = getattr(self, side)
        now = found.float().cpu()
        if _differ(metric[index], now, eps, scale=now):
            raise ValueError(
                "`resume` must be the file of a sweep of this very model; the metric of its runs "
                "is another now; choose another name, or load the weights of then"
            )
        metric[index] = now
        finest = torch.maximum(self.resolution[index], eps * now.abs())
        self.resolution[index] = finest.clamp(min=noise)


def _differ(
    one: Float[Tensor, "*row"], other: Float[Tensor, "*row"], eps: float, *, scale: Tensor
) -> bool:
    """Whether runs with metrics up to `scale` cannot have given both, as far as both are known."""
    # batches of another size, as after memory ran out, round differently
    tolerance = max(1e-3, 8 * eps) * (1 + scale.nan_to_num().abs().max())
    return bool(((one - other).abs() > tolerance).any())


def must_be_alike(what: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuses to merge what is not of the same model, task and options.

    Raises:
        ValueError: they differ; it names the first label that does.
    """
    if name := _differing(one, other):
        was, now = (shorten(repr(of.get(name)), 100, placeholder=" …") for of in (one, other))
        raise ValueError(
            f"{what} to merge must be of the same model, task and options; they differ in "
            f"{name}: {was} and {now}; keep them apart"
        )


def must_measure_alike(what: str, one: Any, other: Any, eps: float, *numbers: str) -> None:
    """Refuses to merge what the same runs have given other numbers.

    `numbers`: what must be alike; `eps`: the precision of the model.

    Raises:
        ValueError: they differ by more than rounding.
    """
    for name in numbers:
        mine, theirs = getattr(one, name), getattr(other, name)
        if _differ(mine, theirs, eps, scale=torch.stack([one.clean, one.corrupt])):
            raise ValueError(
                f"{what} to merge must be of one and the same model; their {name} differ by up to "
                f"{float((mine - theirs).nan_to_num().abs().max()):.2g}; measure one of them anew, "
                "without hooks that the other did not have"
            )


def precision(dtype: str) -> float:
    """Of the coarsest of a model's dtypes, `float32+bfloat16`; 0 if it has none."""
    dtypes = [getattr(torch, name) for name in dtype.split("+") if name]
    return max((torch.finfo(d).eps for d in dtypes), default=0.0)


def safetensors_path(path: str | Path, argument: str) -> Path:
    """The path of a sweep's file.

    Raises:
        ValueError: it has another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{argument} must be a .safetensors file; got {path.name!r}; change the suffix"
        )
    return path


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The first label in which two identities differ; empty if they do not."""
    return next((name for name in {**other, **one} if one.get(name) != other.get(name)), "")


# -- shards ----------------------------------------------------------------------------------------


def merge(*parts: Sweep | str | Path, into: str | Path | None = None) -> Sweep:
    """One sweep of what several have measured, such as shards of a list of cells.

    >>> from circuits.exact import Cell, measure, merge
    >>> for name in ("L3H4", "L3H5"):                             # on two machines
    ...     part = measure(model, task, [Cell(name)], resume=f"{name}.safetensors")
    >>> sweep = merge("L3H4.safetensors", "L3H5.safetensors", into="both.safetensors")
    >>> effect = patch(model, task, components=["L3H4", "L3H5"], positions=False,
    ...                resume="both.safetensors")                 # measures what is missing

    Args:
        parts: sweeps, or files that `resume` has kept, finished or not. Of a cell that several have
            measured, the first is taken.
        into: a `.safetensors` file for the result, that `resume` goes on from.

    Raises:
        ValueError: there are no parts, they are not of the same model, task and options, or the
            same runs or cells have given them other numbers.
    """
    sweeps = [part if isinstance(part, Sweep) else Sweep.load(part, "a part") for part in parts]
    if not sweeps:
        raise ValueError("`parts` must be sweeps or their files; got none; give at least one")
    whole = reduce(_both, sweeps)
    if into is not None:
        whole.save(safetensors_path(into, "`into`"))
    return whole


def _both(one: Sweep, other: Sweep) -> Sweep:
    """What either has measured."""
    must_be_alike("sweeps", one.identity, other.identity)
    one = one.of((*one.cells, *other.cells))
    other = other.of(one.cells)
    eps = precision(one.identity["dtype"])
    must_measure_alike("sweeps", one, other, eps, "clean", "corrupt", "effects")
    return replace(
        one,
        effects=torch.where(one.effects.isnan(), other.effects, one.effects),
        clean=torch.where(one.clean.isnan(), other.clean, one.clean),
        corrupt=torch.where(one.corrupt.isnan(), other.corrupt, one.corrupt),
        resolution=torch.maximum(one.resolution, other.resolution),
    )
