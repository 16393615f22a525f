"""Running the rest of a model again: from one block on, and from one position on.

What comes before a change is as it was. Blocks before it hand their input on, and the first one
that runs gets the residual stream of the own run. Positions before it, which in a causal model
nothing later can change, are keys and values of the own run and no rows of the batch. What changes
behind a block's attention changes what this block hands on at its own position alone. Logits are
computed only where, and of those tokens, that a built-in metric reads.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from relp.capture import answers_only, observe
from relp.sites import Block, Edit, Sites, editing, reading

__all__ = ["POINTWISE", "Rerun", "entries", "output_shapes", "skipping"]

POINTWISE = (".z", ".attn", ".mixer", ".mlp_in", ".neurons", ".mlp")
"""Sites of a block behind which positions do not meet before the next block."""


@dataclass(frozen=True, eq=False)
class Rerun:
    """The own run of some pairs of one length, and how to continue it from anywhere."""

    sites: Sites
    task: Any
    side: str
    """`clean` or `corrupt`: whose prompts run."""
    values: Mapping[str, Tensor]
    """Activations of the own run, at least those at `entries`."""
    metric: Float[Tensor, " pair"]
    """The metric of the own run."""
    outputs: Mapping[int, int]
    """How each block returns: 0 for a bare tensor, else the length of the tuple."""
    past: tuple[tuple[Tensor, Tensor], ...]
    """Each block's keys and values; empty if the model must run all positions."""
    pointwise: bool
    """Whether `behind` holds for this model."""
    sparse: bool
    """Whether the metric is what it was if the unembedding computes the tokens it reads alone."""

    @classmethod
    def of(cls, sites: Sites, task: Any, names: Iterable[str], *, side: str) -> Rerun:
        """Runs one side, keeps what is at the named sites, and tries to leave positions out."""
        names = tuple(dict.fromkeys([*entries(sites), *map(_mixed, sites.blocks), *names]))
        with output_shapes(sites) as outputs:
            values, metric = observe(sites, task, names, side=side)
        tokens = getattr(task, side).to(sites.device)
        past = _keys_values(sites, task, tokens, values["final"])
        rerun = cls(sites, task, side, values, metric, outputs, past, pointwise=True, sparse=True)
        return replace(rerun, pointwise=_is_pointwise(rerun), sparse=_is_sparse(rerun))

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
            few = _answers_alone(self.sites, self.task) if self.sparse else nullcontext()
            with few, editing(self.sites, every):
                logits = self.sites.model(tokens.repeat(copies, 1), **_cache(self.past, start))
            metric = [self.task.metric(part) for part in logits.split(len(tokens))]
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
        return values["final"].squeeze(1).unflatten(0, (len(places), -1))


def entries(sites: Sites) -> tuple[str, ...]:
    """Where a run can begin: each block's input, and behind them all the final norm's."""
    return (*(b.name("resid") for b in sites.blocks), "final")


def _mixed(block: Block) -> str:
    """Where a block holds what attention, or the mixer, gave each position."""
    return block.name("z" if block.heads else "mixer")


# -- skipping positions ----------------------------------------------------------------------------


def _cache(past: tuple[tuple[Tensor, Tensor], ...], start: int) -> dict[str, Any]:
    """The argument that makes a model run from `start` on."""
    if not past:
        return {}
    from transformers import Cache

    return {
        "past_key_values": Cache(layers=[_layer(k[:, :, :start], v[:, :, :start]) for k, v in past])
    }


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


def _last_mlp(sites: Sites, task: Any, copies: int, start: int) -> dict[str, Edit]:
    """The last MLP gets the answer position alone, and what it adds is broadcast.

    Right at the answer position, the only one that is read. Not in parallel blocks, some of which
    add attention to the MLP's output in place.
    """
    last = sites.blocks[-1]
    pick = answers_only(sites, task, copies, start)["unembed"]
    return {} if last.parallel else {last.name("mlp_in"): pick}


