"""Indirect object identification: prompts, their two corruptions, and where each name stands.

"When Mary and John went to the store, John gave a drink to" -> " Mary", not " John".
The task is that of Wang et al. 2022 (arXiv:2211.00593); templates and fillers are our own.
Every template starts with a word that is not a name, so that each name follows a space and is the
same token wherever it stands.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tasks.task import Task
from tasks.text import answer_id, encode, must_be_tokenizer, must_know

__all__ = ["ioi"]


def words(text: str) -> tuple[str, ...]:
    """The words of a text, split at spaces."""
    return tuple(text.split())


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

NAMES_NEEDED = 5  # two in a prompt and three fresh ones for "abc"
POOL = 512  # prompts that decide which token length is the commonest


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

    def text(self, corruption: str | None = None) -> str:
        """The prompt, up to and without the answer; `None` is the clean one."""
        first, second = (self.io, self.s) if self.abba else (self.s, self.io)
        subject = self.s
        if corruption == "flip":
            subject = self.io
        elif corruption == "abc":
            first, second, subject = self.fresh
        return TEMPLATES[self.template].format(
            A=first, B=second, S=subject, place=self.place, object=self.object
        )


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
    must_be_tokenizer(tokenizer)
    if not isinstance(pairs, int) or pairs < 1:
        raise ValueError(
            f"`pairs` must be a whole number of at least 1; got {pairs!r}; "
            "ask for 32 pairs to start with"
        )
    if corruption not in ("flip", "abc"):
        raise ValueError(
            f"`corruption` must be 'flip' or 'abc'; got {corruption!r}; 'flip' swaps who gives, "
            "'abc' replaces all names"
        )
    names = whole_names(tokenizer)
    rng = random.Random(f"ioi {seed}")
    if mixed_lengths:
        prompts = [draw(rng, names, abba=i % 2 == 0) for i in range(pairs)]
    else:
        prompts = _of_one_length(tokenizer, names, pairs, rng)
    return build(tokenizer, prompts, corruption=corruption, prepend_bos=prepend_bos)


def whole_names(tokenizer: Any) -> list[str]:
    """The names that are one token each after a space.

    Raises:
        ValueError: fewer than five are.
    """
    base = encode(tokenizer, "Then", prepend_bos=False)
    names = []
    for name in NAMES:
        row = encode(tokenizer, f"Then {name}", prepend_bos=False)
        # Decoding refuses the unknown token and lone bytes, which are one token as well.
        if row[:-1] == base and tokenizer.decode(row[-1:]).strip() == name:
            names.append(name)
    if len(names) < NAMES_NEEDED:
        raise ValueError(
            f"the tokenizer must keep at least {NAMES_NEEDED} of {len(NAMES)} common names as one "
            f"token after a space; got {len(names)} ({', '.join(names) or 'none'}); use a "
            "tokenizer with a larger vocabulary, or build the pairs with Task.from_prompts"
        )
    return names


def build(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    corruption: str = "flip",
    prepend_bos: bool = True,
) -> Task:
    """The task made of these prompts, with every position and answer checked token by token.

    Raises:
        ValueError: the tokenizer does not know a word, a name is not one token in its prompt, or
            the two prompts of a pair differ elsewhere than at the names.
    """
    clean, corrupt, answers, foils = [], [], [], []
    spans: dict[str, list[int]] = {"IO": [], "S1": [], "S2": [], "end": []}
    for i, prompt in enumerate(prompts):
        text, other_text = prompt.text(), prompt.text(corruption)
        must_know(tokenizer, text, f"pair {i} of `clean`")
        must_know(tokenizer, other_text, f"pair {i} of `corrupt`")
        row = encode(tokenizer, text, prepend_bos=prepend_bos)
        other = encode(tokenizer, other_text, prepend_bos=prepend_bos)
        answer = answer_id(tokenizer, text, f" {prompt.io}")
        foil = answer_id(tokenizer, text, f" {prompt.s}")
        io = [at for at, token in enumerate(row) if token == answer]
        s = [at for at, token in enumerate(row) if token == foil]
        if len(io) != 1 or len(s) != 2:
            raise ValueError(
                f"a prompt must hold IO once and S twice, as one token each; got {len(io)} and "
                f"{len(s)} in {text!r}; use a tokenizer that keeps names whole after a space"
            )
        names = {s[1]} if corruption == "flip" else {*io, *s}
        changed = {at for at, (a, b) in enumerate(zip(row, other, strict=False)) if a != b}
        if len(row) != len(other) or changed != names:
            raise ValueError(
                f"`clean` and `corrupt` must differ at the names only: pair {i} has {len(row)} and "
                f"{len(other)} tokens, with differences at {sorted(changed)} and names at "
                f"{sorted(names)} ({text!r} / {other_text!r}); use a tokenizer that keeps names "
                "whole after a space"
            )
        clean.append(row)
        corrupt.append(other)
        answers.append(answer)
        foils.append(foil)
        for label, at in zip(spans, (io[0], s[0], s[1], len(row) - 1), strict=True):
            spans[label].append(at)
    return Task.from_tokens(
        clean, corrupt, answers, foils, spans=spans, name="ioi", tokenizer=tokenizer
    )


def _of_one_length(
    tokenizer: Any, names: Sequence[str], pairs: int, rng: random.Random
) -> list[Prompt]:
    """Prompts of the commonest token length, ABBA and BABA in turn."""

    def length(prompt: Prompt) -> int:
        return len(encode(tokenizer, prompt.text(), prepend_bos=False))

    pool = Counter(length(draw(rng, names, abba=i % 2 == 0)) for i in range(POOL))
    ((wanted, _),) = pool.most_common(1)
    prompts: list[Prompt] = []
    while len(prompts) < pairs:  # ends: the commonest of a few dozen lengths is never rare
        prompt = draw(rng, names, abba=len(prompts) % 2 == 0)
        if length(prompt) == wanted:
            prompts.append(prompt)
    return prompts
