"""What a task is: aligned clean and corrupt prompts, their answers, and what is measured.

Prompts of different lengths are never padded for a model: `Task.buckets` yields one sub-task per
length. Where rows of `clean` are shorter than the longest, the tail holds -1, which no embedding
accepts, so that a padded row can never reach a model unnoticed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tasks.metrics import BUILT_IN, Metric, clean_answers, logit_difference

__all__ = ["Task"]

PAD = -1


@dataclass(frozen=True, eq=False)
class Task:
    """Pairs of prompts that differ in what the model should answer.

    >>> Task.from_prompts(
    ...     model.tokenizer,
    ...     clean=["Then Mary and John went to the store. John gave a drink to"],
    ...     corrupt=["Then Mary and John went to the store. Mary gave a drink to"],
    ...     answers=[" Mary"],
    ...     foils=[" John"],
    ... )
    Task('task', 1 pairs, 15 tokens, metric=logit_difference, spans=['end'])

    Build one with `Task.from_prompts` or `Task.from_tokens`, or with a ready task such as
    `tasks.ioi`. `task.metric(logits)` gives one number per pair; the default is the logit of the
    answer minus that of the foil at the pair's answer position, `spans["end"]`.

    A task keeps copies, on the CPU: what is done later to the tensors given changes nothing.

    Raises:
        ValueError: shapes do not agree, a row of `corrupt` has not the length of its row of
            `clean` or is the same, a token id is negative, a span points outside its prompt, a
            pair has no answer or one twice, or an answer is its own foil and the metric their
            difference.
        TypeError: token ids or positions are not whole numbers, or the metric is none.
    """

    clean: Int[Tensor, "pair pos"]
    corrupt: Int[Tensor, "pair pos"]
    answers: Int[Tensor, " pair *answer"]
    """The right token of each pair; or `[pair, answer]`, sets of them, filled up with -1."""
    foils: Int[Tensor, " pair *foil"]
    """The wrong token of each pair, or sets of them, as `answers`."""
    spans: Mapping[str, Int[Tensor, " pair"]] = field(default_factory=dict)
    """Named positions, one per pair: for IOI `IO`, `S1`, `S2`, `end`. `end` always exists."""
    metric: Any = "logit_difference"
    """A name, a callable `(logits)` or `(logits, task)`; reading the field gives a bound Metric."""
    name: str = "task"

    @torch.inference_mode(False)  # tensors made inside it could not be differentiated with
    def __post_init__(self) -> None:
        for label in ("clean", "corrupt", "answers", "foils"):
            ids = whole_numbers(getattr(self, label), f"`{label}`")
            object.__setattr__(self, label, ids)
        pairs = self.clean.shape[0] if self.clean.dim() == 2 else -1
        if pairs < 1 or self.corrupt.shape != self.clean.shape:
            raise ValueError(
                "`clean` and `corrupt` must be token ids [pair, pos] of one shape with at least "
                f"one pair; got {list(self.clean.shape)} and {list(self.corrupt.shape)}; "
                "use Task.from_prompts or Task.from_tokens to build them"
            )
        for label, ids in (("answers", self.answers), ("foils", self.foils)):
            _must_be_sets(label, ids, pairs)
        misaligned = ((self.clean == PAD) != (self.corrupt == PAD)).any(1).nonzero().flatten()
        if len(misaligned):
            i = int(misaligned[0])
            raise ValueError(
                f"`corrupt` must have the length of `clean`: pair {i} has "
                f"{int((self.clean[i] != PAD).sum())} and {int((self.corrupt[i] != PAD).sum())} "
                "tokens; choose prompts that align token by token"
            )
        lengths = self.lengths
        inside = torch.arange(self.clean.shape[1], device=lengths.device) < lengths[:, None]
        wrong = (inside & ((self.clean < 0) | (self.corrupt < 0))).any(1).nonzero().flatten()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"token ids must be non-negative, and {PAD} only after a prompt's end: pair {i} is "
                f"{self.clean[i].tolist()} / {self.corrupt[i].tolist()}; "
                "use Task.from_tokens for prompts of different lengths"
            )
        same = (self.clean == self.corrupt).all(1).nonzero().flatten()
        if len(same):
            raise ValueError(
                f"`corrupt` must differ from `clean`, or nothing can be patched: pair "
                f"{int(same[0])} has the same tokens on both sides; change in `corrupt` what the "
                "answer hangs on"
            )
        spans = {k: whole_numbers(v, f"span {k!r}") for k, v in self.spans.items()}
        spans.setdefault("end", lengths - 1)
        for label, at in spans.items():
            if at.shape != (pairs,) or bool(((at < 0) | (at >= lengths)).any()):
                raise ValueError(
                    f"span {label!r} must hold one position inside the prompt per pair, shape "
                    f"[{pairs}]; got {at.tolist()[:8]} for lengths {lengths.tolist()[:8]}; "
                    "count positions from 0, the beginning-of-sequence token included"
                )
        object.__setattr__(self, "spans", MappingProxyType(spans))
        function = self.metric.function if isinstance(self.metric, Metric) else self.metric
        if isinstance(function, str):
            if function not in BUILT_IN:
                raise ValueError(
                    f"`metric` must be one of {sorted(BUILT_IN)} or a callable; got {function!r}; "
                    "pass a function logits -> [pair]"
                )
            function = BUILT_IN[function]
        if not callable(function):
            raise TypeError(
                f"`metric` must be one of {sorted(BUILT_IN)} or a callable; got "
                f"{type(function).__name__}; pass a function logits -> [pair]"
            )
        if function in BUILT_IN.values():
            _must_be_disjoint(self.answers, self.foils)
        object.__setattr__(self, "metric", Metric(function, self))

    # a copy, and what another process gets, has spans of its own that are as read-only as these
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "spans": dict(self.spans)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, spans=MappingProxyType(state["spans"]))

    # -- building ------------------------------------------------------------------------------

    @classmethod
    def from_tokens(
        cls,
        clean: Iterable[Iterable[SupportsIndex]],
        corrupt: Iterable[Iterable[SupportsIndex]],
        answers: Iterable[SupportsIndex | Iterable[SupportsIndex]],
        foils: Iterable[SupportsIndex | Iterable[SupportsIndex]],
        *,
        spans: Mapping[str, Iterable[SupportsIndex]] | None = None,
        metric: str | Callable[..., Tensor] = "logit_difference",
        name: str = "task",
    ) -> Task:
        """From token ids: `[pair, pos]` tensors, or lists of rows when lengths differ.

        A list may be anything that holds its entries in order: an array, a column of a table. An
        answer or foil is one token id, or a list of those that are equally right or wrong.

        Raises:
            ValueError: a pair's two prompts have different lengths or are the same, or a token id
                is negative.
            TypeError: token ids are not whole numbers.
        """
        rows, others = _rows(clean, "clean"), _rows(corrupt, "corrupt")
        if len(rows) != len(others):
            raise ValueError(
                f"`clean` and `corrupt` must hold as many prompts; got {len(rows)} and "
                f"{len(others)}; every clean prompt needs its corrupt partner"
            )
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            if len(row) != len(other):
                raise ValueError(
                    f"`corrupt` must have the length of `clean`: pair {i} has {len(row)} and "
                    f"{len(other)} tokens; choose prompts that align token by token"
                )
            if len(row) == 0 or int(torch.stack([row, other]).min()) < 0:
                raise ValueError(
                    f"token ids must be non-negative and a prompt non-empty: pair {i} is "
                    f"{row.tolist()} / {other.tolist()}; pass the tokenizer's ids without padding"
                )
        return cls(
            clean=_stack(rows),
            corrupt=_stack(others),
            answers=_sets(answers, "`answers`"),
            foils=_sets(foils, "`foils`"),
            spans={k: whole_numbers(v, f"span {k!r}") for k, v in (spans or {}).items()},
            metric=metric,
            name=name,
        )

    @classmethod
    def from_prompts(
        cls,
        tokenizer: Any,
        clean: Iterable[str],
        corrupt: Iterable[str],
        answers: Iterable[str | Iterable[str]],
        foils: Iterable[str | Iterable[str]],
        *,
        metric: str | Callable[..., Tensor] = "logit_difference",
        name: str = "task",
        prepend_bos: bool = True,
    ) -> Task:
        """From text. An answer is what follows its prompt, such as `" Mary"`, and is one token.

        Several right answers, or foils, of a pair are a list: `[" Mary", " Ann"]`.

        A list may be anything that holds its texts in order: a tuple, an array, a column of a
        table. `prepend_bos` puts the tokenizer's beginning-of-sequence token first, as
        TransformerLens does, if it has one.

        Raises:
            ValueError: prompts of a pair tokenize to different lengths or to the same tokens, an
                answer is not one token after its prompt, the tokenizer does not know a word, or
                the lists are not of one length.
            TypeError: an entry is no text, or `tokenizer` is none.
        """
        must_be_tokenizer(tokenizer)
        clean = _texts(clean, "clean")
        corrupt = _texts(corrupt, "corrupt", len(clean))
        answers, foils = (
            _text_sets(sets, label, len(clean))
            for label, sets in (("answers", answers), ("foils", foils))
        )
        for label, texts in (("clean", clean), ("corrupt", corrupt)):
            for i, text in enumerate(texts):
                must_know(tokenizer, text, f"pair {i} of `{label}`")
        for label, sets in (("answers", answers), ("foils", foils)):
            for i, (prompt, given) in enumerate(zip(clean, sets, strict=True)):
                for text in given if isinstance(given, list) else [given]:
                    must_know(tokenizer, prompt + text, f"pair {i} of `{label}`")
        rows = [encode(tokenizer, text, prepend_bos=prepend_bos) for text in clean]
        others = [encode(tokenizer, text, prepend_bos=prepend_bos) for text in corrupt]
        for i, (row, other) in enumerate(zip(rows, others, strict=True)):
            if len(row) != len(other):
                raise ValueError(
                    f"`corrupt` must tokenize to the length of `clean`: pair {i} has {len(row)} "
                    f"and {len(other)} tokens ({_tail(clean[i])} / {_tail(corrupt[i])}); "
                    "choose words of one token"
                )
        return cls.from_tokens(
            rows,
            others,
            *(
                [_answer_ids(tokenizer, p, texts) for p, texts in zip(clean, sets, strict=True)]
                for sets in (answers, foils)
            ),
            metric=metric,
            name=name,
        )

    # -- checking ------------------------------------------------------------------------------

    def must_fit(self, cfg: Any, model_name: str) -> None:
        """Checks that a model of this configuration has all tokens and positions of the task.

        A token that the model does not have would be an index error from deep inside it.

        Args:
            cfg: has `d_vocab` and `n_ctx`, both in tokens, as a `TransformerBridge`'s `cfg` has.
            model_name: what the message calls the model.

        Raises:
            ValueError: a token id is `d_vocab` or more, or a prompt longer than `n_ctx`.
        """
        for label in ("clean", "corrupt", "answers", "foils"):
            highest = int(getattr(self, label).max())
            if highest >= int(cfg.d_vocab):
                raise ValueError(
                    f"`{label}` must hold token ids below the model's d_vocab {cfg.d_vocab}; got "
                    f"{highest}; build the task with the tokenizer of {model_name!r}"
                )
        longest = int(self.lengths.max())
        if longest > int(cfg.n_ctx):
            raise ValueError(
                f"prompts must have no more tokens than the model's n_ctx {cfg.n_ctx}; the longest "
                f"has {longest}; drop the longer pairs with task.select"
            )

    # -- reading -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        tokens = str(low) if low == high else f"{low}-{high}"
        return (
            f"Task({self.name!r}, {len(self)} pairs, {tokens} tokens, "
            f"metric={self.metric.name}, spans={list(self.spans)})"
        )

    @property
    def lengths(self) -> Int[Tensor, " pair"]:
        """Number of tokens of each pair's prompts."""
        return (self.clean != PAD).sum(1)

    def answer_logits(self, logits: Tensor) -> Tensor:
        """Logits `[pair, d_vocab]` at each pair's answer position, from `[pair, pos, d_vocab]`.

        Logits that hold a single position are taken to be those of the answer position.

        Raises:
            ValueError: the rows of `logits` are not this task's pairs.
        """
        if logits.dim() != 3 or len(logits) != len(self):
            raise ValueError(
                f"logits must be [pair, pos, d_vocab] with {len(self)} pairs; got "
                f"{list(logits.shape)}; use the task that holds exactly those rows (task.select)"
            )
        if logits.shape[1] == 1:
            return logits[:, 0]
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, self.spans["end"].to(logits.device)]

    def select(self, index: Iterable[Any]) -> Task:
        """The task of some of the pairs, in the order of `index` (rows may repeat), or by a mask.

        Raises:
            ValueError: no pair is left, or a mask is not of this task.
        """
        at = _tensor(index)
        if at.dtype == torch.bool:
            if at.shape != (len(self),):
                raise ValueError(
                    f"a mask must have one entry per pair, shape [{len(self)}]; got "
                    f"{list(at.shape)}; make it from what this task's pairs gave"
                )
            at = at.nonzero().flatten()
        at = whole_numbers(at, "a selection")
        if len(at) == 0:
            raise ValueError(
                f"a selection must keep at least one pair; got none of the {len(self)} pairs of "
                f"task {self.name!r}; choose some by number, counted from 0, or by a mask"
            )
        width = int(self.lengths[at].max())
        return replace(
            self,
            clean=self.clean[at, :width],
            corrupt=self.corrupt[at, :width],
            answers=self.answers[at],
            foils=self.foils[at],
            spans={k: v[at] for k, v in self.spans.items()},
            metric=self.metric.select(at),
        )

    def buckets(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Task]]:
        """Pairs of one length at a time: `(index into this task, the sub-task)`.

        With `batch_size`, no sub-task holds more pairs than that.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}; or leave it out")
        for length in self.lengths.unique().tolist():
            index = (self.lengths == length).nonzero().flatten()
            for part in index.split(batch_size or len(index)):
                whole = len(part) == len(self)
                yield part, self if whole else self.select(part)

    def with_metric(self, metric: str | Callable[..., Tensor]) -> Task:
        """The same pairs, another read-out."""
        return replace(self, metric=metric)

    def preferred(self, model: Any) -> Bool[Tensor, " pair"]:
        """Which pairs `model` answers rightly: it prefers the answers to the foils when clean.

        >>> task.preferred(model)
        tensor([True, True, True, True])

        That is where the metric is above 0 if it compares answers with foils, else where
        `logit_difference` is.

        Raises:
            ValueError: the model is in train mode, or has not the task's tokens or positions.
        """
        right = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        for index, bucket, logits in clean_answers(model, self):
            compares = bucket.metric.compares_answers
            metric = bucket.metric if compares else Metric(logit_difference, bucket)
            right[index] = metric(logits[:, None]).cpu() > 0
        return right

    def filter_correct(self, model: Any) -> Task:
        """Only the pairs where `model` prefers the answer to the foil on the clean prompt.

        >>> len(task.filter_correct(model))
        4

        `preferred` says which these are.

        Raises:
            ValueError: the model is right on no pair, in train mode, or has not the task's tokens
                or positions.
        """
        right = self.preferred(model)
        if not bool(right.any()):
            raise ValueError(
                f"at least one pair must be answered correctly; the model prefers the foil on all "
                f"{len(self)} pairs of task {self.name!r}; use a model that can do the task"
            )
        return self.select(right)


# -- answers ---------------------------------------------------------------------------------------


def _must_be_sets(label: str, ids: Tensor, pairs: int) -> None:
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


def _must_be_disjoint(answers: Tensor, foils: Tensor) -> None:
    """Checks that no token is among a pair's answers and its foils."""
    for foil in foils.reshape(len(foils), -1).T:
        same = (answers.reshape(len(answers), -1) == foil[:, None]).any(-1) & (foil != PAD)
        if bool(same.any()):
            i = int(same.nonzero()[0])
            raise ValueError(
                "an answer must differ from its foil, or their difference is always 0: pair "
                f"{i} has token {int(foil[i])} for both; choose another foil, or give a metric "
                "that reads none"
            )


