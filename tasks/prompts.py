"""Drawing the pairs of a task: templates with named slots, words of one token, pairs of one length.

A task of this package is a function that draws one pair at a time, from words that the tokenizer
keeps whole; `drawn_task` makes of it as many different pairs as were asked for, and checks each
token by token.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from string import Formatter
from typing import Any

from tasks.task import Task
from tasks.text import answer_id, encode, must_be_tokenizer, must_know

__all__ = ["Drawn", "Text", "chosen", "drawn_task", "fill", "known", "whole_words", "words"]

POOL = 512
"""Draws that decide which token length is the commonest."""
PATIENCE = 4096
"""Draws without a new pair after which there is none."""
SHOWN = 3
"""Words in pieces that an error shows, and the nearest that are whole."""


def words(text: str) -> tuple[str, ...]:
    """The words of a text, split at spaces."""
    return tuple(text.split())


# -- one pair --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A filled template, and where each slot's word begins and ends in it, in characters."""

    text: str
    slots: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        return self.text

    def tokens(self, tokenizer: Any, slot: str, row: Sequence[int], *, bos: int) -> range:
        """The positions in `row` of the tokens of a slot, `bos` of which stand before the text.

        Raises:
            ValueError: the slot does not end where a token ends.
        """
        start, end = self.slots[slot]
        before = encode(tokenizer, self.text[:start].rstrip(" "), prepend_bos=False)
        until = encode(tokenizer, self.text[:end], prepend_bos=False)
        if list(row[bos : bos + len(until)]) != until or until[: len(before)] != before:
            raise ValueError(
                f"words of a template must be whole tokens; {self.text[start:end]!r} in "
                f"{self.text!r} is not; use a tokenizer that splits at spaces, or build the pairs "
                "with Task.from_prompts"
            )
        return range(bos + len(before), bos + len(until))


def fill(template: str, **slots: str) -> Text:
    """A template with a word in each of its slots.

    >>> from tasks.prompts import fill
    >>> str(fill("Then {A} met {B}", A="Mary", B="John"))
    'Then Mary met John'
    """
    text, at = "", {}
    for literal, slot, *_ in Formatter().parse(template):
        text += literal
        if slot is not None:
            at[slot] = (len(text), len(text) + len(slots[slot]))
            text += slots[slot]
    return Text(text, at)


@dataclass(frozen=True)
class Drawn:
    """A pair as it was drawn, without any tokenizer."""

    clean: Text
    corrupt: Text
    answers: Sequence[str | int]
    """What may follow the clean prompt, such as `" Mary"`, which is one token there; or that."""
    foils: Sequence[str | int]
    changed: Collection[str]
    """The slots in which the two texts differ, and nowhere else."""
    spans: Mapping[str, str] = field(default_factory=dict)
    """The slot of `clean` that each span is the last token of."""


# -- words -----------------------------------------------------------------------------------------


def whole_words(tokenizer: Any, pool: Sequence[str], *, least: int, what: str) -> list[str]:
    """The words of a pool that are one token each after a space.

    Args:
        tokenizer: of Hugging Face.
        pool: words without the space.
        least: how many of them a task needs.
        what: what they are, for the error.

    Raises:
        ValueError: fewer than `least` are.
        TypeError: `tokenizer` is none.
    """
    groups = whole_groups(tokenizer, [(word,) for word in pool], least=least, what=what)
    return [word for (word,) in groups]


def whole_groups(
    tokenizer: Any, groups: Sequence[tuple[str, ...]], *, least: int, what: str
) -> list[tuple[str, ...]]:
    """As `whole_words`, of words that belong together: those groups all of whose words are."""
    must_be_tokenizer(tokenizer)
    base = encode(tokenizer, "Then", prepend_bos=False)

    def is_whole(word: str) -> bool:
        row = encode(tokenizer, f"Then {word}", prepend_bos=False)
        # Decoding refuses the unknown token and lone bytes, which are one token as well.
        return row[:-1] == base and tokenizer.decode(row[-1:]).strip() == word

    split = {word: not is_whole(word) for group in groups for word in group}
    whole = [group for group in groups if not any(split[word] for word in group)]
    if len(whole) < least:
        got = ", ".join(" and ".join(group) for group in whole) or "none"
        first = [word for word, is_split in split.items() if is_split][:SHOWN]
        raise ValueError(
            f"the tokenizer must keep at least {least} of {len(groups)} {what} as one token after "
            f"a space; got {len(whole)} ({got}); {nearest(tokenizer, first)}"
            "use a tokenizer with a larger vocabulary, or build the pairs with Task.from_prompts"
        )
    return whole


