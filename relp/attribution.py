"""The sentence that joins it all: prompts in, labelled scores out.

`score = (other - own) · c`, with `c` the coefficients of the own run. `direction="denoise"`: own
is the corrupt run, and a positive score means that patching the clean value in raises the metric
(as TransformerLens' `attribution_patch` and the RelP demo). `"noise"`: own is the clean run
(as EAP-IG and MIB).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from relp.capture import ROOT, Capture, Linearised, capture
from relp.propagation import propagate
from relp.rulebook import RELP, Rules
from relp.scores import Scores
from relp.sites import Block, Sites, weight

__all__ = ["attribute"]

OWN = {"denoise": "corrupt", "noise": "clean"}
EDGE_BYTES = 256 << 20
"""Memory for the writers' changes of one batch; what else an edge run holds is of that order."""
NODE_BYTES = 512 << 20


# the caller may be inside torch.no_grad() or torch.inference_mode()
@torch.inference_mode(False)
@torch.enable_grad()
def attribute(
    model: Any,
    task: Any,
    *,
    rules: Rules = RELP,
    level: str = "node",
    direction: str = "denoise",
    steps: int = 1,
    positions: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> Scores:
    """Estimates what patching every component or edge would do to the task's metric.

    >>> scores = attribute(model, task, rules=RELP)               # nodes [pair, component, pos]
    >>> edges = attribute(model, task, rules=RELP, level="edge")  # edges [writer, reader]

    Two forward passes and one backward per batch. With `rules=GRADIENT` this is attribution
    patching (node) and EAP (edge, arXiv:2310.10348); with `RELP`, relevance patching
    (arXiv:2508.21258); with `DEEPLIFT` the scores over any cut sum to the metric gap.

    Args:
        model: a `TransformerBridge` in eval mode. It is the same afterwards.
        task: a `tasks.Task`, or anything with its fields.
        rules: the coefficients to use.
        level: `"node"` or `"edge"`.
        direction: `"denoise"` (coefficients on the corrupt run) or `"noise"` (on the clean run).
        steps: more than 1 averages coefficients along the path between the runs (EAP-IG).
        positions: keep the position axis of edge scores.
        batch_size: pairs per pass; by default as many as fit a fixed amount of memory.
        progress: show a bar if there are several batches.

    Returns:
        Scores in the unit of the metric.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which and what to do.
        UnknownOperationError: the model has an operation that no rule knows.
        RuntimeError: a hook did not fire, or a score is not finite.
    """
    _check(rules, level, direction, steps, positions)
    sites = Sites.of(model)
    batch_size = _fitting(sites, task, level) if batch_size is None else batch_size
    own = OWN[direction]
    metrics = {s: torch.zeros(len(task)) for s in ("clean", "corrupt")}
    width = int(task.lengths.max())
    shape = (len(task), len(sites.components), width)
    nodes = torch.zeros(shape) if level == "node" else None
    table = (width, len(sites.writers), len(sites.readers))
    edges = torch.zeros(table if positions else table[1:]) if level == "edge" else None
    names = node_sites(sites) if level == "node" else edge_sites(sites)
    if level == "edge":
        _refuse_post_norm(sites)

    batches = list(task.buckets(batch_size))
    with tqdm(total=len(task), desc=f"{rules.name} {level}s", unit="pair",
              disable=not progress or len(batches) == 1, leave=False) as bar:  # fmt: skip
        for index, batch in batches:
            seen = capture(sites, batch, rules, names, own=own, steps=steps)
            metrics[own][index] = seen.own_metric.float().cpu()
            metrics["clean" if own == "corrupt" else "corrupt"][index] = (
                seen.other_metric.float().cpu()
            )
            if nodes is not None:
                scores = node_scores(sites, seen)
                nodes[index, :, : scores.shape[-1]] = scores
            else:
                assert edges is not None
                scores = edge_scores(sites, seen, rules, positions=positions)
                edges[: len(scores)] += scores / len(task)
            bar.update(len(index))
    result = nodes if nodes is not None else edges
    assert result is not None
    if not bool(torch.isfinite(result).all()):
        raise RuntimeError(
            f"every score must be finite; {int((~torch.isfinite(result)).sum())} are not under "
            f"{rules.name}; run the model in float32, or look for overflow in its activations"
        )
    labels = provenance(sites, task, direction, metrics)
    labels["rules"] = rules.name if steps == 1 else f"{rules.name} ({steps} steps)"
    if nodes is not None:
        return Scores(components=sites.components, nodes=nodes, **labels)
    return Scores(writers=sites.writers, readers=sites.readers, edges=edges, **labels)


# -- nodes -----------------------------------------------------------------------------------------


def node_sites(sites: Sites) -> tuple[str, ...]:
    """The sites that node scores need."""
    return tuple(b.name(p) for b in sites.blocks for p in ("resid", "z", "attn", "mlp"))


def node_scores(sites: Sites, seen: Capture) -> Float[Tensor, "pair component pos"]:
    """First-order effect of moving each component from the own to the other run.

    Unit: that of the metric. Source: arXiv:2508.21258; with gradients, attribution patching.
    """
    columns: list[Tensor] = []
    coefficients = seen.coefficients

    def dot(site: str) -> Tensor:
        return einsum(seen.delta(site).float(), coefficients[site].float(), "p t d, p t d -> p t")

    columns.append(dot(ROOT))
    for b in sites.blocks:
        columns.append(dot(b.name("resid")))
        z = seen.delta(b.name("z")).float() * coefficients[b.name("z")].float()
        columns += rearrange(z, "p t (h d) -> h p t d", h=b.heads).sum(-1).unbind()
        columns += [dot(b.name("attn")), dot(b.name("mlp"))]
    return torch.stack([c.cpu() for c in columns], 1)


# -- edges -----------------------------------------------------------------------------------------


def edge_sites(sites: Sites) -> tuple[str, ...]:
    """The sites that edge scores need."""
    parts = ("resid", "q", "k", "v", "z", "mlp_in", "mlp")
    own = [b.name(p) for b in sites.blocks for p in parts]
    return (*own, *(b.name("mid") for b in sites.blocks if not b.parallel), "final")


def edge_scores(
    sites: Sites, seen: Capture, rules: Rules, *, positions: bool
) -> Float[Tensor, "*pos writer reader"]:
    """Sum over pairs of Δ_writer · c_reader, one matrix product per layer.

    c_reader is the coefficient at that reader's own input in the residual stream: the coefficient
    at its projection's output times the projection, pulled back through the block's norm under the
    same rules. Nothing is copied per reader in the model, so grouped-query attention and any norm
    work as they are. Source: EAP, arXiv:2310.10348, with the coefficients of arXiv:2508.21258.

    Raises:
        RuntimeError: what the writers add does not sum to the residual stream.
    """
    pairs, length, d_model = seen.own[ROOT].shape
    count = len(sites.writers)
    device = seen.own[ROOT].device
    # one row per writer, so that a layer's product needs no copy
    deltas = torch.empty(count, pairs, length, d_model, device=device)
    table = torch.zeros(length if positions else 1, count, len(sites.readers), device=device)

    deltas[0] = seen.delta(ROOT)
    total = deltas[0].clone()
    row, column = 1, 0

    def fill(rows: int, coefficients: Float[Tensor, "reader pair pos d_model"]) -> None:
        """Scores of the first `rows` writers for the next readers."""
        nonlocal column
        at = slice(column, column := column + len(coefficients))
        if positions:
            table[:, :rows, at] = einsum(deltas[:rows], coefficients, "w p t d, r p t d -> t w r")
        else:
            table[0, :rows, at] = deltas[:rows].flatten(1) @ coefficients.flatten(1).T

    coefficients = seen.coefficients
    after = [*(b.name("resid") for b in sites.blocks[1:]), "final"]
    for b, following in zip(sites.blocks, after, strict=True):
        _must_match(total, seen.delta(b.name("resid")), WRITERS, f"the input of block {b.layer}")
        before = row
        into_attention = _mean(_attention_coefficients(b, at, seen, rules) for at in seen.path)
        fill(before, into_attention)
        deltas[row : row + b.heads] = head_outputs(b, seen.delta(b.name("z")))
        total += deltas[row : row + b.heads].sum(0)
        row += b.heads
        entry = b.name("resid" if b.parallel else "mid")
        if not b.parallel:
            _must_match(total, seen.delta(entry), WRITERS, f"the middle of block {b.layer}")
        into_mlp = _mean(
            pull_back(
                b.mlp_norm,
                at.values[entry],
                seen.other[entry],
                at.coefficients[b.name("mlp_in")].float()[None],
                rules,
            )
            for at in seen.path
        )
        fill(before if b.parallel else row, into_mlp)
        deltas[row] = seen.delta(b.name("mlp"))
        total += deltas[row]
        row += 1
        readers = into_attention.sum(0) + into_mlp[0] + coefficients[following]
        _must_match(readers, coefficients[b.name("resid")], READERS, f"block {b.layer}")
    _must_match(total, seen.delta("final"), WRITERS, "the final residual stream")
    fill(row, coefficients["final"].float()[None])
    return (table if positions else table[0]).cpu()


WRITERS = "what embedding, heads and MLPs write must sum to the residual stream"
READERS = "what the block's and all later readers get must sum to the stream's own coefficient"


def _mean(parts: Iterable[Tensor]) -> Tensor:
    """Mean of tensors of one shape, one at a time."""
    total, count = torch.zeros(()), 0
    for part in parts:
        total, count = (part if count == 0 else total + part), count + 1
    return total / count


def _attention_coefficients(
    block: Block, at: Linearised, seen: Capture, rules: Rules
) -> Float[Tensor, "reader pair pos d_model"]:
    """Coefficients at the residual stream for each head's q, k and v, in column order."""
    parts = []
    for site, projection, heads in block.attention_readers:
        c = rearrange(at.coefficients[site].float(), "p t (h d) -> h p t d", h=heads)
        w = rearrange(weight(projection).float(), "(h d) m -> h d m", h=heads)
        parts.append(torch.einsum("hptd,hdm->hptm", c, w))
    resid = block.name("resid")
    return pull_back(block.norm, at.values[resid], seen.other[resid], torch.cat(parts), rules)


def head_outputs(
    block: Block, z: Float[Tensor, "pair pos head_d_head"]
) -> Float[Tensor, "head pair pos d_model"]:
    """What each head adds to the residual stream (without the bias, which is no head's)."""
    w = rearrange(weight(block.o).float(), "m (h d) -> h d m", h=block.heads)
    z = rearrange(z.float(), "p t (h d) -> h p t d", h=block.heads)
    return torch.einsum("hptd,hdm->hptm", z, w)


def pull_back(
    norm: Any,
    own: Float[Tensor, "pair pos d_model"],
    other: Float[Tensor, "pair pos d_model"],
    coefficients: Float[Tensor, "reader pair pos d_model"],
    rules: Rules,
) -> Float[Tensor, "reader pair pos d_model"]:
    """Coefficients at a norm's input from those at its output, for many readers at once."""
    with torch.enable_grad():
        x = own.detach().requires_grad_()
        with propagate(rules, root=norm) as report:
            y = norm(x)
        if rules.needs_reference:
            with report.reference():
                norm(other)
        (grads,) = torch.autograd.grad(y, x, coefficients.to(y.dtype), is_grads_batched=True)
    return grads.float()


def _must_match(found: Tensor, expected: Tensor, what: str, where: str) -> None:
    """A part of the model that was overlooked would make edge scores wrong without a sign."""
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)  # half precision rounds each sum
    if error > tolerance * max(scale, 1e-6):
        raise RuntimeError(
            f"{what}; at {where} it misses by {error:.2g} of {scale:.2g}; remove hooks that change "
            "activations, or use level='node' for this model"
        )


