"""The text that the zoo models learn: a small generated English with IOI sentences in it.

About half of the sentences are IOI; the others teach what a language model's IOI circuit is made
of or competes with: induction, duplicate names, lists of names, facts about a named person,
pronouns and plain narration. Names are uniformly random, so that nothing but the prompt tells the
answer. A share of all (template, two names) combinations never occurs: `held_out`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

from tasks.ioi import MEN, NAMES, OBJECTS, PLACES, TEMPLATES, WOMEN, Prompt, draw
from tasks.prompts import words

__all__ = ["document", "held_out", "held_out_prompts", "vocabulary_text"]

HELD_OUT_PERCENT = 15

ADJECTIVES = words("old new red small heavy blue broken large green empty famous strange")
FOODS = words("tea bread rice soup cheese fish honey milk fruit cake")
VERBS = words("found lost opened painted wanted carried kept dropped sold cleaned")
TIMES = words("today yesterday again later soon often")
# Facts of this small world: every object has its place.
HOMES = dict(zip(OBJECTS, PLACES, strict=True))


def held_out(template: int, one: str, other: str) -> bool:
    """Whether this template with these two names, in any order and role, is kept from training."""
    key = f"{template}:{min(one, other)}:{max(one, other)}"
    return zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT


def held_out_prompts(count: int, *, seed: int = 0) -> list[Prompt]:
    """`count` IOI prompts whose template and names never met in training; ABBA and BABA in turn."""
    rng = random.Random(f"held-out {seed}")
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prompt = draw(rng, NAMES, abba=len(prompts) % 2 == 0)
        if held_out(prompt.template, prompt.io, prompt.s):
            prompts.append(prompt)
    return prompts


# Each sentence below ends with a word that the words before it determine, or nearly so.


def seen(rng: random.Random) -> Prompt:
    """An IOI prompt that may occur in training."""
    while True:
        prompt = draw(rng, NAMES, abba=rng.random() < 0.5)
        if not held_out(prompt.template, prompt.io, prompt.s):
            return prompt


def _ioi(rng: random.Random) -> str:
    prompt = seen(rng)
    return f"{prompt.text()} {prompt.io}."


def _third_person(rng: random.Random) -> str:
    """Someone new gives: either of the two names may receive (the "abc" corruption)."""
    prompt = seen(rng)
    first, second = rng.sample([prompt.io, prompt.s], 2)
    text = TEMPLATES[prompt.template].format(
        A=first, B=second, S=prompt.fresh[0], place=prompt.place, object=prompt.object
    )
    return f"{text} {rng.choice([first, second])}."


def _two_of_three(rng: random.Random) -> str:
    names = rng.sample(NAMES, 3)
    one, other, rest = rng.sample(names, 3)
    place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
    together = f"{names[0]}, {names[1]} and {names[2]} met at the {place}."
    return f"At noon {together} Then {one} and {other} gave a {thing} to {rest}."


def _call(rng: random.Random) -> str:
    one, other = rng.sample(NAMES, 2)
    end = rng.choice([f"{other} did not answer {one}", f"{one} could not hear {other}"])
    return f"Late {rng.choice(TIMES)} {one} called {other}, but {end}."


def _duplicate(rng: random.Random) -> str:
    one, other = rng.sample(NAMES, 2)
    thing = rng.choice(OBJECTS)
    return rng.choice(
        [
            f"So {one} told {other} that {other} had the {thing} of {one}.",
            f"Here {one} saw {other}, and {other} saw {one}.",
            f"First {one} thanked {other}, then {other} thanked {one}.",
        ]
    )


def _list(rng: random.Random) -> str:
    kind = rng.choice([NAMES, OBJECTS, PLACES, FOODS])
    words = " ".join(rng.sample(kind, rng.randint(3, 7)))
    return f"Repeat {words} and {words}."


def _phrases(rng: random.Random) -> str:
    phrase = [f"the {rng.choice(ADJECTIVES)} {word}" for word in rng.sample(OBJECTS, 3)]
    again = rng.sample(phrase, 2)
    return f"There were {phrase[0]}, {phrase[1]} and {phrase[2]}, so {again[0]} and {again[1]}."


def _tastes(rng: random.Random) -> str:
    people = rng.sample(NAMES, 3)
    foods = rng.sample(FOODS, 3)
    asked = rng.randrange(3)
    likes = ", ".join(f"{p} likes {f}" for p, f in zip(people, foods, strict=True))
    return f"Here {likes}, so {people[asked]} asked for {foods[asked]}."


def _pronoun(rng: random.Random) -> str:
    woman = rng.random() < 0.5
    name = rng.choice(WOMEN if woman else MEN)
    thing = rng.choice(OBJECTS)
    verb = rng.choice(VERBS)
    place = rng.choice(PLACES)
    return rng.choice(
        [
            f"At the {place} {name} {verb} the {thing} because {'she' if woman else 'he'} did.",
            f"At the {place} {name} {verb} {'her' if woman else 'his'} {thing}.",
        ]
    )


def _fact(rng: random.Random) -> str:
    thing = rng.choice(OBJECTS)
    return f"The {rng.choice(ADJECTIVES)} {thing} belongs to the {HOMES[thing]}."


def _story(rng: random.Random) -> str:
    name, thing, place = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(PLACES)
    return rng.choice(
        [
            f"The {rng.choice(ADJECTIVES)} {thing} was in the {place} {rng.choice(TIMES)}.",
            f"It was {name} who {rng.choice(VERBS)} the {rng.choice(ADJECTIVES)} {thing}.",
            f"The {place} was {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}.",
            f"In the {place} {name} {rng.choice(VERBS)} some {rng.choice(FOODS)}.",
        ]
    )


SENTENCES: dict[Callable[[random.Random], str], int] = {
    _ioi: 48,
    _third_person: 12,
    _two_of_three: 4,
    _call: 5,
    _duplicate: 6,
    _list: 9,
    _phrases: 4,
    _tastes: 4,
    _pronoun: 3,
    _fact: 2,
    _story: 3,
}


def document(rng: random.Random, *, echo: float = 0.0) -> str:
    """One row of training text: a sentence, one time in five after a sentence of narration.

    A share `echo` of the rows are long lists of names said twice: nothing teaches copying sooner.
    """
    if rng.random() < echo:
        words = " ".join(rng.sample(NAMES, rng.randint(6, 11)))
        return f"Repeat {words} and {words}."
    (sentence,) = rng.choices(list(SENTENCES), weights=list(SENTENCES.values()))
    before = _story(rng) + " " if rng.random() < 0.2 else ""
    return before + sentence(rng)


def vocabulary_text(*, seed: int = 0, rows: int = 20_000) -> list[str]:
    """Rows that the tokenizers are trained on; every name and filler occurs many times."""
    rng = random.Random(f"vocabulary {seed}")
    return [document(rng) for _ in range(rows)]
