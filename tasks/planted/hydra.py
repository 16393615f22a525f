"""A backup head that is silent until the main one is.

    Mary came first ?  ->  Mary, rather than nobody

    embed --v--> L0H0 (name mover) ----------------> logits
                    |  --q--+                          ^
    embed --v--------------> L1H0 (backup, 0.7 of it) -+

The name mover also writes that it has answered; the backup then rests on the first token, and
otherwise does 0.7 of the main head's work.

From the clean run (noise), the main head's input shows 0.3 of its effect, as the backup steps in;
its edge to the backup shows what that adds; the backup's own edges show nothing, as it is silent
in both runs. Those are `hidden`: they act once the main head's input is cut.

Source: McGrath et al. 2023, arXiv:2307.15771 (Hydra effect, partial self-repair); the backup name
movers of Wang et al. 2022, arXiv:2211.00593.
"""

from __future__ import annotations

import random

import torch

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Stream
from tasks.planted.weights import Wiring

__all__ = ["backup"]

NAMES = ("Mary", "John", "Anna", "Tom", "Kate", "Paul")
NOBODY = "nobody"
CAME, WHEN = ("came", "went", "stood"), ("first", "last")
SHARE = 0.7


@circuit
def backup(rng: random.Random, pairs: int) -> Plan:
    """A name mover and its backup (GPT-2).

    Built to break one-edge patching, which cannot see the backup's own edges, and gradients, which
    do not see that the main head holds it back.

    >>> made = planted.backup(pairs=4)
    >>> sorted(made.hidden)
    ['L1H0->logits.in', 'embed->L1H0.v']
    """
    s = Stream(token=(*NAMES, NOBODY, *CAME, *WHEN, "?"), place=5, somebody=1, done=1, answer=NAMES)
    names, slot, start = s["token", NAMES], s["place", 1], s["place", 0]
    wiring = Wiring(
        "gpt2",
        s,
        heads=[
            Head("L0H0", s["place", 4], slot, value=torch.cat([names, s["somebody"]]),
                 out=torch.cat([s["answer"], s["done"]])),
            Head("L1H0", torch.cat([s["place", 4], 2 * s["done"]]), torch.cat([slot, start]),
                 value=names, out=SHARE * s["answer"]),
        ],
        says=dict.fromkeys(NAMES, s["somebody"]),
        logits={name: 12 * s["answer", name] for name in NAMES} | {NOBODY: 6 * s["one"]},
    )  # fmt: skip
    return Plan(
        wiring,
        [_pair(rng) for _ in range(pairs)],
        edges=["embed->L0H0.v", "L0H0->L1H0.q", "L0H0->logits.in"],
        direction="noise",
        about="one-edge patching, by a backup that is silent in both runs; gradients, by its query",
        hidden=["embed->L1H0.v", "L1H0->logits.in"],
    )


def _pair(rng: random.Random) -> Pair:
    name, rest = rng.choice(NAMES), f"{rng.choice(CAME)} {rng.choice(WHEN)} ?"
    return Pair(f"{name} {rest}", f"{NOBODY} {rest}", answer=name, foil=NOBODY)
