"""The sentence that joins it all: prompts in, labelled scores out.

`score = (other - own) · c`, with `c` the coefficients of the own run. `direction="denoise"`: own
is the corrupt run, and a positive score means that patching the clean value in raises the metric
(as TransformerLens' `attribution_patch` and the RelP demo). `"noise"`: own is the clean run
(as EAP-IG and MIB).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from relp.bridge.norms import NormMap
from relp.bridge.run import ROOT, Capture, captures, undisturbed
from relp.bridge.sites import Block, Sites, weight
from relp.choices import OWN, check_direction, check_level
from relp.propagation import module_names
from relp.rulebook import DEEPLIFT, RELP, Rules
from relp.scores import Scores, span_index

__all__ = ["attribute"]

EDGE_BYTES = 384 << 20
"""Memory for one batch: the graph of its run, captured sites, and the changes of its writers."""
NODE_BYTES = 512 << 20


@undisturbed
def attribute(
    model: Any,
    task: Any,
    *,
    rules: Rules = RELP,
    level: str = "node",
    components: Sequence[str] | None = None,
    neurons: Sequence[str] = (),
    direction: str = "denoise",
    steps: int = 1,
    path: str = "inputs",
    positions: bool | str = False,
    batch_size: int | None = None,
    strict: bool = True,
    progress: bool = True,
) -> Scores:
    """Estimates what patching every component or edge would do to the task's metric.

    >>> scores = attribute(model, task, rules=RELP)               # nodes [pair, component, pos]
    >>> edges = attribute(model, task, rules=RELP, level="edge")  # edges [writer, reader]
    >>> scores = attribute(model, task, components=["neuron", "L3.mlp"])
    >>> edges = attribute(model, task, level="edge", neurons=["L3N17", "L5N4"])

    Two forward passes and one backward per batch. With `rules=GRADIENT` this is attribution
    patching (node) and EAP (edge, arXiv:2310.10348); with `RELP`, relevance patching
    (arXiv:2508.21258); with `DEEPLIFT` the scores over any cut sum to the metric gap.

    Args:
        model: a `TransformerBridge` in eval mode. It is the same afterwards.
        task: a `tasks.Task`, or anything that has its fields and methods.
        rules: the coefficients to use.
        level: `"node"` or `"edge"`.
        components: at node level, names (`L3H1`, neurons `L3N17`) or kinds (`resid`, `attn`, `mlp`,
            `head`, `embed`, `mixer`, `neuron`); all but neurons if None. A layer's neurons sum to
            its MLP, or to the input of the norm behind it if there is one (Gemma-2, OLMo-2), unless
            the rules change its last matrix (`linear`).
        neurons: at edge level, neurons (`L3N17`) that write and read by themselves, as heads do;
            `L3.mlp` is then the rest of that MLP.
        direction: `"denoise"` (coefficients on the corrupt run) or `"noise"` (on the clean run).
        steps: more than 1 averages coefficients along a path between the runs (EAP-IG).
        path: what moves along it: `"inputs"`, the embeddings (`steps` runs), or `"activations"`,
            each writing site in turn (`steps` runs for each of 1 + 2·layers sites).
        positions: keep the position axis of edge scores; `"spans"`: sum them over each named span
            of the task and over the rest, pair by pair (node scores have `Scores.by_span`).
        batch_size: pairs per pass; by default as many as fit a fixed amount of memory.
        strict: an operation that no rule knows is an error; else its derivative is used.
        progress: show a bar if there are several batches.

    Returns:
        Scores in the unit of the metric.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says which and what to do.
        UnknownOperationError: the model has an operation that no rule knows.
        RuntimeError: a hook did not fire, or a score is not finite.
    """
    _check(rules, level, direction, steps, path, positions)
    if (components if level == "edge" else neurons or None) is not None:
        raise ValueError(
            "`components` is for node scores and `neurons` for edge scores; got the other one with "
            f"level={level!r}; at node level neurons are components"
        )
    sites = Sites.of(model).splitting(neurons)
    task.must_fit(sites.model.cfg, sites.model_name)
    chosen = sites.chosen(components) if level == "node" else ()
    where = _places(sites, chosen)
    names = node_sites(sites, chosen) if level == "node" else edge_sites(sites)
    batch_size = _fitting(sites, task, level, names) if batch_size is None else batch_size
    own, other = OWN[direction], "clean" if OWN[direction] == "corrupt" else "corrupt"
    metrics = {own: torch.zeros(len(task)), other: torch.zeros(len(task))}
    width = int(task.lengths.max())
    nodes = torch.zeros(len(task), len(chosen), width)
    places = (*task.spans, "other") if positions == "spans" else ()
    groups = len(places) or (width if positions else 1)
    edges = torch.zeros(groups, len(sites.writers), len(sites.readers))

    remainder: dict[str, float] = defaultdict(float)
    used: dict[str, None] = {}
    batches = list(task.buckets(batch_size))
    with tqdm(total=len(task), desc=f"{rules.name} {level}s", unit="pair",
              disable=not progress or len(batches) == 1, leave=False) as bar:  # fmt: skip
        for index, batch in batches:
            length = int(batch.lengths[0])
            for seen in captures(
                sites, batch, rules, names, own=own, steps=steps, path=path, strict=strict
            ):
                if level == "node":
                    nodes[index, :, :length] += seen.share * node_scores(seen, where)
                else:
                    scores = edge_scores(sites, seen, rules, _groups(batch, positions))
                    edges[: len(scores)] += seen.share * scores / len(task)
                used[seen.rules] = None
                for module, value in seen.remainder.items():
                    remainder[module] += value / len(task)
            metrics[own][index] = seen.own_metric.float().cpu()
            metrics[other][index] = seen.other_metric.float().cpu()
            del seen  # or the next batch's run would have this one beside it
            bar.update(len(index))
    if own == "clean" and steps == 1:
        _must_slope(task, rules, metrics[own])
    result = nodes if level == "node" else edges if positions else edges[0]
    if not bool(torch.isfinite(result).all()):
        raise RuntimeError(
            f"every score must be finite; {int((~torch.isfinite(result)).sum())} are not under "
            f"{rules.name}; run the model in float32, or look for overflow in its activations"
        )
    labels = provenance(sites, task, direction, metrics)
    along = "" if path == "inputs" else f" of {path}"
    named = "; ".join(used)  # one, unless batches differ in which registrations they met
    labels["rules"] = named if steps == 1 else f"{named} ({steps} steps{along})"
    labels["remainder"] = dict(remainder)
    if level == "node":
        return Scores(components=chosen, nodes=result, **labels)
    if places:
        labels |= {"places": places, "tokens": places}
    return Scores(writers=sites.writers, readers=sites.readers, edges=result, **labels)


# -- nodes -----------------------------------------------------------------------------------------


def node_sites(sites: Sites, components: Sequence[str] | None = None) -> tuple[str, ...]:
    """The sites that node scores of these components need; of all but neurons if None."""
    names = sites.components if components is None else components
    return tuple(dict.fromkeys(sites.part(c)[0] for c in names))


Places = Mapping[tuple[str, int], tuple[list[int], list[int]]]
"""(site, how many equal parts it has) -> the columns of the components there, and their parts."""


def _places(sites: Sites, components: Sequence[str]) -> Places:
    """Where node-level components are."""
    found: Places = defaultdict(lambda: ([], []))
    for column, component in enumerate(components):
        site, number, parts = sites.part(component)
        columns, numbers = found[site, parts]
        columns.append(column)
        numbers.append(number)
    return found


def node_scores(seen: Capture, places: Places) -> Float[Tensor, "pair component pos"]:
    """First-order effect of moving each component from the own to the other run.

    Unit: that of the metric. Source: arXiv:2508.21258; with gradients, attribution patching.
    """
    pairs, length, _ = seen.own[ROOT].shape
    scores = torch.empty(pairs, sum(len(c) for c, _ in places.values()), length)
    # a layer's heads or neurons, of which there are many, in one go
    for (site, parts), (columns, numbers) in places.items():
        product = seen.delta(site).float() * seen.coefficients[site].float()
        whole = reduce(product, "p t (part d) -> p part t", "sum", part=parts)
        scores[:, columns] = whole[:, numbers].cpu()
    return scores


# -- edges -----------------------------------------------------------------------------------------


def edge_sites(sites: Sites) -> tuple[str, ...]:
    """The sites that edge scores need."""
    own = []
    for b in sites.blocks:
        parts = ["resid"]
        parts += ["q", "k", "v", "z"] if b.heads else ["mixer_in", "mixer"]
        parts += ["heads", "attn"] if b.attn_post is not None else []
        parts += ["mlp_in", "mlp"] if b.mlp else []
        parts += ["mid"] if b.mlp and not b.parallel else []
        if b.split:
            parts += ["neurons", "up"] + (["gate"] if b.gate is not None else [])
            parts += ["mlp_out"] if b.mlp_post is not None else []
        own += [b.name(p) for p in parts]
    return (*own, "final")


def _groups(task: Any, positions: bool | str) -> list[Any]:
    """What is summed over: indices into the flattened pairs and positions of one length."""
    pairs, length = task.clean.shape
    if not positions:
        return [slice(None)]
    if positions != "spans":
        return [slice(t, None, length) for t in range(length)]
    index = span_index(task.spans, pairs, length).flatten()
    return [(index == s).nonzero().flatten() for s in range(len(task.spans) + 1)]


def edge_scores(
    sites: Sites, seen: Capture, rules: Rules, groups: Sequence[Any]
) -> Float[Tensor, "group writer reader"]:
    """Sum over each group of pairs and positions of Δ_writer · c_reader.

    c_reader is the coefficient at that reader's own input in the residual stream: the coefficient
    at its projection's output times the projection, pulled back through the block's norm under the
    same rules. Δ_writer is what the writer adds to the stream; heads and neurons behind a post-norm
    are pushed through it under the same rules. Nothing is copied per reader in the model, so
    grouped-query attention and any norm work as they are. Where neurons are split off, the MLP is
    the whole of it less those, as a writer and as a reader.
    Source: EAP, arXiv:2310.10348, with the coefficients of arXiv:2508.21258.

    Raises:
        RuntimeError: what the writers add does not sum to the residual stream, or what the readers
            get not to its coefficient.
    """
    pairs, length, d_model = seen.own[ROOT].shape
    count = len(sites.writers)
    device = seen.own[ROOT].device
    # one row per writer, so that a layer's product needs no copy
    deltas = torch.empty(count, pairs, length, d_model, device=device)
    into = torch.empty(max(len(b.readers) for b in sites.blocks), *deltas.shape[1:], device=device)
    table = torch.zeros(len(groups), count, len(sites.readers), device=device)
    deltas[0] = seen.delta(ROOT)
    stream = deltas[0].clone()  # what all writers so far have added
    row, column = 1, 0

    def fill(rows: int, coefficients: Float[Tensor, "reader pair pos d_model"]) -> None:
        """Scores of the first `rows` writers for the next readers."""
        nonlocal column
        at = slice(column, column := column + len(coefficients))
        ours, theirs = deltas[:rows].flatten(1, 2), coefficients.flatten(1, 2)
        for scores, group in zip(table, groups, strict=True):
            scores[:rows, at] = ours[:, group].flatten(1) @ theirs[:, group].flatten(1).T

    after = [*(b.name("resid") for b in sites.blocks[1:]), "final"]
    for b, following in zip(sites.blocks, after, strict=True):
        resid, heard = b.name("resid"), row
        _must_match(stream, seen.delta(resid), WRITERS, f"the input of block {b.layer}")
        into_mixer = into[: len(b.mixer_readers)]
        _mixer_coefficients(sites, b, seen, rules, into_mixer)
        fill(heard, into_mixer)
        readers = into_mixer.sum(0) + seen.coefficients[following].float()
        mixing = slice(row, row := row + max(b.heads, 1))
        stream += _mixer_outputs(sites, b, seen, rules, deltas[mixing])
        if b.mlp:
            if not b.parallel:
                middle, heard = b.name("mid"), row
                _must_match(stream, seen.delta(middle), WRITERS, f"the middle of block {b.layer}")
            entry = resid if b.parallel else middle
            into_mlp = into[: len(b.mlp_readers)]
            readers += _mlp_coefficients(sites, b, seen, rules, entry, into_mlp)
            fill(heard, into_mlp)
            writing = slice(row, row := row + len(b.mlp_writers))
            stream += _mlp_outputs(sites, b, seen, rules, deltas[writing])
        _must_match(readers, seen.coefficients[resid], READERS, f"block {b.layer}")
    _must_match(stream, seen.delta("final"), WRITERS, "the final residual stream")
    fill(row, seen.coefficients["final"].float()[None])
    return table.cpu()


WRITERS = "what embedding, heads and MLPs write must sum to the residual stream"
HEADS = "what the heads write must sum to the input of the norm behind them"
NEURONS_READ = "what the neurons read must sum to the coefficient at the MLP's input"
NEURONS_WRITE = "what the neurons write must sum to the MLP's output"
READERS = "what the block's and all later readers get must sum to the stream's own coefficient"


def _norm_map(
    sites: Sites, norm: nn.Module | None, seen: Capture, site: str, rules: Rules
) -> NormMap:
    if norm is not None and rules.places:
        rules = rules.within(module_names(sites.model)[id(norm)])
    return NormMap.of(norm, seen.values[site], seen.other[site], rules)


def _mixer_coefficients(
    sites: Sites,
    block: Block,
    seen: Capture,
    rules: Rules,
    out: Float[Tensor, "reader pair pos d_model"],
) -> None:
    """Fills `out` with the coefficients at the stream for each head's q, k, v, or the mixer."""
    norm = _norm_map(sites, block.norm, seen, block.name("resid"), rules)
    if not block.heads:
        out[0] = norm.pull(seen.coefficients[block.name("mixer_in")].float())
    for site, projection, heads in block.attention_readers:
        part, out = out[:heads], out[heads:]
        norm.pull_through(weight(projection).float(), seen.coefficients[site].float(), part)


