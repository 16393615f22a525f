"""Answers and foils as tokens: one for each pair, or sets of them that have nothing in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tasks.lists import PAD, stacked
from tasks.text import read_tokens


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
            words = [] if tokenizer is None else read_tokens(tokenizer, [token])
            text = "".join(f" ({word!r})" for word in words)
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