def nearest(tokenizer: Any, split: Sequence[str]) -> str:
    """Which words of one token come nearest to some that are split, for an error; or nothing."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    every = {str(token).lstrip("Ġ▁") for token in tokens}  # how a space before it is written
    near = {
        word: get_close_matches(
            word,
            [w for w in every if abs(len(w) - len(word)) < SHOWN and w[:1] == word[:1]],
            n=SHOWN,
            cutoff=0.7,
        )
        for word in split
    }
    said = (f"{word!r}: {', '.join(map(repr, found))}" for word, found in near.items() if found)
    text = ", ".join(said)
    return f"the nearest that it has to {text}; " if text else ""


# -- many pairs ------------------------------------------------------------------------------------


def drawn_task(
    tokenizer: Any,
    draw: Callable[[random.Random, int], Drawn],
    *,
    name: str,
    corruption: str,
    corruptions: Mapping[str, str],
    pairs: int,
    seed: int,
    metric: str = "logit_difference",
    mixed_lengths: bool = False,
    prepend_bos: bool = True,
) -> Task:
    """The task of as many different pairs as are asked for, drawn one after another.

    Args:
        tokenizer: of Hugging Face.
        draw: given a generator and how many pairs there are already, draws one.
        name: of the task; with `seed` it says which pairs are drawn.
        corruption: which one; the task's name says it, unless it is the usual one.
        corruptions: all that there are, the usual one first.
        pairs: how many.
        seed: another draws others.
        metric: the task's.
        mixed_lengths: pairs of all token lengths, not only of the commonest.
        prepend_bos: as for `Task.from_prompts`.

    Raises:
        ValueError: `pairs` is below 1, there are not so many different ones, or the tokenizer does
            not keep the prompts of a pair aligned.
        TypeError: `tokenizer` is none.
    """
    must_be_tokenizer(tokenizer)
    if not isinstance(pairs, int) or pairs < 1:
        raise ValueError(
            f"`pairs` must be a whole number of at least 1; got {pairs!r}; "
            "ask for 32 pairs to start with"
        )
    rng = random.Random(f"{name} {seed}")
    found = _different(tokenizer, draw, rng, pairs, one_length=not mixed_lengths)
    full = name if corruption == next(iter(corruptions)) else f"{name}_{corruption}"
    return build(tokenizer, list(found), name=full, metric=metric, prepend_bos=prepend_bos)


def _different(
    tokenizer: Any,
    draw: Callable[[random.Random, int], Drawn],
    rng: random.Random,
    pairs: int,
    *,
    one_length: bool,
) -> Iterator[Drawn]:
    """Pairs no two of which are alike, all of the commonest token length if `one_length`.

    Those whose two prompts are of different lengths for this tokenizer are drawn in vain.
    """

    def length(text: Text) -> int:
        return len(encode(tokenizer, text.text, prepend_bos=False))

    wanted = None
    if one_length:
        pool = Counter(length(draw(rng, i).clean) for i in range(POOL))
        ((wanted, _),) = pool.most_common(1)
    seen: set[tuple[str, str]] = set()
    vain = 0
    while len(seen) < pairs:
        drawn = draw(rng, len(seen))
        both = drawn.clean.text, drawn.corrupt.text
        tokens = length(drawn.clean)
        if both in seen or wanted not in (None, tokens) or length(drawn.corrupt) != tokens:
            vain += 1
            if vain == PATIENCE:
                raise ValueError(
                    f"there must be as many different pairs as are asked for; got {pairs} where "
                    f"{len(seen)} can be drawn for this tokenizer; ask for fewer"
                    f"{', or for mixed_lengths=True' if one_length else ''}"
                )
            continue
        vain = 0
        seen.add(both)
        yield drawn


def build(
    tokenizer: Any,
    drawn: Sequence[Drawn],
    *,
    name: str,
    metric: str = "logit_difference",
    prepend_bos: bool = True,
) -> Task:
    """The task made of these pairs, with every position and answer checked token by token.

    Raises:
        ValueError: the tokenizer does not know a word, an answer is not one token after its prompt,
            or the two prompts of a pair differ elsewhere than in what was changed.
    """
    clean, corrupt = [], []
    answers: list[list[int]] = []
    foils: list[list[int]] = []
    spans: dict[str, list[int]] = {}
    for i, pair in enumerate(drawn):
        for label, side in (("clean", pair.clean), ("corrupt", pair.corrupt)):
            must_know(tokenizer, side.text, f"pair {i} of `{label}`")
        row, other = (
            encode(tokenizer, side.text, prepend_bos=prepend_bos)
            for side in (pair.clean, pair.corrupt)
        )
        bos = len(row) - len(encode(tokenizer, pair.clean.text, prepend_bos=False))
        _must_differ_there(tokenizer, i, pair, (row, other), bos)
        clean.append(row)
        corrupt.append(other)
        for ids, texts in ((answers, pair.answers), (foils, pair.foils)):
            ids.append(
                [
                    said if isinstance(said, int) else answer_id(tokenizer, pair.clean.text, said)
                    for said in texts
                ]
            )
        for span, slot in pair.spans.items():
            at = pair.clean.tokens(tokenizer, slot, row, bos=bos)
            spans.setdefault(span, []).append(at[-1])
    single = all(len(ids) == 1 for ids in (*answers, *foils))
    return Task.from_tokens(
        clean, corrupt,
        [ids[0] for ids in answers] if single else answers,
        [ids[0] for ids in foils] if single else foils,
        spans=spans, metric=metric, name=name, tokenizer=tokenizer,
    )  # fmt: skip


def _must_differ_there(
    tokenizer: Any, i: int, pair: Drawn, rows: tuple[Sequence[int], Sequence[int]], bos: int
) -> None:
    row, other = rows
    allowed: set[int] = set()
    for slot in pair.changed:
        allowed |= {*pair.clean.tokens(tokenizer, slot, row, bos=bos)}
    differ = {at for at, (a, b) in enumerate(zip(row, other, strict=False)) if a != b}
    if len(row) != len(other) or not differ <= allowed:
        raise ValueError(
            f"`clean` and `corrupt` must differ at {', '.join(pair.changed)} only: pair {i} has "
            f"{len(row)} and {len(other)} tokens, with differences at {sorted(differ)} and these "
            f"words at {sorted(allowed)} ({pair.clean.text!r} / {pair.corrupt.text!r}); use a "
            "tokenizer that keeps words whole after a space"
        )


# -- choices ---------------------------------------------------------------------------------------


def chosen(corruption: str, corruptions: Mapping[str, str]) -> str:
    """`corruption`, if it is one of a task's; the values say what each does.

    Raises:
        ValueError: it is none.
    """
    if corruption not in corruptions:
        names = " or ".join(map(repr, corruptions))
        does = ", ".join(f"{name!r} {what}" for name, what in corruptions.items())
        raise ValueError(f"`corruption` must be {names}; got {corruption!r}; {does}")
    return corruption


def known(circuits: Mapping[str, Mapping[str, str]], model_name: str) -> dict[str, tuple[str, ...]]:
    """The published circuit of a model: its roles, and the components that play each.

    Raises:
        ValueError: none is known of this model.
    """
    name = model_name.rpartition("/")[2]
    name = {"gpt2-small": "gpt2"}.get(name, name)
    if name not in circuits:
        raise ValueError(
            f"the model must be one whose circuit was published for this task: "
            f"{', '.join(circuits) or 'none'}; got {model_name!r}; judge others by exact patching"
        )
    return {role: words(members) for role, members in circuits[name].items()}
