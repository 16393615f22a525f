"""An induction circuit: what followed this word the last time?

    John ring | Mary book | ... | John  ->  ring

    embed --v--> L0H0 (previous token) --k--> L1H0 (induction) --> logits
    embed --q, v-----------------------------^

A third of the pairs differ in the name that is asked for (q), a third in who owned what (k), and a
third in what was owned (v).

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al.
2022, arXiv:2209.11895.
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Stream
from tasks.planted.weights import Wiring

__all__ = ["induction"]

NAMES = ("Mary", "John", "Anna", "Tom", "Kate", "Paul")
THINGS = ("book", "ring", "drink", "key", "lamp", "hat")
OWNERS = 3
LENGTH = 2 + 2 * OWNERS


@circuit
def induction(rng: random.Random, pairs: int) -> Plan:
    """Induction (GPT-2): a previous-token head gives an induction head its keys.

    Built to break methods that lose an effect on its way through keys, or take active heads for
    causal ones: it is the plain case that all should pass.

    >>> made = planted.induction(pairs=4, distractors=8)
    >>> made.task
    Task('induction', 4 pairs, 8 tokens, metric=logit_difference, spans=['end'])
    """
    s = Stream(token=NAMES + THINGS, place=LENGTH, previous=NAMES, answer=THINGS)
    earlier = s["place", range(1, LENGTH)], s["place", range(LENGTH - 1)]
    names, things = s["token", NAMES], s["token", THINGS]
    wiring = Wiring(
        "gpt2",
        s,
        heads=[
            Head("L0H0", *earlier, value=names, out=s["previous"]),
            Head("L1H0", names, s["previous"], value=things, out=s["answer"], sharpness=6.0),
        ],
        logits={thing: 6 * s["answer", thing] for thing in THINGS},
    )
    return Plan(
        wiring,
        [_pair(rng, ("query", "key", "value")[i % 3]) for i in range(pairs)],
        edges=["embed->L0H0.v", "L0H0->L1H0.k", "embed->L1H0.q", "embed->L1H0.v",
               "L1H0->logits.in"],
        direction="denoise",
        about="nothing: the plain case, an effect that goes through q, k and v",
        kinds=3,
    )  # fmt: skip


def _pair(rng: random.Random, change: str) -> Pair:
    """Two owners change places, or their things, or who is asked for; the third looks on."""
    owners, things = rng.sample(NAMES, OWNERS), rng.sample(THINGS, OWNERS)
    rows = list(range(OWNERS))
    rng.shuffle(rows)

    def text(owners: list[str], things: list[str], asked: str) -> str:
        return " ".join([*(f"{owners[row]} {things[row]}" for row in rows), asked])

    (a, b, *others), (x, y, *more) = owners, things
    other = {
        "query": (owners, things, b),
        "key": ([b, a, *others], things, a),
        "value": (owners, [y, x, *more], a),
    }[change]
    return Pair(text(owners, things, a), text(*other), answer=x, foil=y)
