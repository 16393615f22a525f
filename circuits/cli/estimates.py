"""What `discover`, `compare` and `verify` share: the model's answers, estimates, exact effects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from rich.markup import escape

from circuits.cli.options import label
from circuits.cli.screen import or_dash, print_table, say
from circuits.cli.source import Drawn, File

__all__ = ["SHOWN", "every_estimate", "measured", "print_agreement", "print_missed", "ready"]

SHOWN = ("GRADIENT", "RELP", "CP_LRP", "DEEPLIFT", "PARTWAY")
"""The presets that `discover` and `verify` compare."""

READY = 16
"""Pairs per run that asks what the model does on them."""
STEPS = 10
"""Of the integrated gradients that `compare` shows beside the presets."""


def ready(bridge: Any, source: Drawn | File, pairs: int, seed: int, *, filter_correct: bool) -> Any:
    """The pairs, after what the model does on them is said: it may be unable to do the task."""
    import torch

    from circuits.masked import UNABLE, doubt
    from relp.bridge import Sites, observe

    prompts = source.draw(bridge.tokenizer, pairs, seed)
    say(f"[bold]{escape(label(bridge))}[/] on {escape(repr(prompts))}")
    sites = Sites.of(bridge)
    prompts.must_fit(bridge.cfg, sites.model_name)
    if filter_correct:
        every = len(prompts)
        prompts = prompts.filter_correct(bridge)
        say(f"{len(prompts)} of {every} pairs are kept, on which the answer is preferred")
    clean: list[float] = []
    corrupt: list[float] = []
    for side, values in (("clean", clean), ("corrupt", corrupt)):
        for _, batch in prompts.buckets(READY):
            values += observe(sites, batch, (), side=side)[1].float().tolist()
    means = ", ".join(f"{side} {sum(v) / len(v):.3f}" for side, v in
                      (("clean", clean), ("corrupt", corrupt)))  # fmt: skip
    right = sum(value > 0 for value in clean) / len(clean)
    preferred = f"; the answer is preferred in {right:.1%} of the clean prompts"
    say(f"{prompts.metric.name}: {means}{preferred if prompts.metric.compares_answers else ''}")
    if said := doubt(prompts, torch.tensor(clean), torch.tensor(corrupt)):
        warnings.warn(said, stacklevel=2)
        warnings.filterwarnings("ignore", UNABLE)  # once is enough
    return prompts


def every_estimate(bridge: Any, prompts: Any) -> tuple[list[Any], dict[str, float]]:
    """Node scores by each of the rules, and by integrated gradients; the seconds that each took."""
    from relp import GRADIENT, PRESETS, attribute

    ways = [(rules, 1) for rules in PRESETS.values()] + [(GRADIENT, STEPS)]
    scores, seconds = [], {}
    attribute(bridge, prompts.select([0]), rules=GRADIENT)  # the first run of a model sets it up
    for rules, steps in ways:
        begun = perf_counter()
        scores.append(attribute(bridge, prompts, rules=rules, steps=steps))
        seconds[scores[-1].rules] = perf_counter() - begun
    return scores, seconds


def measured(bridge: Any, prompts: Any, scores: Sequence[Any], *, exact: bool) -> Any:
    """Exact effects; of large models only some, and how much the others may hold is said."""
    from circuits import patch, verify
    from circuits.cli.cases import is_large
    from circuits.exact.verify import BUDGET

    if exact or scores[0].nodes[0].numel() <= BUDGET or not is_large(bridge):
        return patch(bridge, prompts)
    effect = verify(bridge, prompts, scores, budget=BUDGET)
    if effect.strata is None:
        return effect
    some = effect.rules.removeprefix("exact (").removesuffix(")")
    say(
        f"measured {some} that change anything: for each kind half of them the strongest by any of "
        "the rules, half drawn from the rest (--exact: all)"
    )
    print_missed(effect)
    return effect


def print_missed(effect: Any) -> None:
    """Says how many large effects may be among what was not measured, at most."""
    from circuits import missed

    rows = missed(effect).query("at_most > 0").itertuples()
    few = ", ".join(f"{r.at_most:,} of {r.cells - r.measured:,} {r.kind} cells" for r in rows)
    if few:
        say(f"not measured, but perhaps as large as the tenth largest (95 %): at most {few}")


def print_agreement(scores: Sequence[Any], effect: Any) -> Any:
    """Prints the table, and gives it."""
    from circuits import agreement

    frame = agreement(scores, effect).sort_values("kind", key=_as_met, kind="stable")
    # of a sample nobody knows the largest (of one effect there is no choice)
    overlaps = bool(frame["overlap"][frame["pearson"].notna()].notna().any())
    rows = [
        [
            *(row.kind, row.rules),
            or_dash(row.pearson, ".3f") + "*" * int(row.hangs),
            or_dash(row.pearson_rest, ".3f"),
            *(or_dash(v, ".2f") for v in (row.spearman, row.signs, row.relative_error)),
            *([or_dash(row.overlap, ".2f")] if overlaps else []),
            f"{row.cells:,}",
        ]
        for row in frame.itertuples()
    ]
    title = "agreement with exact patching, mean over pairs"
    headers = ["kind", "rules", "r", "r rest", "ρ", "signs", "error"]
    headers += ["overlap"] * overlaps + ["cells"]
    print_table(title, headers, rows, blocks=True)
    say(
        "r: Pearson's, over all cells; r rest: without the one of the largest effect; ρ "
        "(Spearman's) and share of right signs: over effects above rounding and 1 % of the gap"
    )
    if frame["hangs"].any():
        say(
            "*: one cell decides r: it has more than half of the squared effects, or r moves by "
            "more than 0.1 without it"
        )
    return frame


def _as_met(kinds: Any) -> Any:
    """Sorts rows of the same kind together, in the order in which kinds first come."""
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    return kinds.map(order)
