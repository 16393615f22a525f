"""Attention that is certain: its slope is 0, although another query changes everything.

    apple hammer tool ?  ->  hammer

    embed --v--> L0H0 (what is wanted) --q--> L1H0 (look for it) --> logits

The second head looks with all its attention at the fruit or at the tool, whichever is wanted, so
that no small change of its query does anything.

Source: the zero gradients by saturation of Kramár et al. 2024, arXiv:2403.00745, for which AtP*
computes the softmax of other queries and keys anew.
"""

from __future__ import annotations

import random

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Stream
from tasks.planted.weights import Wiring

__all__ = ["saturation"]

FRUIT, TOOLS = ("apple", "pear", "plum", "fig"), ("hammer", "saw", "drill", "file")
CERTAIN = 30.0
"""Difference of two scores: the other has e^-30 of the attention."""


@circuit
def saturation(rng: random.Random, pairs: int) -> Plan:
    """A saturated softmax read by its query (Llama, grouped queries).

    Built to break gradients: those through q are 0 in float32, and with them all that is upstream.

    >>> made = planted.saturation(pairs=4)
    >>> sorted(made.edges)
    ['L0H0->L1H0.q', 'L1H0->logits.in', 'embed->L0KV0.v']
    """
    things = FRUIT + TOOLS
    s = Stream(token=(*things, "fruit", "tool", "?"), kind=("fruit", "tool"), cue=1,
               asked=("fruit", "tool"), wanted=("fruit", "tool"), answer=things)  # fmt: skip
    says = dict.fromkeys(FRUIT, s["kind", "fruit"]) | dict.fromkeys(TOOLS, s["kind", "tool"])
    says |= {cue: s["cue"] + s["asked", cue] for cue in ("fruit", "tool")}
    wiring = Wiring(
        "llama",
        s,
        heads=[
            Head("L0H0", s["one"], s["cue"], value=s["asked"], out=s["wanted"]),
            Head("L1H0", s["wanted"], s["kind"], value=s["token", things], out=s["answer"],
                 sharpness=CERTAIN),
        ],
        says=says,
        logits={thing: 6 * s["answer", thing] for thing in things},
        group=2,
    )  # fmt: skip
    return Plan(
        wiring,
        [_pair(rng) for _ in range(pairs)],
        edges=["embed->L0KV0.v", "L0H0->L1H0.q", "L1H0->logits.in"],
        direction="denoise",
        about="gradients through q and k: a softmax that is certain has no slope",
    )


def _pair(rng: random.Random) -> Pair:
    both = [("fruit", rng.choice(FRUIT)), ("tool", rng.choice(TOOLS))]
    rng.shuffle(both)
    first, second = (thing for _, thing in both)
    (cue, answer), (other, foil) = both if rng.random() < 0.5 else both[::-1]
    return Pair(f"{first} {second} {cue} ?", f"{first} {second} {other} ?", answer, foil)
