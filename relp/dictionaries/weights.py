"""What lies in a file: tensors and settings, or one sentence about why they cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Weights", "json_of", "npz_of", "safetensors_of"]


@dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of one file, by name."""

    source: str
    """For messages: the file."""
    tensors: Mapping[str, Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, *names: str, of: str) -> Tensor:
        """The tensor with the first of these names that is there, as float32.

        Args:
            names: what it is called, here or there.
            of: what kind of dictionary needs it, for the message.

        Raises:
            ValueError: there is none, or it holds NaN or infinity.
        """
        name = next((n for n in names if n in self.tensors), None)
        if name is None:
            raise ValueError(
                f"{self.source!r} must hold {' or '.join(names)}, as {of} has it; it holds "
                f"{', '.join(sorted(self.tensors)) or 'nothing'}; save it again in full"
            )
        tensor = self.tensors[name].detach().float()
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{self.source!r}: weights must be finite; {name} holds {bad} NaN or infinite "
                f"numbers of {tensor.numel()}; take a checkpoint from before training diverged"
            )
        return tensor

    def only(self, names: set[str], of: str) -> None:
        """Refuses tensors that would be left unused, where no setting says what a file is.

        Raises:
            ValueError: there are some.
        """
        if more := sorted(self.tensors.keys() - names):
            raise ValueError(
                f"{self.source!r}: {of} must hold nothing but {', '.join(sorted(names))}; got "
                f"{', '.join(more)} too, so it is of another kind; build a relp.Dictionary from "
                "its tensors"
            )


def _there(path: Path) -> Path:
    if path.is_file():
        return path
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    raise FileNotFoundError(
        f"{str(path)!r} must be a file of a dictionary; there is none; beside it lie "
        f"{', '.join(beside[:8]) or 'no files'}; fetch it, or name another path"
    )


def safetensors_of(path: Path) -> Weights:
    """The tensors of a .safetensors file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none.
    """
    try:
        return Weights(str(path), load_file(_there(path)))
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} must be a whole .safetensors file; it cannot be read ({error}); fetch "
            "it again (a few lines of text are a pointer of Git LFS)"
        ) from error


def npz_of(path: Path) -> Weights:
    """The arrays of a .npz file; pickled objects in it are refused.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none, or holds pickled objects.
    """
    try:
        with np.load(_there(path), allow_pickle=False) as arrays:
            return Weights(str(path), {n: torch.from_numpy(arrays[n]) for n in arrays.files})
    except (ValueError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{str(path)!r} must be a .npz file of plain arrays; it cannot be read without "
            f"unpickling ({error}); save it again with numpy.savez of arrays of numbers"
        ) from error


def json_of(path: Path) -> dict[str, Any]:
    """The settings of a .json file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no JSON object.
    """
    try:
        found = json.loads(_there(path).read_text(encoding="utf-8"))
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(
            f"{str(path)!r} must hold a JSON object of settings; got "
            f"{found if isinstance(found, ValueError) else type(found).__name__}; fetch it again"
        )
    return found