def _mixer_outputs(
    sites: Sites,
    block: Block,
    seen: Capture,
    rules: Rules,
    out: Float[Tensor, "writer pair pos d_model"],
) -> Float[Tensor, "pair pos d_model"]:
    """Fills `out` with what each head (or the mixer) adds to the stream; gives the whole."""
    if not block.heads:
        out[0] = seen.delta(block.name("mixer"))
        return out[0]
    whole = head_outputs(block, seen.delta(block.name("z")), out).sum(0)
    if block.attn_post is None:
        return whole
    _must_match(whole, seen.delta(block.name("heads")), HEADS, f"block {block.layer}")
    out.copy_(_norm_map(sites, block.attn_post, seen, block.name("heads"), rules).push(out))
    return seen.delta(block.name("attn")).float()


def _mlp_coefficients(
    sites: Sites,
    block: Block,
    seen: Capture,
    rules: Rules,
    entry: str,
    out: Float[Tensor, "reader pair pos d_model"],
) -> Float[Tensor, "pair pos d_model"]:
    """Fills `out` with the coefficients at the stream for each neuron that is split off and for the
    rest of the MLP; gives the whole."""
    norm = _norm_map(sites, block.mlp_norm, seen, entry, rules)
    behind = seen.coefficients[block.name("mlp_in")]
    whole = norm.pull(behind.float())
    out[-1] = whole
    if not block.split:
        return whole
    parts = [(weight(p).float(), seen.coefficients[s].float()) for s, p in block.neuron_readers]
    found = torch.stack([c @ w for w, c in parts]).sum(0)
    _must_match(found, behind, NEURONS_READ, f"block {block.layer}", NO_NEURONS)
    # a neuron is like a head of one entry, or of two if it is gated
    at = list(block.split)
    w = torch.stack([w[at] for w, _ in parts], 1).flatten(0, 1)
    c = torch.stack([c[..., at] for _, c in parts], -1).flatten(-2)
    norm.pull_through(w, c, out[:-1])
    out[-1] -= out[:-1].sum(0)
    return whole


