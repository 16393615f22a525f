"""Indirect object identification: prompts, their two corruptions, and where each name stands.

"When Mary and John went to the store, John gave a drink to" -> " Mary", not " John".
The task is that of Wang et al. 2022 (arXiv:2211.00593); templates and fillers are our own.
Every template starts with a word that is not a name, so that each name follows a space and is the
same token wherever it stands.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.prompts import Drawn, Text, chosen, drawn_task, fill, known, whole_words, words
from tasks.task import Task

__all__ = ["ioi", "known_circuit"]

# {A} and {B} are the two names of the first clause, {S} the subject of the second.
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "After {A} and {B} arrived at the {place}, {S} handed a {object} to",
    "While {A} and {B} were working at the {place}, {S} passed a {object} to",
    "Then {A} and {B} met near the {place}, and {S} showed a {object} to",
    "Then {A} and {B} had a long talk at the {place}, and {S} offered a {object} to",
    "Yesterday {A} and {B} walked past the {place}, and {S} bought a {object} for",
    "Once {A} and {B} had found the {place}, {S} decided to give a {object} to",
    "Because {A} and {B} liked the {place}, {S} wanted to bring a {object} to",
    "As soon as {A} and {B} reached the {place}, {S} lent a {object} to",
    "Before {A} and {B} left the {place}, {S} took a {object} to",
    "The {place} was quiet when {A} and {B} came in, so {S} read a story to",
    "The {place} was closed, but {A} and {B} waited, and {S} sent a {object} to",
    "Last week {A} and {B} cleaned the {place}, and later {S} mailed a {object} to",
    "Although {A} and {B} were late for the {place}, {S} stopped to sell a {object} to",
    "At the {place}, {A} and {B} sat down, and {S} threw a {object} to",
    "In the morning {A} and {B} opened the {place}, and {S} carried a {object} to",
    "In the evening {A} and {B} came home from the {place}, and {S} made a {object} for",
    "Since {A} and {B} often visit the {place}, {S} will return a {object} to",
    "Today {A} and {B} have a party at the {place}, where {S} will hand a {object} to",
    "Old friends {A} and {B} stood outside the {place}, and {S} left a {object} for",
    "Both {A} and {B} were hungry at the {place}, so {S} served a meal to",
    "During the trip {A} and {B} got lost near the {place}, and {S} pointed it out to",
    "With a smile {A} and {B} entered the {place}, and {S} said hello to",
    "It was raining when {A} and {B} found the {place}, so {S} lent a coat to",
)
WOMEN = words(
    "Mary Anna Sarah Emily Alice Laura Kate Jane Lisa Emma Helen Julia Karen Linda Susan Rachel "
    "Amy Claire Diana Ruth Maria Sophie Nancy Carol Jessica Rebecca Lucy Barbara Michelle Nicole "
    "Amanda Elizabeth"
)
MEN = words(
    "John Tom James Paul Peter David Mark Simon Daniel Robert Michael George Henry Jack Adam Kevin "
    "Brian Steve Eric Frank Martin Andrew Thomas Richard Charles Joseph William Edward Matthew "
    "Anthony Scott Ryan"
)
NAMES = (*WOMEN, *MEN)
PLACES = words(
    "store school park library office garden station museum hospital market beach house church "
    "bank farm restaurant"
)
OBJECTS = words(
    "book drink ring letter basket ball key computer camera bag picture map flower lamp ticket hat"
)

CORRUPTIONS = {"flip": "swaps who gives", "abc": "replaces all names"}
NAMES_NEEDED = 5  # two in a prompt and three fresh ones for "abc"

KNOWN = {
    "gpt2": {
        "name mover": "L9H9 L10H0 L9H6",
        "backup name mover": "L10H10 L10H6 L10H2 L10H1 L11H2 L9H7 L9H0 L11H9",
        "negative name mover": "L10H7 L11H10",
        "S-inhibition": "L7H3 L7H9 L8H6 L8H10",
        "induction": "L5H5 L5H8 L5H9 L6H9",
        "duplicate token": "L0H1 L0H10 L3H0",
        "previous token": "L2H2 L4H11",
    }
}
"""Wang et al. 2022, arXiv:2211.00593, figure 2."""


@dataclass(frozen=True)
class Prompt:
    """One drawn prompt: template number, names and fillers, without any tokenizer."""

    template: int
    io: str
    s: str
    abba: bool
    place: str
    object: str
    fresh: tuple[str, str, str]

    def filled(self, corruption: str | None = None) -> Text:
        """The prompt, up to and without the answer; `None` is the clean one."""
        first, second = (self.io, self.s) if self.abba else (self.s, self.io)
        subject = self.s
        if corruption == "flip":
            subject = self.io
        elif corruption == "abc":
            first, second, subject = self.fresh
        return fill(
            TEMPLATES[self.template], A=first, B=second, S=subject, place=self.place,
            object=self.object,
        )  # fmt: skip

    def text(self) -> str:
        """The clean prompt."""
        return self.filled().text

    def pair(self, corruption: str) -> Drawn:
        """The clean prompt beside its corruption."""
        io, s1 = ("A", "B") if self.abba else ("B", "A")
        return Drawn(
            self.filled(), self.filled(corruption), [f" {self.io}"], [f" {self.s}"],
            changed=("S",) if corruption == "flip" else (io, s1, "S"),
            spans={"IO": io, "S1": s1, "S2": "S"},
        )  # fmt: skip


def draw(rng: random.Random, names: Sequence[str], *, abba: bool) -> Prompt:
    """A prompt with template, names and fillers drawn uniformly; five names, all different."""
    io, s, *fresh = rng.sample(names, NAMES_NEEDED)
    return Prompt(
        template=rng.randrange(len(TEMPLATES)),
        io=io,
        s=s,
        abba=abba,
        place=rng.choice(PLACES),
        object=rng.choice(OBJECTS),
        fresh=(fresh[0], fresh[1], fresh[2]),
    )


def ioi(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Indirect object identification: answer the indirect object (IO), foil the subject (S).

    >>> task = ioi(model.tokenizer, pairs=4)
    >>> model.to_string(task.clean[0])

    Half of the prompts name IO first (ABBA), half S (BABA). `"flip"` puts IO in place of the
    second S, so that the corrupt prompt's answer is S; `"abc"` puts three fresh names in place of
    IO and both S, so that neither name is favoured. Spans: `IO`, `S1`, `S2`, `end`, as positions
    in `clean`. Names that this tokenizer splits are left out. By default all prompts have one
    token length, the commonest; with `mixed_lengths` all templates are used. The same arguments
    give the same task, and no global random state is touched.

    Source: Wang et al. 2022, arXiv:2211.00593; "flip" as in the demonstrations of TransformerLens.

    Raises:
        ValueError: `pairs` is below 1, `corruption` is unknown, or the tokenizer keeps fewer than
            five names whole, does not know a word or does not keep the prompts of a pair aligned.
        TypeError: `tokenizer` is none.
    """
    names = whole_words(tokenizer, NAMES, least=NAMES_NEEDED, what="common names")
    kind = chosen(corruption, CORRUPTIONS)
    return drawn_task(
        tokenizer,
        lambda rng, i: draw(rng, names, abba=i % 2 == 0).pair(kind),
        name="ioi",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )


def known_circuit(model_name: str) -> dict[str, tuple[str, ...]]:
    """The circuit published for a model: what each head does.

    >>> from tasks.ioi import known_circuit
    >>> known_circuit("gpt2")["name mover"]
    ('L9H9', 'L10H0', 'L9H6')

    Source: Wang et al. 2022, arXiv:2211.00593. Negative name movers work against the answer, and
    backup name movers act mainly when the name movers are knocked out.

    Raises:
        ValueError: none is known of this model.
    """
    return known(KNOWN, model_name)
