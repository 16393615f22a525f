"""Running the rest of a model again: from one block on, and from one position on.

What comes before a change is as it was. Blocks before it hand their input on, and the first one
that runs gets the residual stream of the own run. Positions before it, which in a causal model
nothing later can change, are keys and values of the own run and no rows of the batch. What changes
behind a block's attention changes what this block hands on at its own position alone. Logits are
computed only where, and of those tokens, that a built-in metric reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from relp.bridge.run import (
    answers_only,
    entries,
    observe,
    output_shapes,
    precise_logits,
    skipping,
)
from relp.bridge.sites import Block, Edit, Sites, editing, reading
from relp.protocols import TaskLike

__all__ = ["POINTWISE", "Rerun"]

POINTWISE = (".z", ".attn", ".mixer", ".mlp_in", ".up", ".gate", ".neurons", ".mlp")
"""Sites of a block behind which positions do not meet before the next block."""
Past = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of each block."""
CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the argument since 5.24, and before."""


@dataclass(frozen=True, eq=False)
class Rerun:
    """The own run of some pairs of one length, and how to continue it from anywhere."""

    sites: Sites
    task: TaskLike
    side: str
    """`clean` or `corrupt`: whose prompts run."""
    values: Mapping[str, Tensor]
    """Activations of the own run, at least those at `entries`."""
    metric: Float[Tensor, " pair"]
    """The metric of the own run."""
    outputs: Mapping[int, int]
    """How each block returns: 0 for a bare tensor, else the length of the tuple."""
    past: Past
    """Each block's keys and values; empty if the model must run all positions."""
    pointwise: bool
    """Whether `behind` holds for this model."""
    sparse: bool
    """Whether the metric is what it was if the unembedding computes the tokens it reads alone."""
    noise: float = 0.0
    """By how much the metric of a run varies that is not changed at all."""

    @classmethod
    def of(cls, sites: Sites, task: TaskLike, names: Iterable[str], *, side: str) -> Rerun:
        """Runs one side, keeps what is at the named sites, and tries to leave positions out.

        Raises:
            RuntimeError: rows of a batch do not stand for themselves.
        """
        names = tuple(dict.fromkeys([*entries(sites), *map(_mixed, sites.blocks), *names]))
        with output_shapes(sites) as outputs:
            values, metric = observe(sites, task, names, side=side)
        tokens = getattr(task, side).to(sites.device)
        past = _keys_values(sites, task, tokens, values["final"])
        rerun = cls(sites, task, side, values, metric, outputs, past, pointwise=True, sparse=True)
        rerun = replace(rerun, pointwise=_is_pointwise(rerun), sparse=_is_sparse(rerun))
        return replace(rerun, noise=_noise(rerun))

    def start(self, first: int) -> int:
        """Where a run must start if nothing before position `first` changes."""
        return first if self.past else 0

    def __call__(
        self, edits: Mapping[str, Edit], *, copies: int, layer: int, start: int
    ) -> Float[Tensor, "copy pair"]:
        """What the edits change in the metric, each copy of the pairs for itself.

        An edit gets `[copy * pair, pos - start, d]`.

        Args:
            edits: what to do at which site.
            copies: how often the pairs are repeated.
            layer: the first block that runs; the number of blocks if only the final norm and the
                unembedding should.
            start: the first position that runs, see `start`.
        """
        tokens = getattr(self.task, self.side)[:, start:].to(self.sites.device)
        entry = entries(self.sites)[layer]
        change = edits.get(entry, lambda x: x)
        stream = self.values[entry][:, start:]
        every = {
            **edits,
            entry: lambda _: change(stream.repeat(copies, 1, 1)),
            **answers_only(self.sites, self.task, copies, start),
        }
        if self.past and layer < len(self.sites.blocks) - 1:
            every |= _last_mlp(self.sites, self.task, copies, start)
        with torch.no_grad(), skipping(self.sites, range(layer), self.outputs):
            read = _tokens_read(self.task) if self.sparse else None
            with precise_logits(self.sites, read), editing(self.sites, every):
                logits = _run(self.sites, tokens.repeat(copies, 1), self.past, start)
            metric = [self.task.metric(part).to(tokens.device)
                      for part in logits.split(len(tokens))]  # fmt: skip
            # a pair that was read out before `start` is as it was
            seen = (self.task.spans["end"] >= start).to(self.metric.device)
            return torch.stack(metric).sub(self.metric) * seen

    def behind(
        self, edits: Mapping[str, Edit], *, layer: int, places: Sequence[int]
    ) -> Float[Tensor, "place pair d_model"]:
        """What a block hands on at single positions if its `POINTWISE` sites are edited.

        An edit gets `[place * pair, 1, d]`.

        Args:
            edits: what to do at which site.
            layer: the block, the only one that runs.
            places: positions; all pairs run at each.
        """
        every: dict[str, Edit] = {**edits, "unembed": lambda x: x[:1]}

        def as_it_was(site: str) -> Edit:
            change = edits.get(site, lambda x: x)
            own = self.values[site][:, places].transpose(0, 1).flatten(0, 1)[:, None]
            return lambda _: change(own)

        # attention sees but one position here: what it would give is put in its place
        for site in (entries(self.sites)[layer], _mixed(self.sites.blocks[layer])):
            every[site] = as_it_was(site)
        tokens = getattr(self.task, self.side).to(self.sites.device)[:, places]
        others = {b.layer for b in self.sites.blocks} - {layer}
        with (
            torch.no_grad(),
            skipping(self.sites, others, self.outputs),
            editing(self.sites, every),
            reading(self.sites, ("final",)) as values,
        ):
            self.sites.model(tokens.T.reshape(-1, 1))
        streams = self.sites.gathered(values)["final"]
        return streams.squeeze(1).unflatten(0, (len(places), -1))