def _mlp_outputs(
    sites: Sites,
    block: Block,
    seen: Capture,
    rules: Rules,
    out: Float[Tensor, "writer pair pos d_model"],
) -> Float[Tensor, "pair pos d_model"]:
    """Fills `out` with what each neuron that is split off and the rest of the MLP add to the
    stream; gives the whole."""
    whole = seen.delta(block.name("mlp")).float()
    out[-1] = whole
    if not block.split:
        return whole
    step = seen.delta(block.name("neurons")).float()
    norm, behind = block.mlp_post, block.name("mlp" if block.mlp_post is None else "mlp_out")
    found = step @ weight(block.down).float().T
    _must_match(found, seen.delta(behind), NEURONS_WRITE, f"block {block.layer}", NO_NEURONS)
    out[:-1] = neuron_outputs(block, step)
    if norm is not None:
        out[:-1] = _norm_map(sites, norm, seen, behind, rules).push(out[:-1])
    out[-1] -= out[:-1].sum(0)
    return whole


def neuron_outputs(
    block: Block, activations: Float[Tensor, "pair pos d_mlp"]
) -> Float[Tensor, "neuron pair pos d_model"]:
    """What each neuron that is split off adds to the residual stream (or to the norm before it)."""
    at = list(block.split)
    w = weight(block.down).float()[:, at]
    return torch.einsum("ptn,mn->nptm", activations[..., at].float(), w)


