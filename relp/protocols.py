"""What a model and a task must have: the shapes of the two doors through which data comes in.

A `TransformerBridge` is a `ModelLike` and a `tasks.Task` a `TaskLike`; so is anything else that has
the same. Type checkers hold them; at run time each verb says itself what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["MetricLike", "ModelLike", "TaskLike"]


class MetricLike(Protocol):
    """One number per row of logits, and what it reads of them."""

    @property
    def name(self) -> str:
        """For titles and files."""

    @property
    def compares_answers(self) -> bool:
        """True if it is above 0 just where the answer is preferred to the foil."""

    @property
    def reads_answer_only(self) -> bool:
        """True if it reads nothing but the logits at the answer position."""

    @property
    def targets(self) -> Int[Tensor, "pair token"] | None:
        """Tokens that the metric holds beside the task's answers, filled up with -1."""

    @property
    def flat_at_zero(self) -> bool:
        """True if 0 is its maximum, where its gradient is zero."""

    def __call__(self, logits: Tensor) -> Float[Tensor, " pair"]:
        """The metric of each row."""


class TaskLike(Protocol):
    """Pairs of prompts and a metric; `metric` is a `MetricLike` of just these pairs."""

    metric: Any

    @property
    def name(self) -> str:
        """For titles and files."""

    @property
    def clean(self) -> Int[Tensor, "pair pos"]:
        """Token ids, padded behind each prompt's end."""

    @property
    def corrupt(self) -> Int[Tensor, "pair pos"]:
        """Token ids of the same lengths."""

    @property
    def answers(self) -> Int[Tensor, " pair *answer"]:
        """The token that the clean prompt asks for, or sets of them, filled up with -1."""

    @property
    def foils(self) -> Int[Tensor, " pair *foil"]:
        """The token that the corrupt prompt asks for, or sets of them."""

    @property
    def lengths(self) -> Int[Tensor, " pair"]:
        """Tokens of each pair."""

    @property
    def spans(self) -> Mapping[str, Int[Tensor, " pair"]]:
        """Named positions in each pair; `end` is where the answer is read."""

    def __len__(self) -> int:
        """The number of pairs."""

    def select(self, index: Iterable[Any]) -> TaskLike:
        """Some of the pairs."""

    def buckets(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, TaskLike]]:
        """Which pairs, and the task of these, which have one length."""

    def must_fit(self, cfg: Any, model_name: str) -> None:
        """Refuses a model that has not the task's tokens or positions."""


class ModelLike(Protocol):
    """A `TransformerBridge`: one stack of blocks, a final norm and an unembedding."""

    cfg: Any
    blocks: Any
    ln_final: Any
    unembed: Any
    original_model: Any

    def __call__(self, tokens: Int[Tensor, "pair pos"]) -> Any:
        """The logits."""

    def named_modules(self) -> Iterable[tuple[str, Any]]:
        """As of any module of torch."""

    def parameters(self) -> Iterable[Any]:
        """As of any module of torch."""


if not TYPE_CHECKING:  # what a wrong one lacks is said by the verbs, in a sentence
    MetricLike = ModelLike = TaskLike = Any
