"""What torch computes in one call but is of several kinds (attention, GLU, …), written out.

Values are torch's own; the coefficients are those of these operations of one kind each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relp.propagation.kinds import SUMS_OF_PRODUCTS

__all__ = ["WRITTEN_OUT"]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as its documentation writes it."""
    if dropout_p:
        raise ValueError(
            f"attention must run without dropout; got dropout_p={dropout_p}; call model.eval()"
        )
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        n, m = scores.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ weight.mT if weight.dim() > 1 else x @ weight
    return y if bias is None else y + bias


def _sum_of_products(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def written_out(
        addend: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> Tensor:
        return addend * beta + product(a, b) * alpha

    return written_out


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * b.sigmoid()


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    return start + weight * (end - start)


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + value * (a * b)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Tensor:
    return x + value * (a / b)


def _layer_norm(
    x: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    y = F.layer_norm(x, shape, eps=eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    return F.rms_norm(x, shape, eps=eps) * weight


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    y = F.layer_norm(parts, parts.shape[-1:], eps=eps).reshape(x.shape)
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if not use_input_stats:
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return _group_norm(x, x.shape[1], weight, bias, eps)


def _var(x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
         *, correction: int | float | None = None) -> Tensor:  # fmt: skip
    if isinstance(dim, bool):  # torch.var(x, unbiased)
        dim, unbiased = None, dim
    dims = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    correction = float(unbiased) if correction is None else correction
    count = 1
    for d in dims:
        count *= x.shape[d]
    centred = x - x.mean(dims, keepdim=True)
    return centred.square().sum(dims, keepdim=keepdim) / (count - correction)


def _cosine_similarity(a: Tensor, b: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(eps)

    return (unit(a) * unit(b)).sum(dim)


def _cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1,
    ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    if label_smoothing or target.is_floating_point():
        raise ValueError(
            "cross entropy must be with class indices and without label smoothing under rules; "
            "write it as log_softmax and a product"
        )
    logarithms = F.log_softmax(x, 1 if x.dim() > 1 else 0)
    how = ("none", "mean", "sum")[reduction]
    return F.nll_loss(logarithms, target, weight, ignore_index=ignore_index, reduction=how)


WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    **{name: _sum_of_products(product) for name, product in SUMS_OF_PRODUCTS.items()},
    "linear": _linear,
    "glu": _glu,
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "var": _var,
    "std": lambda *args, **kwargs: _var(*args, **kwargs).sqrt(),
    "cosine_similarity": _cosine_similarity,
    "cross_entropy_loss": _cross_entropy,
}
"""The same values (up to rounding) from operations of one kind each."""