def head_outputs(
    block: Block,
    z: Float[Tensor, "pair pos head_d_head"],
    out: Float[Tensor, "head pair pos d_model"] | None = None,
) -> Float[Tensor, "head pair pos d_model"]:
    """What each head adds to the residual stream (without the bias, which is no head's)."""
    w = rearrange(weight(block.o).float(), "m (h d) -> h d m", h=block.heads)
    heads = rearrange(z.float(), "p t (h d) -> h (p t) d", h=block.heads)
    flat = None if out is None else out.flatten(1, 2)
    return torch.bmm(heads, w, out=flat).unflatten(1, z.shape[:2])


def head_changes(
    block: Block,
    step: Float[Tensor, "pair pos head_d_head"],
    heads: Float[Tensor, "pair pos d_model"] | None,
) -> Float[Tensor, "head pair pos d_model"]:
    """What each head adds differently if z differs by `step`.

    A norm behind the heads, whose input in the own run is `heads`, is split as `DEEPLIFT` does: all
    heads together add what the norm puts out differently.
    """
    added = head_outputs(block, step)
    if heads is None:
        return added
    return NormMap.of(block.attn_post, heads, heads + added.sum(0), DEEPLIFT).push(added)


NO_STREAM = (
    "if the model normalises the stream itself (BERT, OPT-350m), or its attention has a rule for "
    "linear layers, it has no edges in this sense: use level='node'"
)
NO_NEURONS = (
    "if this MLP is more than two or three matrices, or has a rule for linear layers, leave its "
    "neurons out"
)