def _keys_values(
    sites: Sites, task: Any, tokens: Tensor, final: Float[Tensor, "pair pos d_model"]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Keys and values of each block, or nothing if the run cannot be continued from its middle.

    It cannot if the metric reads all positions, in models that read both ways, and in those whose
    state is no keys and values.
    """
    from transformers import DynamicCache

    if not task.metric.reads_answer_only:
        return ()
    cache, same = DynamicCache(), True
    try:
        with torch.no_grad():
            with editing(sites, answers_only(sites, task)):
                sites.model(tokens, past_key_values=cache)
            past = tuple((layer.keys, layer.values) for layer in cache.layers)
            if len(past) != len(sites.blocks):
                return ()
            for start in (0, tokens.shape[1] // 2):
                # of one row an MLP that takes pairs and positions for one axis (OPT) would do it
                edits = _last_mlp(sites, task, 2, start)
                pick = answers_only(sites, task, 2, start)["unembed"]
                with editing(sites, edits), reading(sites, ("final",)) as values:
                    sites.model(tokens[:, start:].repeat(2, 1), **_cache(past, start))
                expected = final[:, start:].repeat(2, 1, 1)
                same &= _same(pick(values["final"]), pick(expected))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return ()  # the model takes no such cache
    return past if same else ()


def _same(found: Float[Tensor, "*row d"], expected: Float[Tensor, "*row d"]) -> bool:
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


@contextmanager
def _answers_alone(sites: Sites, task: Any) -> Iterator[None]:
    """The unembedding computes no logits but those of answers and foils; all others are 0.

    The built-in logit difference reads no others. For other metrics nothing happens.
    """
    inner = sites.model.unembed.original_component
    built_in = task.metric.reads_answer_only and task.metric.name == "logit_difference"
    if not built_in or type(inner) is not nn.Linear or "forward" in vars(inner):
        yield  # quantised, or already wrapped by accelerate
        return
    read = torch.cat([task.answers, task.foils]).unique().to(inner.weight.device)
    rows, offset = inner.weight[read], None if inner.bias is None else inner.bias[read]

    def forward(x: Tensor) -> Tensor:
        logits = x.new_zeros(*x.shape[:-1], inner.out_features)
        logits[..., read] = nn.functional.linear(x, rows, offset)
        return logits

    object.__setattr__(inner, "forward", forward)
    try:
        yield
    finally:
        del inner.forward


def _is_sparse(rerun: Rerun) -> bool:
    """Whether nothing behind the unembedding, such as a caller's hook, mixes tokens."""
    sites, task, final = rerun.sites, rerun.task, rerun.values["final"]
    edits: dict[str, Edit] = {"final": lambda _: final, **answers_only(sites, task)}
    tokens = getattr(task, rerun.side).to(sites.device)
    with (
        torch.no_grad(),
        skipping(sites, range(len(sites.blocks)), rerun.outputs),
        _answers_alone(sites, task),
        editing(sites, edits),
    ):
        return _same(task.metric(sites.model(tokens)), rerun.metric)


# -- skipping blocks -------------------------------------------------------------------------------


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
    """Blocks of these layers hand their input on, in the form of their `output_shapes`."""

    def hand_on(size: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (size - 1)) if size else hidden

        return forward

    skipped = {b.layer: sites.model.blocks[b.layer] for b in sites.blocks if b.layer in layers}
    before = {layer: vars(module).get("forward") for layer, module in skipped.items()}
    try:
        for layer, module in skipped.items():
            # an attribute of the instance hides the method of its class until it is deleted;
            # a bridge's own __setattr__ would set it on the module that it wraps
            object.__setattr__(module, "forward", hand_on(outputs[layer]))
        yield
    finally:
        for layer, module in skipped.items():
            vars(module).pop("forward", None)
            if before[layer] is not None:  # a caller's own
                object.__setattr__(module, "forward", before[layer])
