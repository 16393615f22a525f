"""Subject-verb agreement: the verb takes the number of its subject, not of the noun beside it.

"The keys near the cabinet" -> " are", not " is". Constructions after Linzen et al. 2016
(arXiv:1611.01368), Finlayson et al. 2021 (arXiv:2106.06087) and Marks et al. 2024
(arXiv:2403.19647); words are our own.
"""

from __future__ import annotations

import random
from typing import Any

from tasks.prompts import Drawn, chosen, drawn_task, fill, whole_groups, words
from tasks.task import Task

__all__ = ["subject_verb"]

STRUCTURES = {
    "simple": "The {adjective} {subject}",
    "prepositional": "The {subject} {preposition} the {other}",
    "relative": "The {subject} that the {other} {verb}",
}
NOUNS = words(
    "author student teacher doctor child artist farmer driver singer player friend parent guard "
    "manager actor lawyer soldier worker writer king"
)
OBJECTS = words("car house garden school table window picture letter door book tree shop")
PLURALS = {"child": "children"}
PREPOSITIONS = words("near behind beside with by")
VERBS = words("saw knew met liked followed")
ADJECTIVES = words("old young tall small quiet famous strange happy")
ONE, MANY = (" is", " was", " has"), (" are", " were", " have")
CORRUPTIONS = {
    "flip": "changes the number of the subject",
    "noun": "takes another subject of the other number",
}
NOUNS_NEEDED = 4


def subject_verb(
    tokenizer: Any,
    pairs: int = 32,
    seed: int = 0,
    *,
    structure: str = "prepositional",
    corruption: str = "flip",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """Subject-verb agreement: answers are verbs in the subject's number, foils in the other.

    >>> task = subject_verb(tokenizer, pairs=4, structure="relative")

    Structures: `"simple"` (The old keys), `"prepositional"` (The keys near the cabinet) and
    `"relative"` (The keys that the man saw), whose second noun is of either number. Singular and
    plural in turn. Answers and foils are the verbs is, was, has and are, were, have; the metric
    weighs them together. Corruptions: `"flip"` changes the number of the subject alone; `"noun"`
    takes another subject, of the other number. Spans: `subject`, `other` (but for `"simple"`),
    `end`.

    Source: constructions of Linzen et al. 2016 (arXiv:1611.01368) and Finlayson et al. 2021
    (arXiv:2106.06087); as a task for circuits Marks et al. 2024 (arXiv:2403.19647).

    Raises:
        ValueError: `pairs` is below 1, there are not so many pairs, `corruption` or `structure` is
            unknown, or the tokenizer keeps fewer than four nouns whole in both numbers.
        TypeError: `tokenizer` is none.
    """
    chosen(corruption, CORRUPTIONS)
    if structure not in STRUCTURES:
        raise ValueError(
            f"`structure` must be one of {', '.join(map(repr, STRUCTURES))}; got {structure!r}; "
            "'relative' has a clause between subject and verb"
        )
    people, things = (both_numbers(tokenizer, nouns) for nouns in (NOUNS, OBJECTS))
    others = people if structure == "relative" else things
    spans = {"subject": "subject"} | ({} if structure == "simple" else {"other": "other"})

    def draw(rng: random.Random, i: int) -> Drawn:
        number = i % 2
        subject, second = rng.sample(people, 2)
        changed = subject if corruption == "flip" else second
        slots = {
            "other": rng.choice([o for o in others if o not in (subject, changed)])[
                rng.randrange(2)
            ],
            "adjective": rng.choice(ADJECTIVES),
            "preposition": rng.choice(PREPOSITIONS),
            "verb": rng.choice(VERBS),
        }
        clean, corrupt = (
            fill(STRUCTURES[structure], subject=noun, **slots)
            for noun in (subject[number], changed[1 - number])
        )
        verbs = (ONE, MANY)
        return Drawn(clean, corrupt, verbs[number], verbs[1 - number], ("subject",), spans)

    return drawn_task(
        tokenizer,
        draw,
        name=f"subject_verb_{structure}",
        corruption=corruption,
        corruptions=CORRUPTIONS,
        pairs=pairs,
        seed=seed,
        mixed_lengths=mixed_lengths,
        prepend_bos=prepend_bos,
    )


def both_numbers(tokenizer: Any, nouns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The nouns that are one token after a space both as one and as many."""
    pairs = [(noun, PLURALS.get(noun, f"{noun}s")) for noun in nouns]
    return whole_groups(
        tokenizer, pairs, least=NOUNS_NEEDED, what="nouns, each both as one and as many,"
    )
