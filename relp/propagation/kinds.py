"""Which kind an operation or a module is of.

Tables name operations as `relp.operations.name_of` does. What torch writes as a Python function
(`F.multi_head_attention_forward`) is in none of them: it is opened and seen operation by operation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS", "ATTRIBUTES", "CONSTRUCTORS", "EXPONENTS", "EXTREMES", "FUSED", "LINEAR",
    "ORDERED", "PRODUCTS", "RANDOM", "SOURCES", "STATISTICS", "SUMS_OF_PRODUCTS", "VALUES",
    "UnknownOperationError", "fused", "is_activation", "is_norm",
]  # fmt: skip


class UnknownOperationError(ValueError):
    """An operation carries relevance and no rule says how.

    >>> with propagate(RELP):
    ...     torch.lgamma(torch.ones(3, requires_grad=True))
    Traceback (most recent call last):
    UnknownOperationError: every operation that carries relevance must have a rule; ...
    """


LINEAR = frozenset(
    """
    __getitem__ __setitem__ adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d add
    as_strided as_tensor atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d bfloat16
    block_diag broadcast_tensors broadcast_to cat chunk clone complex concat concatenate conj
    conj_physical constant_pad_nd contiguous copy cpu cuda cumsum diag diag_embed diagonal diff
    double dstack embedding expand expand_as fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn
    fft_irfft fft_rfft flatten flip fliplr flipud float fold from_numpy gather H half hsplit hstack
    imag index_add index_copy index_fill index_put index_select interpolate masked_fill
    masked_scatter masked_select mean mH moveaxis movedim mT nan_to_num nansum narrow neg negative
    nll_loss nll_loss_nd pad permute pixel_shuffle pixel_unshuffle positive ravel real repeat
    repeat_interleave requires_grad reshape reshape_as resolve_conj resolve_neg retain_grad roll
    rot90 rsub scatter scatter_add select slice_scatter split split_with_sizes squeeze stack sub
    subtract sum swapaxes swapdims T t take take_along_dim tensor_split tile to trace transpose tril
    triu type type_as unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze upsample view
    view_as view_as_complex view_as_real vsplit vstack where zero
    """.split()
)
"""Linear in everything that may carry relevance: the derivative is the 0-rule."""

SOURCES = frozenset(
    ["embedding", "tensor", "requires_grad", "zeros", "ones", "rand", "randn", "full"]
)
"""Where relevance may begin: what gives a tensor that requires grad out of none that carries."""

ACTIVATIONS = frozenset(
    """
    gelu silu relu relu6 leaky_relu elu selu celu tanh sigmoid expit logsigmoid log_sigmoid
    hardswish hardsigmoid hardtanh mish softsign softshrink hardshrink prelu threshold erf abs
    clamp clip clamp_min clamp_max sin cos atan arctan asinh sinh log1p
    """.split()
)
EXPONENTS = frozenset(["exp", "exp2", "expm1", "softplus"])
STATISTICS = frozenset(["rsqrt", "sqrt", "reciprocal"])
PRODUCTS = frozenset(
    "matmul bmm mm mv dot vdot inner outer ger tensordot kron einsum linear bilinear grouped_mm "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)
SUMS_OF_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "baddbmm": torch.bmm,
    "addmm": torch.mm,
    "addmv": torch.mv,
    "addr": torch.outer,
    "addbmm": lambda a, b: torch.bmm(a, b).sum(0),
}
"""An addend and a product of the next two operands: the product alone."""

EXTREMES = frozenset(
    """
    max min amax amin maximum minimum fmax fmin max_pool1d max_pool2d max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
    """.split()
)
ORDERED = frozenset(["topk", "sort", "kthvalue", "median", "mode", "cummax", "cummin"])
"""Give `(values, indices)` along one axis."""

RANDOM = frozenset(
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout "
    "feature_alpha_dropout".split()
)
ATTRIBUTES = frozenset(
    """
    shape dtype device ndim layout is_leaf requires_grad grad_fn grad is_cuda is_cpu is_sparse
    is_nested is_quantized is_meta itemsize nbytes output_nr names _backward_hooks _version _base
    size dim ndimension stride numel nelement is_contiguous is_floating_point is_complex
    storage_offset data_ptr element_size len hash repr format register_hook
    """.split()
)
"""What is asked of a tensor without reading its values."""

FUSED = frozenset(
    "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
    "native_multi_head_attention transformer_encoder_layer_fwd".split()
)
"""Many operations in one kernel, which no rule can reach."""

CONSTRUCTORS = frozenset(
    """
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like new new_empty
    new_zeros new_ones new_full new_tensor
    """.split()
)
"""Take only shape and type from a tensor, not its values."""

VALUES = frozenset("item tolist bool int float index equal allclose is_nonzero contains".split())
"""Take values out of tensors: code may branch on them."""


# -- modules ---------------------------------------------------------------------------------------

_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
# (Softplus is elementwise, but its rule is that of an exponent, as for the function)
_NOT_ELEMENTWISE = (
    nn.Softplus, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU,
    nn.MultiheadAttention, nn.RReLU,
)  # fmt: skip
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_NORM = re.compile(r"norm(1d|2d|3d|alizationbridge)?$")
_NORMS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def is_activation(module: nn.Module) -> bool:
    """True if the module is an elementwise function that should count as one operation.

    Written out in Python (`NewGELUActivation`), its inner products would meet the gate's rule.
    """
    kind = type(module)
    known = _KNOWN.get(module)
    if known is None:
        # models that bring their own (`BloomGelu`) call it what it is and give it no weights
        own = kind.__name__.lower().endswith(("gelu", "silu", "relu", "swish"))
        known = (
            (kind.__module__ in _ACTIVATION_MODULES or own)
            and not issubclass(kind, _NOT_ELEMENTWISE)
            and not (own and next(module.children(), None) is not None)
        )
        _KNOWN[module] = known
    return known


def is_norm(module: nn.Module) -> bool:
    """True if all that the module does is to normalise: its inner products are no gates."""
    known = _NORMS.get(module)
    if known is None:
        names = [type(m).__name__.lower() for m in module.modules()]
        known = bool(_NORM.search(names[0])) and all(_NORM.search(n) or "hook" in n for n in names)
        _NORMS[module] = known
    return known


def fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same function as one torch operation where there is one: its derivative is cheaper."""
    if type(module).__name__ in ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh"):
        return lambda t: F.gelu(t, approximate="tanh")
    forward: Callable[[Tensor], Tensor] = type(module).forward.__get__(module)
    return (lambda t: forward(t.clone())) if getattr(module, "inplace", False) else forward