def _refuse_post_norm(sites: Sites) -> None:
    if any(b.post_norm for b in sites.blocks):
        raise ValueError(
            "edge scores need heads and MLPs that add to the residual stream directly; "
            f"{sites.model_name!r} normalises what they add (post-norm); use level='node'"
        )


# -- arguments -------------------------------------------------------------------------------------


def _check(rules: Rules, level: str, direction: str, steps: int, positions: bool) -> None:
    if not isinstance(rules, Rules):
        raise TypeError(
            f"`rules` must be a Rules value such as relp.RELP; got {type(rules).__name__}; "
            "turn a name into rules with relp.preset(name)"
        )
    if level not in ("node", "edge"):
        raise ValueError(f"`level` must be 'node' or 'edge'; got {level!r}; choose one of them")
    if direction not in OWN:
        raise ValueError(
            f"`direction` must be 'denoise' or 'noise'; got {direction!r}; 'denoise' patches clean "
            "values into the corrupt run"
        )
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"`steps` must be a whole number of at least 1; got {steps!r}; leave it out"
        )
    if steps > 1 and rules.needs_reference:
        raise ValueError(
            f"`steps` must be 1 for rules that compare two runs; got {steps} with {rules.name}; "
            "those rules are exact between the runs already"
        )
    if positions and level == "node":
        raise ValueError(
            "`positions` is for edge scores; got level='node', whose scores keep the position axis "
            "anyway; leave it out"
        )


def _fitting(sites: Sites, task: Any, level: str) -> int:
    """Pairs per batch that keep memory near a constant."""
    cfg, length = sites.model.cfg, int(task.lengths.max())
    if level == "edge":
        per_pair = 4 * length * int(cfg.d_model) * len(sites.writers)
        return max(1, EDGE_BYTES // per_pair)
    hidden = 40 * int(cfg.d_model) * len(sites.blocks)
    return max(1, NODE_BYTES // (4 * length * (hidden + 3 * int(cfg.d_vocab))))


def provenance(
    sites: Sites, task: Any, direction: str, metrics: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a result says of where it comes from, scores and exact effects alike."""
    return {
        "model": sites.model_name,
        "task": task.name,
        "direction": direction,
        "metric": task.metric.name,
        "clean": metrics["clean"],
        "corrupt": metrics["corrupt"],
        "lengths": task.lengths,
        "spans": task.spans,
        "tokens": token_labels(sites.model, task),
    }


def token_labels(model: Any, task: Any) -> tuple[str, ...]:
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