# -- text ------------------------------------------------------------------------------------------


def must_be_tokenizer(tokenizer: Any) -> None:
    """Checks for what is read of a tokenizer: a model, say, can be called on text as well.

    Raises:
        TypeError: it is none.
    """
    methods = ("__call__", "decode", "convert_ids_to_tokens")
    if isinstance(tokenizer, type) or not all(hasattr(tokenizer, name) for name in methods):
        raise TypeError(
            "`tokenizer` must be a Hugging Face tokenizer; "
            f"got {type(tokenizer).__name__}; pass model.tokenizer"
        )


def must_know(tokenizer: Any, text: str, what: str) -> None:
    """Checks that no word of `text` becomes the unknown token, which stands for any word.

    The unknown token of byte-level tokenizers is their end-of-text token: a text may hold it.

    Raises:
        ValueError: one does.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = getattr(tokenizer, "unk_token", None) or getattr(model, "unk_token", None)
    if unknown is None:
        return

    def unknowns(text: str) -> int:
        ids = encode(tokenizer, text, prepend_bos=False)
        return list(tokenizer.convert_ids_to_tokens(ids)).count(unknown) - text.count(unknown)

    if unknowns(text) > 0:
        words = [repr(word) for word in text.split() if unknowns(word) > 0]
        raise ValueError(
            f"{what} must be of words that the tokenizer knows; {', '.join(words) or repr(text)} "
            f"in {_tail(text)} would be {unknown!r}; choose other words, or another tokenizer"
        )


def encode(tokenizer: Any, text: str, *, prepend_bos: bool) -> list[int]:
    """Token ids of one text, with the beginning-of-sequence token exactly once if wanted."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos, *ids] if prepend_bos and bos is not None and ids[:1] != [bos] else ids


def answer_id(tokenizer: Any, prompt: str, answer: str) -> int:
    """The one token that `answer` adds to `prompt`.

    It is read off the tokenization of both together, so that it is right for byte-level and for
    SentencePiece tokenizers alike.

    Raises:
        ValueError: the answer is not exactly one token there.
    """
    before = encode(tokenizer, prompt, prepend_bos=False)
    after = encode(tokenizer, prompt + answer, prepend_bos=False)
    if after[: len(before)] != before or len(after) != len(before) + 1:
        pieces = tokenizer.convert_ids_to_tokens(after[len(before) :])
        raise ValueError(
            f"an answer must be exactly one token after its prompt; {answer!r} after "
            f"{_tail(prompt)} is {pieces}; choose a word of one token, with its leading space"
        )
    return int(after[-1])


def _answer_ids(tokenizer: Any, prompt: str, texts: str | list[str]) -> int | list[int]:
    """The token of an answer, or those of a list of answers."""
    if isinstance(texts, str):
        return answer_id(tokenizer, prompt, texts)
    return [answer_id(tokenizer, prompt, text) for text in texts]


# -- lists -----------------------------------------------------------------------------------------


def whole_numbers(values: Any, what: str) -> Tensor:
    """Token ids or positions, in any kind of list, as int64 on the CPU; always a copy.

    Raises:
        TypeError: they are not whole numbers.
    """
    try:
        made = _tensor(values)
        got = str(made.dtype)
        whole = not (made.is_floating_point() or made.is_complex() or made.dtype == torch.bool)
    except (TypeError, ValueError, RuntimeError):
        got, whole = reprlib.repr(values), False
    if not whole:
        raise TypeError(
            f"{what} must hold whole numbers; got {got}; give integers, and lists of one length"
        )
    return made.to("cpu", torch.long, copy=True)


def _sets(values: Any, what: str) -> Tensor:
    """Token ids, one per pair, or a row for each where some pair has a list of them."""
    given = values if isinstance(values, Tensor) or not _is_list(values) else _entries(values)
    if isinstance(given, Tensor) or not any(map(_is_list, given)):
        return whole_numbers(given, what)
    return _stack(
        [
            whole_numbers(entry if _is_list(entry) else [entry], f"pair {i} of {what}").flatten()
            for i, entry in enumerate(given)
        ]
    )


def _is_list(value: Any) -> bool:
    """True for what holds several entries in order."""
    texts_or_unordered = isinstance(value, (str, bytes, Mapping, Set))
    return isinstance(value, Iterable) and not texts_or_unordered and getattr(value, "ndim", 1) > 0


def _tensor(values: Any) -> Tensor:
    """Numbers in any kind of list as a tensor."""
    if isinstance(values, Tensor):
        return values
    entries = _entries(values)
    # no numbers at all would be floats, and the default device may be another
    return torch.tensor(entries, dtype=None if entries else torch.long, device="cpu")


def _entries(values: Any) -> list[Any]:
    """The entries of anything that holds them in order.

    Raises:
        TypeError: `values` does not.
    """
    if isinstance(values, (str, bytes, Mapping, Set)):  # these would give other entries
        raise TypeError(f"{type(values).__name__} is no list")
    return list(values)


