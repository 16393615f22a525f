"""Gendered pronouns: which pronoun takes up a name.

"So Mary is a really great friend, isn't" -> " she", not " he". After Mathwin et al. 2023 (a GPT-2
small circuit found in a hackathon, no reliable list of heads); sentences and names are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.ioi import MEN, WOMEN
from tasks.prompts import Drawn, chosen, drawn_task, fill, whole_words, words
from tasks.task import Task

__all__ = ["gendered_pronoun"]

TEMPLATES = (
    "So {name} is a really {kind} {role}, isn't",
    "Well, {name} was a very {kind} {role}, wasn't",
    "I think that {name} is a {kind} {role}, isn't",
    "Surely {name} has always been a {kind} {role}, hasn't",
)
KINDS = words("good great kind bad strange famous happy quiet")
ROLES = words("friend student doctor teacher neighbor person leader writer artist driver")
CORRUPTIONS = {"flip": "takes a name of the other gender"}
NAMES_NEEDED = 5


def gendered_pronoun(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Gendered pronouns: answer and foil are " she" and " he", as the name asks for.

    >>> task = gendered_pronoun(tokenizer, pairs=4)

    Women and men in turn. `"flip"`, the only corruption, puts a name of the other gender, so that
    the corrupt prompt's answer is the foil. Spans: `name`, `end`. The names are those of `ioi` that
    the tokenizer keeps whole.

    Source: after Mathwin et al. 2023, "Identifying a preliminary circuit for predicting gendered
    pronouns in GPT-2 small".

    Raises:
        ValueError: `pairs` is below 1, there are not so many pairs, `corruption` is unknown, or the
            tokenizer keeps fewer than five names of women or men whole or splits a pronoun.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    people = [
        whole_words(tokenizer, names, least=NAMES_NEEDED, what=what)
        for names, what in ((WOMEN, "names of women"), (MEN, "names of men"))
    ]

    def draw(rng: random.Random, i: int) -> Drawn:
        template, kind, role = (rng.choice(pool) for pool in (TEMPLATES, KINDS, ROLES))
        names = [rng.choice(people[(i + j) % 2]) for j in range(2)]
        answer, foil = (" she", " he") if i % 2 == 0 else (" he", " she")
        clean, corrupt = (fill(template, name=name, kind=kind, role=role) for name in names)
        return Drawn(clean, corrupt, [answer], [foil], ("name",), {"name": "name"})

    return drawn_task(
        tokenizer,
        draw,
        name="gendered_pronoun",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )
