"""Scalar read-outs of logits: what a task measures, one number per pair.

A metric is any callable `metric(logits)` or `metric(logits, task)` that returns one number per row
of `logits`. The second form gets the task that holds exactly those rows, so that it may read
`task.answers`, `task.foils` and `task.spans`. Higher means "closer to the clean behaviour".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from tasks.task import Task

__all__ = [
    "Continuation",
    "KLDivergence",
    "Metric",
    "logit_difference",
    "mean_logit_difference",
    "probability_difference",
]


def logit_difference(logits: Tensor, task: Task) -> Float[Tensor, " pair"]:
    """Logit of the answer minus logit of the foil at each pair's answer position, in logits.

    >>> logit_difference(model(task.clean), task)    # what `task.metric` is by default
    tensor([3.9..., 7.9..., 6.5..., 4.9...], grad_fn=<SubBackward0>)

    Of several answers or foils it is the logarithm of their summed odds (`logsumexp`): the metric
    is above 0 just where the answers together are more probable than the foils together.
    """
    last = task.answer_logits(logits)
    lowest = torch.finfo(last.dtype).min  # not -inf: two runs of it have no difference
    return _taken(last, task.answers, _logsumexp, lowest) - _taken(
        last, task.foils, _logsumexp, lowest
    )


def mean_logit_difference(logits: Tensor, task: Task) -> Float[Tensor, " pair"]:
    """Mean logit of the answers minus mean logit of the foils at the answer position, in logits.

    >>> attribute(model, task.with_metric("mean_logit_difference"))

    Of one answer and one foil it is `logit_difference`.
    """
    last = task.answer_logits(logits)
    return _taken(last, task.answers, _mean) - _taken(last, task.foils, _mean)


def probability_difference(logits: Tensor, task: Task) -> Float[Tensor, " pair"]:
    """Probability of the answers minus that of the foils at the answer position, in [-1, 1].

    >>> attribute(model, task.with_metric("probability_difference"))
    """
    last = task.answer_logits(logits).softmax(-1)
    return _taken(last, task.answers, _sum) - _taken(last, task.foils, _sum)


def _taken(
    values: Float[Tensor, "pair d_vocab"],
    ids: Int[Tensor, " pair *token"],
    together: Callable[[Tensor, Tensor], Tensor],
    filling: float = 0.0,
) -> Float[Tensor, " pair"]:
    """What stands at each pair's token, or at its set of tokens together.

    A set that is smaller than the largest is filled up with -1, where `filling` stands.
    """
    ids, rows = ids.to(values.device), torch.arange(len(values), device=values.device)
    if ids.dim() == 1:
        return values[rows, ids]
    found = values[rows[:, None], ids.clamp(min=0)].masked_fill(ids < 0, filling)
    return together(found, (ids >= 0).sum(-1))


def _logsumexp(found: Float[Tensor, "pair token"], _: Tensor) -> Float[Tensor, " pair"]:
    return found.logsumexp(-1)


def _mean(
    found: Float[Tensor, "pair token"], count: Int[Tensor, " pair"]
) -> Float[Tensor, " pair"]:
    return found.sum(-1) / count


def _sum(found: Float[Tensor, "pair token"], _: Tensor) -> Float[Tensor, " pair"]:
    return found.sum(-1)


@dataclass(frozen=True, eq=False)
class KLDivergence:
    """Minus the KL divergence from the clean model's next-token distribution, in nats.

    >>> task.with_metric(KLDivergence.of(model, task))
    Task('ioi', 4 pairs, 16 tokens, metric=KLDivergence, ...)

    0 where the run predicts what the clean run predicted, negative elsewhere: the clean run is its
    maximum, with a gradient of zero. So it is a metric for `direction="denoise"`, for exact
    patching, and for rules that compare two runs. Build it with `KLDivergence.of(model, task)`.
    """

    reference: Float[Tensor, "pair d_vocab"]
    """Log-probabilities of the clean run at each pair's answer position."""

    @torch.inference_mode(False)  # a tensor made inside it could not be differentiated with
    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", self.reference.detach().clone())

    @classmethod
    def of(cls, model: Any, task: Task) -> KLDivergence:
        """Runs the clean prompts once and keeps the log-probabilities that the model gave.

        Raises:
            ValueError: the model is in train mode, or has not the task's tokens or positions.
        """
        rows: list[Tensor] = [torch.empty(0)] * len(task)
        for index, _, logits in clean_answers(model, task):
            for row, values in zip(index.tolist(), logits.float().log_softmax(-1), strict=True):
                rows[row] = values
        return cls(torch.stack(rows))

    def select(self, index: Int[Tensor, " row"]) -> KLDivergence:
        """The same metric for some of the pairs."""
        return KLDivergence(self.reference[index])

    def __call__(self, logits: Tensor, task: Task) -> Float[Tensor, " pair"]:
        """Minus the divergence of each pair's run from its clean run."""
        if len(self.reference) != len(task):
            raise ValueError(
                f"KLDivergence must be made of the task it is used on; it holds "
                f"{len(self.reference)} pairs and the task {len(task)}; use "
                "task.with_metric(KLDivergence.of(model, task))"
            )
        last = task.answer_logits(logits).float().log_softmax(-1)
        reference = self.reference.to(last.device)
        return -(reference.exp() * (reference - last)).sum(-1)


@dataclass(frozen=True, eq=False)
class Continuation:
    """Log-probability of answers of several tokens, each read where the one before it stands.

    >>> several = Task.from_prompts(
    ...     model.tokenizer,
    ...     clean=["Then Mary and John went to the"],
    ...     corrupt=["Then Mary and Tom went to the"],
    ...     answers=[" store. John gave"],
    ...     continuation="mean",
    ... )
    >>> several.metric.name, [int(several.spans[name][0]) for name in ("end", "last")]
    ('mean_log_probability', [7, 10])

    The prompts hold an answer's tokens but the last, the same in clean and corrupt (teacher
    forcing): `spans["end"]` is where its first token is read, `spans["last"]` where its last is.
    Unit: nats, of all tokens together, or of one on average if `mean`; 0 is certainty. Build it
    with `Task.from_prompts(..., continuation="sum")`, or `"mean"`.
    """

    tokens: Int[Tensor, "pair token"]
    """The answers' tokens, filled up with -1 behind the shorter ones."""
    mean: bool = False

    @torch.inference_mode(False)
    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.tokens.detach().clone())

    @property
    def name(self) -> str:
        """For titles and files."""
        return "mean_log_probability" if self.mean else "log_probability"

    def select(self, index: Int[Tensor, " row"]) -> Continuation:
        """The same metric for some of the pairs."""
        return Continuation(self.tokens[index], self.mean)

    def __call__(self, logits: Tensor, task: Task) -> Float[Tensor, " pair"]:
        """Log-probability of each pair's answer, all positions of `logits` given."""
        if len(self.tokens) != len(task) or len(logits) != len(task):
            raise ValueError(
                f"{self.name} must be made of the task it is used on; it holds {len(self.tokens)} "
                f"pairs, the task {len(task)} and logits {list(logits.shape)}; use task.select"
            )
        tokens = self.tokens.to(logits.device)
        real = tokens >= 0
        rows = torch.arange(len(tokens), device=logits.device)[:, None]
        at = task.spans["end"].to(logits.device)[:, None] + torch.arange(
            tokens.shape[1], device=logits.device
        )
        # behind a shorter answer stands one of its own positions, which does not count
        at = torch.where(real, at, at[:, :1])
        read = logits[rows, at].float().log_softmax(-1)
        found = _at(read, tokens.clamp(min=0)).masked_fill(~real, 0.0).sum(-1)
        return found / real.sum(-1) if self.mean else found


def _at(
    values: Float[Tensor, "pair token d_vocab"], ids: Int[Tensor, "pair token"]
) -> Float[Tensor, "pair token"]:
    """What stands at one token of each place."""
    return values.gather(-1, ids[..., None])[..., 0]


def where_taken(model: Any, tokens: Int[Tensor, "*row pos"]) -> Int[Tensor, "*row pos"]:
    """Token ids on the device of a model's first weights, which a bridge does not see to.

    Where those are offloaded, accelerate does.
    """
    first = next(model.parameters(), tokens) if isinstance(model, nn.Module) else tokens
    return tokens if first.is_meta else tokens.to(first.device)


