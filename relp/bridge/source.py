"""What a result says of where it comes from: model and weights, task, libraries, prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from relp.bridge.quantized import quantization
from relp.bridge.sites import Sites
from relp.choices import Direction
from relp.protocols import TaskLike
from relp.scores import Pairs, Provenance

__all__ = ["fingerprint", "first_prompt", "pairs_of", "provenance", "token_labels"]

LIBRARIES = ("relp", "torch", "transformers", "transformer-lens")
"""Whose versions can make other numbers."""


def provenance(sites: Sites, task: TaskLike, direction: Direction, rules: str) -> Provenance:
    """Where the numbers of a model on a task come from."""
    dtype, weights = fingerprint(sites.model)
    return Provenance(
        model=sites.model_name,
        task=task.name,
        metric=task.metric.name,
        direction=direction,
        rules=rules,
        versions=versions(),
        dtype=dtype,
        weights=weights,
        quantization=quantization(sites.model),
        compatibility=bool(getattr(sites.model, "compatibility_mode", False)),
    )


def pairs_of(sites: Sites, task: TaskLike, metrics: Mapping[str, Tensor]) -> Pairs:
    """What is known of a task's pairs; `metrics`: of the `clean` and of the `corrupt` run."""
    return Pairs(
        clean=metrics["clean"],
        corrupt=metrics["corrupt"],
        lengths=task.lengths,
        spans=task.spans,
        tokens=token_labels(sites.model, task),
        prompt=first_prompt(sites.model, task),
    )


def fingerprint(model: Any) -> tuple[str, str]:
    """The dtype of a model's weights, and what tells these weights from others.

    A digest of sums over the last axis of each tensor, of its bits read as whole numbers: the same
    on every machine, at the cost of reading the weights once. Weights on a disk are fetched.
    """
    from accelerate.utils import align_module_device  # not at the top: it takes a second

    digest, dtypes = hashlib.sha256(), set()
    for module in getattr(model, "original_model", model).modules():
        if not (module._parameters or module._buffers):  # most: to align them all takes a while
            continue
        with align_module_device(module) if hasattr(module, "_hf_hook") else nullcontext():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                if tensor.is_floating_point():
                    dtypes.add(str(tensor.dtype).removeprefix("torch."))
                digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_sums(tensor.detach()).cpu().numpy().data)
    return "+".join(sorted(dtypes)), digest.hexdigest()[:16]


def _sums(tensor: Tensor) -> Tensor:
    """Sums of a tensor's bits over its last axis, as whole numbers that may overflow."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.reshape(1, -1)
    flat = torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat
    bits = flat.view(whole[flat.element_size()])
    return bits.sum(-1, dtype=bits.dtype)  # a wider sum would be twenty times as slow


@cache
def versions() -> str:
    """`relp 0.1.0, torch 2.13.0, …`: what computes."""
    return ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # used from a checkout
        return "not installed"


def token_labels(model: Any, task: TaskLike) -> tuple[str, ...]:
    """What stands at each position of the clean prompts, if all have one length.

    The token where all pairs have the same one, else the span that is there in all pairs, or "".
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or len(task.lengths.unique()) > 1:
        return ()
    labels = [""] * task.clean.shape[1]
    for name, at in task.spans.items():
        if len(at.unique()) == 1:
            labels[int(at[0])] = name
    for pos, column in enumerate(task.clean.T):
        if len(column.unique()) == 1:
            labels[pos] = tokenizer.decode([int(column[0])])
    return tuple(labels)


def first_prompt(model: Any, task: TaskLike) -> tuple[str, ...]:
    """The tokens of the first clean prompt, or empty if the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not len(task):
        return ()
    tokens = task.clean[0, : int(task.lengths[0])].tolist()
    return tuple(tokenizer.decode([token]) for token in tokens)
