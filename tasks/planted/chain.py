"""A chain of three heads like that of indirect object identification.

    Mary John met, John gave  ->  Mary

    embed --q--> L0H0 (duplicate token) --v--> L1H0 (S-inhibition) --q--> L2H0 --> logits
    embed --v---------------------------------------------------------------^

The duplicate-token head stands at the second John, and says in which of the two places the first
one is; the S-inhibition head brings that to the end; the name mover L2H0 looks at the names, but
not there. Half of the pairs differ in the second name (the chain), half in the other one (a value).

Source: Wang et al. 2022, arXiv:2211.00593; there are more heads, and tokens beside places.
"""

from __future__ import annotations

import random

import torch

from tasks.planted.factory import Pair, Plan, circuit
from tasks.planted.stream import Head, Stream
from tasks.planted.weights import Wiring

__all__ = ["ioi_chain"]

NAMES = ("Mary", "John", "Anna", "Tom", "Kate", "Paul")
MEETS, GIVES = ("met", "saw", "called"), ("gave", "sent", "handed")
FIRST, AGAIN, END = (1, 2), 4, 5


@circuit
def ioi_chain(rng: random.Random, pairs: int) -> Plan:
    """Duplicate token, S-inhibition, name mover (GPT-2): composition by v, then by q.

    Built to break methods whose errors multiply: each edge of the chain shows only through the
    softmax of one head or of two.

    >>> made = planted.ioi_chain(pairs=4)
    >>> made.edges >= {"L0H0->L1H0.v", "L1H0->L2H0.q"}
    True
    """
    s = Stream(token=NAMES + MEETS + GIVES, place=6, twice=FIRST, inhibited=FIRST, answer=NAMES)
    names, slots = s["token", NAMES], s["place", FIRST]
    slot = slots.sum(0, keepdim=True)  # is it one of the two?
    wiring = Wiring(
        "gpt2",
        s,
        heads=[
            Head("L0H0", torch.cat([names, s["one"]]), torch.cat([names, slot]),
                 value=slots, out=s["twice"], sharpness=6.0),
            Head("L1H0", s["place", END], s["place", AGAIN], value=s["twice"], out=s["inhibited"]),
            Head("L2H0", torch.cat([s["one"], s["inhibited"]]), torch.cat([slot, -slots]),
                 value=names, out=s["answer"], sharpness=6.0),
        ],
        logits={name: 6 * s["answer", name] for name in NAMES},
    )  # fmt: skip
    return Plan(
        wiring,
        [_pair(rng, other_subject=i % 2 == 0) for i in range(pairs)],
        edges=["embed->L0H0.q", "L0H0->L1H0.v", "L1H0->L2H0.q", "embed->L2H0.v", "L2H0->logits.in"],
        direction="denoise",
        about="errors that multiply: a chain of three heads, each seen through the next one",
        kinds=2,
    )


def _pair(rng: random.Random, *, other_subject: bool) -> Pair:
    """The subject of the second clause is the other name, or the other name is a new one."""
    subject, other, new = rng.sample(NAMES, 3)
    meets, gives, swapped = rng.choice(MEETS), rng.choice(GIVES), rng.random() < 0.5

    def text(other: str, again: str) -> str:
        first, second = (other, subject) if swapped else (subject, other)
        return f"{first} {second} {meets} {again} {gives}"

    if other_subject:
        return Pair(text(other, subject), text(other, other), answer=other, foil=subject)
    return Pair(text(other, subject), text(new, subject), answer=other, foil=new)
