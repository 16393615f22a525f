"""Running the model: activations of both runs, and coefficients at the sites of one of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from threading import RLock, get_ident
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relp.bridge.basis import bias, is_plain, shape, weight
from relp.bridge.capture import ROOT, Capture
from relp.bridge.sites import Edit, Sites, editing, reading
from relp.propagation import Propagation, propagate
from relp.protocols import TaskLike
from relp.rulebook import Rules

__all__ = [
    "answers_only",
    "capture",
    "captures",
    "observe",
    "own_forward",
    "precise_logits",
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
    sites: Sites, task: TaskLike, names: tuple[str, ...], *, side: str
) -> tuple[dict[str, Tensor], Float[Tensor, " pair"]]:
    """Activations at the named sites and the metric of one side (`clean`, `corrupt`), no grad."""
    tokens = getattr(task, side).to(sites.device)
    edits = answers_only(sites, task)
    with (
        torch.no_grad(),
        precise_logits(sites),
        editing(sites, edits),
        reading(sites, names) as values,
    ):
        metric = task.metric(sites.model(tokens))
    # a hook may make what it returns require grad, also here (gradient checkpointing has one)
    return sites.gathered(values), metric.detach().to(sites.device)


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
        parts = [nn.functional.linear(x, m.to(wider)) for m in matrix.split(ROWS)]
        found = torch.cat(parts, -1)
        found = found if offset is None else found + offset
        if tokens is None:
            return found
        logits = found.new_zeros(*x.shape[:-1], shape(inner)[0])
        logits[..., chosen] = found
        return logits

    with own_forward(inner, forward):
        yield


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


def capture(
    sites: Sites,
    task: TaskLike,
    rules: Rules,
    names: tuple[str, ...],
    *,
    own: str,
    strict: bool = True,
) -> Capture:
    """Two forward passes and one backward: the coefficients of the `own` side.

    For rules that are partway, two backward passes.

    Raises:
        RuntimeError: a site was not passed, or no relevance reaches one that must get some.
    """
    other = "corrupt" if own == "clean" else "clean"
    names = tuple(dict.fromkeys([ROOT, *names]))
    with propagate(rules, root=sites.model, strict=strict) as report:
        values, metric = _differentiable(sites, task, names, own, rules, report, {})
    slopes: dict[str, Tensor] = {}
    if rules.partway:  # before there is a reference run: the less is kept for it
        with report.with_itself():
            slopes = sites.gathered(_coefficients(metric, values, rules, again=True))
    with ExitStack() as stack:
        if rules.needs_reference:
            stack.enter_context(report.reference())
        others, other_metric = observe(sites, task, names, side=other)
    coefficients = sites.gathered(_coefficients(metric, values, rules))
    values = sites.gathered(values)
    unexplained = {
        f"{row.module}: {row.operation}": float(row.remainder)
        for row in report.remainder().itertuples()
    }
    return Capture(
        values, others, values, others, coefficients, metric.detach(), other_metric,
        remainder=unexplained, rules=report.name, slopes=slopes,
    )  # fmt: skip


def captures(
    sites: Sites,
    task: TaskLike,
    rules: Rules,
    names: tuple[str, ...],
    *,
    own: str,
    steps: int,
    path: str = "inputs",
    strict: bool = True,
) -> Iterator[Capture]:
    """Captures whose scores are to be averaged: one on the own side, or along a path.

    With `steps` > 1 the runs lie midway in each of `steps` equal parts of the line between own
    and other run (integrated gradients). `path="inputs"`: of the input embeddings (EAP-IG inputs,
    arXiv:2403.17806). `path="activations"`: of one writing site at a time, what comes before it
    being the own run's (EAP-IG activations, ibid.; a layer's heads move together, and so do its
    neurons where they are among `names`).

    Raises:
        RuntimeError: as `capture`.
    """
    if steps == 1:
        yield capture(sites, task, rules, names, own=own, strict=strict)
        return
    # an MLP's output that is put in would cut its neurons off from the metric
    inside = {b.name("mlp"): b.name("neurons") for b in sites.blocks if b.name("neurons") in names}
    written = [inside.get(site, site) for site in sites.written]
    moved = (ROOT,) if path == "inputs" else (ROOT, *written)
    names = tuple(dict.fromkeys([ROOT, *names, *moved]))
    values, metric = observe(sites, task, names, side=own)
    others, other_metric = observe(
        sites, task, names, side="corrupt" if own == "clean" else "clean"
    )
    share = 1 / (steps * len(moved))
    for site in moved:
        for step in range(steps):
            between = torch.lerp(values[site], others[site], (step + 0.5) / steps)
            with propagate(rules, root=sites.model, strict=strict) as report:
                at, middle = _differentiable(
                    sites, task, names, own, rules, report, {site: between}
                )
            coefficients = _coefficients(middle, at, rules, cut=path == "activations")
            coefficients, at = sites.gathered(coefficients), sites.gathered(at)
            yield Capture(
                values, others, at, others, coefficients, metric, other_metric, share,
                rules=report.name,
            )  # fmt: skip


def _differentiable(
    sites: Sites,
    task: TaskLike,
    names: tuple[str, ...],
    side: str,
    rules: Rules,
    report: Propagation,
    moved: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """The run that will be differentiated, from block 0's input on, with some values moved."""
    tokens = getattr(task, side).to(sites.device)

    def leaf(name: str, value: Tensor) -> Tensor:
        return moved.get(name, value).detach().requires_grad_()

    with torch.enable_grad():
        edits: dict[str, Edit] = {n: partial(leaf, n) for n in (ROOT, *moved)}
        edits |= answers_only(sites, task)
        # Where a parallel block's attention and MLP read one tensor, each gets one of its own:
        # the coefficient there must be that of this reader alone.
        edits |= {n: _branch for n in names if n.endswith((".mlp_in", ".mixer_in"))}
        with precise_logits(sites), editing(sites, edits), reading(sites, names) as values:
            logits = sites.model(tokens)
            # Rules that compare two runs must see the metric to be exact through it. For the
            # others it is a plain function: a constant softmax would cut a probability metric off.
            metric = task.metric(logits) if rules.needs_reference else None
        if metric is None:
            with report.paused():
                metric = task.metric(logits)
    report.must_have_seen(metric)
    return values, metric


def _branch(value: Tensor) -> Tensor:
    return value.view_as(value)


def _coefficients(
    metric: Tensor,
    values: Mapping[str, Tensor],
    rules: Rules,
    *,
    cut: bool = False,
    again: bool = False,
) -> dict[str, Tensor]:
    """d metric / d value at each site; `cut`: some lie before a value that was put in.

    `again`: there will be another backward.
    """
    if not metric.requires_grad:
        raise ValueError(
            "the metric must be differentiable in the logits; it does not depend on them, or not "
            "differentiably (argmax, detach); check the metric, and hooks that detach activations"
        )
    # pairs do not meet in the model: the gradient of the sum holds each pair's own gradient
    at = list(values.values())
    grads = torch.autograd.grad(metric.sum(), at, allow_unused=True, retain_graph=again)
    found = {}
    for (name, value), grad in zip(values.items(), grads, strict=True):
        if grad is None:
            # with constant attention patterns nothing reaches queries and keys: a true zero
            if not (cut or (rules.uses("softmax", "constant") and name.endswith((".q", ".k")))):
                raise RuntimeError(
                    f"every site must lie on the path from the input to the metric; {name!r} does "
                    "not; check that no hook detaches activations and that the metric uses logits"
                )
            grad = torch.zeros_like(value)
        found[name] = grad
    return found