def _must_match(
    found: Tensor, expected: Tensor, what: str, where: str, otherwise: str = NO_STREAM
) -> None:
    """A part of the model that was overlooked would make edge scores wrong without a sign."""
    error = float((found - expected).abs().max())
    scale = float(expected.abs().max())
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)  # half precision rounds each sum
    if error > tolerance * max(scale, 1e-6):
        raise RuntimeError(
            f"{what}; at {where} it misses by {error:.2g} of {scale:.2g}; remove hooks that change "
            f"activations; {otherwise}"
        )


# -- arguments -------------------------------------------------------------------------------------


def _check(
    rules: Rules, level: str, direction: str, steps: int, path: str, positions: bool | str
) -> None:
    if not isinstance(rules, Rules):
        raise TypeError(
            f"`rules` must be a Rules value such as relp.RELP; got {type(rules).__name__}; "
            "turn a name into rules with relp.preset(name)"
        )
    check_level(level)
    check_direction(direction)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"`steps` must be a whole number of at least 1; got {steps!r}; leave it out"
        )
    if path not in ("inputs", "activations"):
        raise ValueError(
            f"`path` must be 'inputs' or 'activations'; got {path!r}; 'inputs' moves the embeddings"
        )
    if path == "activations" and steps == 1:
        raise ValueError(
            "`path='activations'` needs `steps` above 1; got 1, which has no path; give steps=5"
        )
    if steps > 1 and rules.needs_reference:
        raise ValueError(
            f"`steps` must be 1 for rules that compare two runs; got {steps} with {rules.name}; "
            "those rules are exact between the runs already"
        )
    if positions not in (False, True, "spans"):
        raise ValueError(
            f"`positions` must be True, False or 'spans'; got {positions!r}; 'spans' sums over "
            "each of the task's named spans"
        )
    if positions and level == "node":
        raise ValueError(
            "`positions` is for edge scores; got level='node', whose scores keep the position axis "
            "anyway; leave it out"
        )


def _must_slope(task: Any, rules: Rules, metric: Float[Tensor, " pair"]) -> None:
    """At the maximum of a metric every score would be 0 up to rounding, and look like a result."""
    at_maximum = task.metric.flat_at_zero and float(metric.abs().max()) < 1e-4
    if at_maximum and rules.softmax != "secant":  # secants see the other run too
        raise ValueError(
            "with direction='noise' the metric must have a slope on the clean run; "
            f"{task.metric.name!r} is 0 there, its maximum, and so would be every score under "
            f"{rules.name}; use direction='denoise', steps=5, rules=DEEPLIFT, or patch, which "
            "measures"
        )


def _fitting(sites: Sites, task: Any, level: str, names: Sequence[str]) -> int:
    """Pairs per batch that keep memory near a constant, when the named sites are captured."""
    cfg, length = sites.model.cfg, int(task.lengths.max())
    graph = 40 * int(cfg.d_model) * len(sites.blocks)
    neurons = {b.name(part): b.neurons for b in sites.blocks for part in ("up", "gate", "neurons")}
    if level == "edge":
        captured = 3 * sum(neurons.get(name, int(cfg.d_model)) for name in names)
        columns = max(len(b.readers) for b in sites.blocks)
        held = int(cfg.d_model) * (len(sites.writers) + columns) + captured
        return max(1, EDGE_BYTES // (4 * length * (graph + held)))
    held = 3 * sum(neurons.get(name, 0) for name in names)
    return max(1, NODE_BYTES // (4 * length * (graph + held + 3 * int(cfg.d_vocab))))


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
        "parallel": sites.parallel,
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