def _mixed(block: Block) -> str:
    """Where a block holds what attention, or the mixer, gave each position."""
    return block.name("z" if block.heads else "mixer")


# -- skipping positions ----------------------------------------------------------------------------


def _run(
    sites: Sites, tokens: Int[Tensor, "row pos"], past: Past, start: int
) -> Float[Tensor, "row read d_vocab"]:
    """The logits of tokens that stand from `start` on, behind the past if there is one."""
    if not past:
        logits: Tensor = sites.model(tokens)
        return logits
    from transformers import Cache

    layers = [_layer(k[:, :, :start], v[:, :, :start]) for k, v in past]
    return _with_cache(sites, tokens, Cache(layers=layers))


def _with_cache(
    sites: Sites, tokens: Int[Tensor, "row pos"], cache: Any
) -> Float[Tensor, "row read d_vocab"]:
    """The logits of a run that reads a cache, and fills it.

    Where transformers hands it on by its new name, the attention that TransformerLens 4.3 puts in
    the place of a model's own still looks for the old one.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    def rename(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        known = "cache" not in kwargs or "layer_past" in kwargs or get_ident() != here
        return args, kwargs if known else {**kwargs, CACHE_NAMES[1]: kwargs["cache"]}

    here = get_ident()
    with ExitStack() as stack:
        for module in sites.model.modules():
            inherited = type(module).forward is AttentionBridge.forward
            # one that hands on to the model's own attention must not: that knows the new name
            if isinstance(module, AttentionBridge) and not inherited:
                hook = module.register_forward_pre_hook(rename, with_kwargs=True)
                stack.callback(hook.remove)
        logits: Tensor = sites.model(tokens, **{str(_cache_name(sites)): cache})
    return logits


def _cache_name(sites: Sites) -> str | None:
    """What the model calls its cache; None if it takes none."""
    parameters = inspect.signature(sites.model.original_model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def _layer(
    keys: Float[Tensor, "pair head past d_head"], values: Float[Tensor, "pair head past d_head"]
) -> Any:
    """One block's part of a cache: every copy of the pairs has the same past, and none is kept."""
    from transformers.cache_utils import DynamicLayer

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        copies = (len(new_keys) // len(keys), 1, 1, 1)
        return (
            torch.cat([keys.repeat(copies), new_keys], -2),
            torch.cat([values.repeat(copies), new_values], -2),
        )

    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.update = keys, values, update
    return layer


def _last_mlp(sites: Sites, task: TaskLike, copies: int, start: int) -> dict[str, Edit]:
    """The last MLP gets the answer position alone, and what it adds is broadcast.

    Right at the answer position, the only one that is read. Not in parallel blocks, some of which
    add attention to the MLP's output in place.
    """
    last = sites.blocks[-1]
    pick = answers_only(sites, task, copies, start)["unembed"]
    return {} if last.parallel else {last.name("mlp_in"): pick}


def _keys_values(
    sites: Sites, task: TaskLike, tokens: Tensor, final: Float[Tensor, "pair pos d_model"]
) -> Past:
    """Keys and values of each block, or nothing if the run cannot be continued from its middle.

    It cannot if the metric reads all positions, in models that read both ways, and in those whose
    state is no keys and values.
    """
    from transformers import DynamicCache

    cache, middle = DynamicCache(), tokens.shape[1] // 2
    if not task.metric.reads_answer_only or _cache_name(sites) is None or not middle:
        return ()
    try:
        with torch.no_grad():
            with editing(sites, answers_only(sites, task)):
                _with_cache(sites, tokens, cache)
            past = tuple((layer.keys, layer.values) for layer in cache.layers)
            if len(past) != len(sites.blocks):
                return ()
            with (
                editing(sites, {"unembed": lambda x: x[:, :1]}),
                reading(sites, ("final",)) as seen,
            ):
                sites.model(tokens[:, :middle])
            # what comes later must change nothing before it
            same = _same(seen["final"], final[:, :middle])
            for start in (0, middle):
                # of one row an MLP that takes pairs and positions for one axis (OPT) would do it
                edits = _last_mlp(sites, task, 2, start)
                pick = answers_only(sites, task, 2, start)["unembed"]
                with editing(sites, edits), reading(sites, ("final",)) as seen:
                    _run(sites, tokens[:, start:].repeat(2, 1), past, start)
                expected = final[:, start:].repeat(2, 1, 1)
                same &= _same(pick(seen["final"]), pick(expected))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return ()  # the model takes no such cache
    return past if same else ()


def _same(found: Float[Tensor, "*row d"], expected: Float[Tensor, "*row d"]) -> bool:
    found = found.to(expected.device)
    # row by row: the first token's stream may be thousands of times that of the others
    tolerance = max(1e-4, 8 * torch.finfo(expected.dtype).eps) * expected.abs().amax(-1)
    return bool(((found - expected).abs().amax(-1) <= tolerance).all())


def _is_pointwise(rerun: Rerun) -> bool:
    """Whether each block hands on what it did, if it runs at single positions."""
    after = [rerun.values[name].transpose(0, 1) for name in entries(rerun.sites)[1:]]
    try:
        return all(
            _same(rerun.behind({}, layer=layer, places=range(len(values))), values)
            for layer, values in enumerate(after)
        )
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False


# -- skipping tokens -------------------------------------------------------------------------------


def _tokens_read(task: TaskLike) -> Int[Tensor, " token"] | None:
    """The tokens of which a metric reads the logits: answers and foils; None if it may be all."""
    differences = ("logit_difference", "mean_logit_difference")
    if not task.metric.reads_answer_only or task.metric.name not in differences:
        return None
    tokens = torch.cat([task.answers.flatten(), task.foils.flatten()]).unique()
    return tokens[tokens >= 0]  # smaller sets are filled up


def _is_sparse(rerun: Rerun) -> bool:
    """Whether nothing behind the unembedding, such as a caller's hook, mixes tokens."""
    sites, task, final = rerun.sites, rerun.task, rerun.values["final"]
    edits: dict[str, Edit] = {"final": lambda _: final, **answers_only(sites, task)}
    tokens = getattr(task, rerun.side).to(sites.device)
    with (
        torch.no_grad(),
        skipping(sites, range(len(sites.blocks)), rerun.outputs),
        precise_logits(sites, _tokens_read(task)),
        editing(sites, edits),
    ):
        return _same(task.metric(sites.model(tokens)).to(tokens.device), rerun.metric)


def _noise(rerun: Rerun) -> float:
    """By how much the metric differs if two copies of the own prompts run, and nothing changes.

    Raises:
        RuntimeError: by more than rounding: a hook tells the copies apart.
    """
    sites, task, copies = rerun.sites, rerun.task, 2
    tokens = getattr(task, rerun.side).to(sites.device)
    read = _tokens_read(task) if rerun.sparse else None
    edits = answers_only(sites, task, copies)
    with torch.no_grad(), precise_logits(sites, read), editing(sites, edits):
        logits = sites.model(tokens.repeat(copies, 1))
    metric = torch.stack([task.metric(part) for part in logits.split(len(tokens))])
    noise = float((metric.to(tokens.device) - rerun.metric).abs().max())
    precision = torch.finfo(rerun.values["final"].dtype).eps
    if noise > max(1e-3, 8 * precision) * (1 + float(rerun.metric.abs().max())):
        raise RuntimeError(
            "hooks must treat all rows of a batch alike, because many runs share one; with two "
            f"copies of the own prompts in a batch the metric differs by {noise:.2g} from that of "
            "one; let the hook act on every row (act[:, -1] in place of act[0, -1]), or remove it"
        )
    return noise
