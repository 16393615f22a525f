"""What callers give as lists: token ids, positions and texts, in anything that keeps an order.

Sets of answers and foils, too: one token for each pair, or several.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

PAD = -1
"""Fills up rows and sets in what is given: no token has this id."""


def whole_numbers(values: Any, what: str) -> Tensor:
    """Token ids or positions, in any kind of list, as int64 on the CPU; always a copy.

    Raises:
        TypeError: they are not whole numbers.
    """
    try:
        made = as_tensor(values)
        got = str(made.dtype)
        whole = not (made.is_floating_point() or made.is_complex() or made.dtype == torch.bool)
    except (TypeError, ValueError, RuntimeError):
        got, whole = reprlib.repr(values), False
    if not whole:
        raise TypeError(
            f"{what} must hold whole numbers; got {got}; give integers, and lists of one length"
        )
    return made.to("cpu", torch.long, copy=True)


def as_tensor(values: Any) -> Tensor:
    """Numbers in any kind of list as a tensor."""
    if isinstance(values, Tensor):
        return values
    entries = entries_of(values)
    # no numbers at all would be floats, and the default device may be another
    return torch.tensor(entries, dtype=None if entries else torch.long, device="cpu")


def entries_of(values: Any) -> list[Any]:
    """The entries of anything that holds them in order.

    Raises:
        TypeError: `values` does not.
    """
    if isinstance(values, (str, bytes, Mapping, Set)):  # these would give other entries
        raise TypeError(f"{type(values).__name__} is no list")
    return list(values)


def is_list(value: Any) -> bool:
    """True for what holds several entries in order."""
    other = isinstance(value, (str, bytes, Mapping, Set))
    return isinstance(value, Iterable) and not other and getattr(value, "ndim", 1) > 0


# -- token ids -------------------------------------------------------------------------------------


def id_rows(values: Any, label: str) -> list[Tensor]:
    """Prompts as token ids, one row each."""
    try:
        given = entries_of(values)
    except TypeError:
        raise TypeError(
            f"`{label}` must be a list of prompts as token ids; got {type(values).__name__}; "
            "use Task.from_prompts for texts"
        ) from None
    rows = [whole_numbers(row, f"row {i} of `{label}`") for i, row in enumerate(given)]
    for i, row in enumerate(rows):
        if row.dim() == 0 or row.numel() != row.shape[-1]:
            raise ValueError(
                f"row {i} of `{label}` must be the token ids of one prompt; got shape "
                f"{list(row.shape)}; give one row per prompt"
            )
    return [row.flatten() for row in rows]


def id_sets(values: Any, what: str) -> Tensor:
    """Token ids, one per pair, or a row for each where some pair has a list of them."""
    given = values if isinstance(values, Tensor) or not is_list(values) else entries_of(values)
    if isinstance(given, Tensor) or not any(map(is_list, given)):
        return whole_numbers(given, what)
    return stacked(
        [
            whole_numbers(entry if is_list(entry) else [entry], f"pair {i} of {what}")
            .flatten()
            .tolist()
            for i, entry in enumerate(given)
        ]
    )


def stacked(rows: Sequence[Sequence[int]]) -> Int[Tensor, "row pos"]:
    """Rows of different lengths, filled up behind their ends."""
    width = max(map(len, rows), default=0)
    filled = [[*row, *[PAD] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long, device="cpu").reshape(len(rows), width)


# -- texts -----------------------------------------------------------------------------------------


def texts_of(values: Any, label: str, count: int | None = None) -> list[str]:
    """A list of as many texts as there are pairs.

    Raises:
        ValueError: it is no such list.
        TypeError: an entry is no text.
    """
    texts = _listed(values, label, count)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"`{label}` must hold texts only; pair {i} has {reprlib.repr(text)}, of type "
                f"{type(text).__name__}; give it a text, or leave that pair out of all four lists"
            )
    return texts


def text_sets(values: Any, label: str, count: int) -> tuple[list[list[str]], bool]:
    """As many texts, or lists of texts, as there are pairs, each as a list; and if any was one.

    Raises:
        ValueError: it is no such list.
        TypeError: an entry is no text.
    """
    given = _listed(values, label, count)
    texts_of(["" if is_list(entry) else entry for entry in given], label, count)
    sets = [list(entry) if is_list(entry) else [entry] for entry in given]
    several = any(map(is_list, given))
    for i, entry in enumerate(sets):
        for text in entry:
            if not isinstance(text, str):
                raise TypeError(
                    f"`{label}` must hold texts only; pair {i} has {reprlib.repr(text)}, of type "
                    f"{type(text).__name__}, in its list; give texts"
                )
    if empty := [i for i, entry in enumerate(sets) if not entry]:
        raise ValueError(
            f"`{label}` must hold at least one text per pair; pair {empty[0]} has none; give it "
            "one, or leave that pair out"
        )
    return sets, several


def _listed(values: Any, label: str, count: int | None) -> list[Any]:
    """The entries of a list that is as long as it must be."""
    try:
        entries = entries_of(values)
        got = str(len(entries))
    except TypeError:
        entries, got = [], repr(values) if isinstance(values, str) else type(values).__name__
    if getattr(values, "ndim", 1) != 1:  # the entries of a table are its columns' names
        entries, got = [], f"{type(values).__name__} of {values.ndim} dimensions"
    if not entries or count not in (None, len(entries)):
        raise ValueError(
            f"`{label}` must be a list of {'one or more' if count is None else count} texts, one "
            f"per pair; got {got}; give clean, corrupt, answers and foils lists of one length"
        )
    return entries


# -- answers and foils -----------------------------------------------------------------------------


def must_be_sets(label: str, ids: Tensor, pairs: int) -> None:
    """Checks that each pair has a token, or a set of tokens that holds each once."""
    if ids.dim() not in (1, 2) or len(ids) != pairs:
        raise ValueError(
            f"`{label}` must hold one token id per pair, shape [{pairs}], or a set of them, "
            f"[{pairs}, set]; got {list(ids.shape)}; give one answer token, or one list of "
            "several, for every prompt"
        )
    sets = ids.reshape(pairs, -1)
    lowest = PAD if ids.dim() == 2 else 0
    if bool((wrong := (sets < lowest).any(-1)).any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"`{label}` must hold token ids, 0 or more; pair {i} has {int(sets[i].min())}; "
            "use the ids that the tokenizer gives"
        )
    if bool((empty := (sets == PAD).all(-1)).any()):
        raise ValueError(
            f"`{label}` must hold at least one token per pair; pair {int(empty.nonzero()[0])} has "
            "none; give it one, or leave that pair out"
        )
    ordered = sets.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PAD)
    if bool(twice.any()):
        i = int(twice.any(-1).nonzero()[0])
        raise ValueError(
            f"`{label}` must hold each token of a pair once; pair {i} has "
            f"{int(ordered[i, 1:][twice[i]][0])} twice in {sets[i].tolist()}; leave one out (two "
            "words may share their first token)"
        )


def must_be_disjoint(answers: Tensor, foils: Tensor, tokenizer: Any) -> None:
    """Checks, for a metric that compares them, that no answer of a pair is among its foils."""
    if not foils.numel():
        raise ValueError(
            "`foils` must be given for a metric that compares answers with them; got none; "
            "give what a model might say instead, or a metric that reads none"
        )
    for foil in foils.reshape(len(foils), -1).T:
        same = (answers.reshape(len(answers), -1) == foil[:, None]).any(-1) & (foil != PAD)
        if bool(same.any()):
            i = int(same.nonzero()[0])
            token = int(foil[i])
            text = "" if tokenizer is None else f" ({tokenizer.decode([token])!r})"
            raise ValueError(
                "an answer must differ from its foil, or their difference is always 0: pair "
                f"{i} has token {token}{text} for both; choose another foil, or give a metric "
                "that reads none"
            )


def must_be_in(tokenizer: Any, answers: Tensor, foils: Tensor) -> None:
    """Refuses token ids that a tokenizer does not have: they are another's."""
    highest, size = int(torch.cat([answers.flatten(), foils.flatten()]).max()), len(tokenizer)
    if highest >= size:
        raise ValueError(
            f"token ids of a table must be those of its tokenizer, below {size}; got {highest}; "
            "take the tokenizer that the table was made with, or columns of texts"
        )


def first_tokens(follow: Sequence[Sequence[Sequence[int]]], *, several: bool) -> Tensor:
    """The first token of each answer: one per pair, or sets of them."""
    if several:
        return stacked([[tokens[0] for tokens in answers] for answers in follow])
    return torch.tensor([answers[0][0] for answers in follow], device="cpu")
