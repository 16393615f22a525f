"""Running the model: activations at its sites, and the metric."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from threading import RLock, get_ident
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relp.bridge.basis import bias, device_of, is_plain, shape, weight
from relp.bridge.sites import Edit, Sites, editing, reading
from relp.protocols import TaskLike

__all__ = [
    "answers_only",
    "entries",
    "observe",
    "output_shapes",
    "own_forward",
    "precise_logits",
    "skipping",
    "undisturbed",
    "warn_caller",
]

_AT_WORK: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""A lock for each model: what a verb puts on it is there for one of them at a time."""

P = ParamSpec("P")
R = TypeVar("R")

OURS = ("relp", "circuits", "tasks")
"""Whose frames are no caller's."""
ROWS = 8192
"""Rows of the unembedding's matrix that are widened to float32 at a time."""


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """A verb that computes the same whatever modes of torch its caller is in.

    Those are `no_grad`, `inference_mode`, `autocast` (half precision in places), a default dtype,
    and compiled modules, which no rule and no hook could reach: they run as they are written.
    Verbs that several threads call on one model run one after another.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with ExitStack() as stack:
            if isinstance(model, nn.Module):
                stack.enter_context(_AT_WORK.setdefault(model, RLock()))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda", "mps", "xpu"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            if (default := torch.get_default_dtype()) != torch.float32:
                stack.callback(torch.set_default_dtype, default)
                torch.set_default_dtype(torch.float32)
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return function(*args, **kwargs)

    return run


def warn_caller(message: str) -> None:
    """Warns, with the line outside of this project that has led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def observe(
    sites: Sites,
    task: TaskLike,
    names: tuple[str, ...],
    *,
    side: str,
    moved: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], Float[Tensor, " pair"]]:
    """Activations at the named sites and the metric of one side (`clean`, `corrupt`), no grad.

    `moved`: what is put in the place of values.
    """
    tokens = getattr(task, side).to(sites.device)
    edits = answers_only(sites, task)
    edits |= {name: partial(_instead, value) for name, value in moved.items()}
    with (
        torch.no_grad(),
        precise_logits(sites),
        editing(sites, edits),
        reading(sites, names) as values,
    ):
        metric = task.metric(sites.model(tokens))
    # a hook may make what it returns require grad, also here (gradient checkpointing has one)
    return sites.gathered(values), metric.detach().to(sites.device)


def _instead(value: Tensor, _: Tensor) -> Tensor:
    return value


def answers_only(sites: Sites, task: TaskLike, copies: int = 1, start: int = 0) -> dict[str, Edit]:
    """The edit that hands the unembedding each row's answer position alone, `[row, 1, d_model]`.

    Empty if the metric may read other positions. `copies`: how often the batch repeats the pairs;
    `start`: the first position in the batch (a pair that ends before it gets that one).
    """
    if not task.metric.reads_answer_only:
        return {}
    end = (task.spans["end"] - start).clamp(min=0).to(sites.device).repeat(copies)
    return {"unembed": lambda x: x[torch.arange(len(x), device=x.device), end][:, None]}


@contextmanager
def precise_logits(sites: Sites, tokens: Int[Tensor, " token"] | None = None) -> Iterator[None]:
    """The unembedding of a model in half precision computes in float32.

    Its logits would come in steps (of 1/32 near 6 in bfloat16) in which most effects vanish. If
    `tokens` are given, it computes no logits but theirs, in any precision, and all others are 0.
    Nothing changes where the unembedding is no plain matrix.
    """
    inner = sites.model.unembed.original_component
    half = is_plain(inner) and inner.weight.dtype in (torch.bfloat16, torch.float16)
    if not (half or (is_plain(inner) and tokens is not None)):
        yield
        return
    matrix, offset = weight(inner), bias(inner)
    if tokens is not None:
        chosen = tokens.to(matrix.device)
        matrix, offset = matrix[chosen], None if offset is None else offset[chosen]
    wider = torch.float32 if half else matrix.dtype
    offset = None if offset is None else offset.to(wider)

    def forward(x: Tensor) -> Tensor:
        # in parts: the matrix of a large vocabulary is not there twice
        x = x.to(matrix.device, wider)  # accelerate's own forward would move it
        parts = [_linear(x, m) for m in matrix.split(ROWS)]
        found = torch.cat(parts, -1)
        found = found if offset is None else found + offset
        if tokens is None:
            return found
        logits = found.new_zeros(*x.shape[:-1], shape(inner)[0])
        logits[..., chosen] = found
        return logits

    with own_forward(inner, forward):
        yield


def _linear(x: Tensor, matrix: Float[Tensor, "d_out d_in"]) -> Tensor:
    """As of a matrix of the precision of `x`; its graph keeps the matrix as it is."""
    dtype = x.dtype
    wider = matrix.to(dtype)
    # a graph keeps its hooks and what they hold, so that they hold nothing of the wider matrix
    plain, place, strides = wider is matrix, _place(wider), wider.stride()

    def pack(saved: Tensor) -> Tensor | bool:
        """Which way round the wider matrix would be kept, or what else is."""
        return saved if plain or _place(saved) != place else saved.stride() == strides

    def unpack(packed: Tensor | bool) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        again = matrix.to(dtype)
        return again if packed else again.T

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return nn.functional.linear(x, wider)


def _place(tensor: Tensor) -> int:
    """Whose memory a tensor is in; also of one on `meta`, which has none."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def own_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module runs this in this thread instead of its `forward`; afterwards what it ran before."""
    before, theirs, here = vars(module).get("forward"), module.forward, get_ident()

    def run(*args: Any, **kwargs: Any) -> Any:
        return (forward if get_ident() == here else theirs)(*args, **kwargs)

    # an attribute of the instance hides the method of its class until it is deleted;
    # a bridge's own __setattr__ would set it on the module that it wraps
    object.__setattr__(module, "forward", run)
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:  # a caller's own, or accelerate's
            object.__setattr__(module, "forward", before)


# -- some blocks alone -----------------------------------------------------------------------------


def entries(sites: Sites) -> tuple[str, ...]:
    """Where a run can begin: each block's input, and behind them all the final norm's."""
    return (*(b.name("resid") for b in sites.blocks), "final")


@contextmanager
def output_shapes(sites: Sites) -> Iterator[dict[int, int]]:
    """Notes how each block returns: 0 for a bare tensor, else the length of the tuple."""
    seen: dict[int, int] = {}

    def note(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    with ExitStack() as stack:
        for block in sites.blocks:
            module = sites.model.blocks[block.layer]
            stack.callback(module.register_forward_hook(note(block.layer)).remove)
        yield seen


@contextmanager
def skipping(sites: Sites, layers: Container[int], outputs: Mapping[int, int]) -> Iterator[None]:
    """Blocks of these layers hand their input on, in the form of their `output_shapes`.

    It goes to the block's device, where what comes next may expect it.
    """

    def hand_on(size: int, device: torch.device | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).to(device)
            return (hidden, *[None] * (size - 1)) if size else hidden

        return forward

    with ExitStack() as stack:
        for block in sites.blocks:
            if block.layer in layers:
                module = sites.model.blocks[block.layer]
                forward = hand_on(outputs[block.layer], device_of(module))
                stack.enter_context(own_forward(module, forward))
        yield