def clean_answers(
    model: Any, task: Task
) -> Iterator[tuple[Int[Tensor, " row"], Task, Float[Tensor, "row d_vocab"]]]:
    """Runs the clean prompts: which pairs, their task, and the logits at their answer positions.

    Raises:
        ValueError: the model is in train mode, or has not the task's tokens or positions.
    """
    if (cfg := getattr(model, "cfg", None)) is not None:
        task.must_fit(cfg, str(getattr(cfg, "model_name", type(model).__name__)))
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    if training := [name or "the model" for name, module in modules if module.training]:
        raise ValueError(
            "the model must be in eval mode, or dropout makes every number noise; "
            f"{training[0]!r} is in train mode; call model.eval()"
        )
    for index, bucket in task.buckets():
        with torch.no_grad():  # not around the loop: what a generator sets holds for its caller
            logits = model(where_taken(model, bucket.clean))
        yield index, bucket, bucket.answer_logits(logits)


BUILT_IN: dict[str, Callable[..., Tensor]] = {
    "logit_difference": logit_difference,
    "mean_logit_difference": mean_logit_difference,
    "probability_difference": probability_difference,
}


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric bound to the task whose rows it reads; checks what the function returns."""

    function: Callable[..., Tensor]
    task: Task

    @property
    def name(self) -> str:
        """The function's name, for titles and files."""
        if isinstance(self.function, Continuation):
            return self.function.name
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def compares_answers(self) -> bool:
        """True for metrics that are above 0 just where the answers are preferred to the foils."""
        return self.function in BUILT_IN.values()

    @property
    def reads_answer_only(self) -> bool:
        """True for the built-in metrics: they read nothing but the answer position's logits."""
        return self.compares_answers or isinstance(self.function, KLDivergence)

    @property
    def targets(self) -> Int[Tensor, "pair token"] | None:
        """The tokens that the metric itself holds, behind each prompt's answer position."""
        return self.function.tokens if isinstance(self.function, Continuation) else None

    @property
    def flat_at_zero(self) -> bool:
        """True if 0 is the metric's maximum, where its gradient is zero."""
        return isinstance(self.function, KLDivergence)

    def select(self, index: Int[Tensor, " row"]) -> Callable[..., Tensor]:
        """The function for some of the pairs (`select` of the function itself where it has one)."""
        select = getattr(self.function, "select", None)
        return select(index) if callable(select) else self.function

    def __call__(self, logits: Tensor) -> Float[Tensor, " pair"]:
        """One number per row of `logits`.

        Raises:
            TypeError: the function returned something other than a floating-point tensor.
            ValueError: it returned the wrong shape, NaN or infinity.
        """
        try:
            if not takes_task(self.function):
                values = self.function(logits)
            elif _keyword_only(self.function):
                values = self.function(logits, task=self.task)
            else:
                values = self.function(logits, self.task)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"metric {self.name!r} must work on any of the task's pairs; on {len(self.task)} "
                f"rows of logits it failed ({error}); take (logits, task) if it needs each pair's "
                "answers, and read them from that task"
            ) from error
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = str(values.dtype) if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(
                f"metric {self.name!r} must return a floating-point tensor, one number per pair; "
                f"it returned {got}; return for instance logits[:, -1, answer] - "
                "logits[:, -1, foil]"
            )
        if values.shape != (len(self.task),):
            raise ValueError(
                f"metric {self.name!r} must return shape [{len(self.task)}], one number per pair; "
                f"it returned {list(values.shape)} for logits {list(logits.shape)}; do not average "
                "over pairs, and take (logits, task) if it needs each pair's answers"
            )
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values.detach())).nonzero()[0])
            raise ValueError(
                f"metric {self.name!r} must return finite numbers; pair {bad} has "
                f"{float(values.detach()[bad])}; check the prompts of that pair and the metric's "
                "logarithms"
            )
        return values


def takes_task(function: Callable[..., Tensor]) -> bool:
    """True if `function` has a second required positional parameter (or any named `task`)."""
    parameters = _parameters(function)
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) >= 2 or any(p.name == "task" for p in parameters)


def _keyword_only(function: Callable[..., Tensor]) -> bool:
    """True if the task must be passed as `task=`."""
    return any(p.name == "task" and p.kind is p.KEYWORD_ONLY for p in _parameters(function))


def _parameters(function: Callable[..., Tensor]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some C functions have no signature: call them with logits
        return []