def _rows(values: Any, label: str) -> list[Tensor]:
    """Prompts as token ids, one row each."""
    try:
        given = _entries(values)
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


def _text_sets(values: Any, label: str, count: int) -> list[str | list[str]]:
    """As many texts, or lists of texts, as there are pairs."""
    if not _is_list(values) or getattr(values, "ndim", 1) != 1:
        return list(_texts(values, label, count))
    given = _entries(values)
    if not any(map(_is_list, given)):
        return list(_texts(given, label, count))
    _texts(["" if _is_list(entry) else entry for entry in given], label, count)
    sets: list[str | list[str]] = [list(entry) if _is_list(entry) else entry for entry in given]
    for i, entry in enumerate(sets):
        for text in entry if isinstance(entry, list) else ():
            if not isinstance(text, str):
                raise TypeError(
                    f"`{label}` must hold texts only; pair {i} has {reprlib.repr(text)}, of type "
                    f"{type(text).__name__}, in its list; give texts"
                )
    return sets


def _texts(values: Any, label: str, count: int | None = None) -> list[str]:
    """A list of as many texts as there are pairs."""
    try:
        texts = _entries(values)
        got = str(len(texts))
    except TypeError:
        texts, got = [], repr(values) if isinstance(values, str) else type(values).__name__
    if getattr(values, "ndim", 1) != 1:  # the entries of a table are its columns' names
        texts, got = [], f"{type(values).__name__} of {values.ndim} dimensions"
    if not texts or count not in (None, len(texts)):
        raise ValueError(
            f"`{label}` must be a list of {'one or more' if count is None else count} texts, one "
            f"per pair; got {got}; give clean, corrupt, answers and foils lists of one length"
        )
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"`{label}` must hold texts only; pair {i} has {reprlib.repr(text)}, of type "
                f"{type(text).__name__}; give it a text, or leave that pair out of all four lists"
            )
    return texts


def _stack(rows: Sequence[Tensor]) -> Tensor:
    if not rows:
        return torch.empty(0, 0, dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PAD)


def _tail(text: str) -> str:
    return repr(text if len(text) <= 24 else "…" + text[-24:])
