"""Reading torch's calls: what an operation is called, of which kind it is, what goes in.

`propagation` asks here what it met. Tables name operations as `name_of` does (`torch.mul`,
`Tensor.__imul__` and `Tensor.mul_` are all `mul`; `mylib::mul` is somebody else's, and in no
table). What torch writes as a Python function
(`F.multi_head_attention_forward`) is opened and seen operation by operation; what torch computes
in one call but is more than one kind (attention, GLU, group norm) is written out here. One's own
operations and modules join by `register`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Call", "Registration", "register"]

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

PARAMETERS: dict[str, tuple[str, ...]] = {
    # operands that callers like to name, in their order
    **dict.fromkeys(["mul", "multiply", "div", "divide", "true_divide", "matmul"],
                    ("input", "other")),
    **dict.fromkeys(["max", "min", "maximum", "minimum", "fmax", "fmin"], ("input", "other")),
    "where": ("condition", "input", "other"),
    **dict.fromkeys(["bmm", "mm"], ("input", "mat2")),
    **dict.fromkeys(["linear", *(n for n in PRODUCTS if n.startswith("conv"))],
                    ("input", "weight", "bias")),
    "pow": ("input", "exponent"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
    "addmm": ("input", "mat1", "mat2"),
    "addmv": ("input", "mat", "vec"),
    "addr": ("input", "vec1", "vec2"),
}  # fmt: skip


# -- calls -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One torch operation as it was called, its operands by position where they have a place."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Reads what a `TorchFunctionMode` was given."""
        name = name_of(func)
        if kwargs:
            kwargs = dict(kwargs)
            first = () if _owner(func) else ("input",)
            for place, parameter in enumerate(PARAMETERS.get(name, first)):
                if parameter in kwargs and len(args) == place:
                    args = (*args, kwargs.pop(parameter))
        if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        return cls(name, func, args, kwargs)

    def carries(self) -> bool:
        """True if relevance comes in."""
        return carries(self.args) or (bool(self.kwargs) and carries(self.kwargs))

    def plainly(self) -> Any:
        """torch's own result with torch's own derivative."""
        return self.func(*self.args, **self.kwargs)

    def value(self) -> Any:
        """torch's own result, without a graph."""
        with torch.no_grad():
            return self.func(*self.args, **self.kwargs)

    def on(self, operands: dict[int, Tensor]) -> Any:
        """The same call with some operands replaced."""
        args = tuple(operands.get(i, a) for i, a in enumerate(self.args))
        return self.func(*args, **self.kwargs)

    def operands(self) -> tuple[Any, Any]:
        """The two operands of an elementwise call, numerator first."""
        a, b = self.args[:2]
        return (b, a) if self.name == "rdiv" else (a, b)

    def overwrites(self) -> bool:
        """True if the call works in place on what carries relevance."""
        return carries(self.args[:1]) and self.out_of_place() is not None

    def out_of_place(self) -> Call | None:
        """The call that computes on a copy what this one overwrites; None if it does not."""
        spelled = _spelled(self.func)
        first = self.args[0] if self.args else None
        if not isinstance(first, Tensor):
            return None
        if (spelled.endswith("_") and not spelled.endswith("__")) or spelled[:3] == "__i":
            if _owner(self.func):
                plain = _on_a_copy(self.func)
            else:
                plain = getattr(torch.Tensor, self.name, None) or getattr(F, self.name)
            return replace(self, func=plain, args=(first.clone(), *self.args[1:]))
        if self.kwargs.get("inplace"):
            copied = (first.clone(), *self.args[1:])
            return replace(self, args=copied, kwargs={**self.kwargs, "inplace": False})
        if isinstance(self.func, FunctionType) and any(a is True for a in self.args):
            given = inspect.signature(self.func).bind(*self.args, **self.kwargs).arguments
            if given.get("inplace"):
                return replace(
                    self, args=(first.clone(),), kwargs={**_but_first(given), "inplace": False}
                )
        return None

    def opened(self) -> Callable[[], Any] | None:
        """The call of a function that torch writes in Python, to be seen from within."""
        func = self.func
        if (
            not isinstance(func, FunctionType)
            or func.__name__.startswith("__")
            or _owner(func)
            or func.__module__.startswith("torch._ops")
        ):
            return None
        body = _OPENED.get(func)
        if body is None:
            # the first thing such a function does is to ask whether a mode wants all of it
            unasked = dict.fromkeys(_ASKS, lambda *_: False)
            names = {**func.__globals__, **unasked}
            body = FunctionType(
                func.__code__, names, func.__name__, func.__defaults__, func.__closure__
            )
            body.__kwdefaults__ = func.__kwdefaults__
            _OPENED[func] = body
        return lambda: body(*self.args, **self.kwargs)

    def softmax_arguments(self) -> tuple[Tensor, int]:
        """The scores, in the type that they are summed in, and the axis."""
        x: Tensor = self.args[0]
        dtype = self.kwargs.get("dtype")
        dim = self.kwargs["dim"] if "dim" in self.kwargs else self.args[1]
        return x if dtype is None else x.to(dtype), dim

    def norm_arguments(self) -> tuple[Any, ...]:
        """Input, normalised shape, weight, bias and eps of a layer or RMS norm."""
        names = ["input", "normalized_shape", "weight", "bias", "eps"]
        if self.name == "rms_norm":
            names.remove("bias")
        given = dict(zip(names, self.args, strict=False)) | self.kwargs
        x, shape, eps = given["input"], given["normalized_shape"], given.get("eps")
        if eps is None:
            eps = 1e-5 if self.name == "layer_norm" else torch.finfo(x.dtype).eps
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return x, shape, given.get("weight"), given.get("bias"), eps

    @property
    def has_bias(self) -> bool:
        """True if the third operand is a bias."""
        return "bias" in PARAMETERS.get(self.name, ())

    def factors(self) -> tuple[int, int]:
        """Places of the two operands that a product multiplies."""
        return (1, 2) if self.name in (*SUMS_OF_PRODUCTS, "einsum") else (0, 1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product alone, of other factors: no bias, no addend."""
        if self.name in SUMS_OF_PRODUCTS:
            scaled: Tensor = self.kwargs.get("alpha", 1) * SUMS_OF_PRODUCTS[self.name](a, b)
            return scaled
        kwargs = {k: v for k, v in self.kwargs.items() if k != "bias"}
        args = list(self.args)
        for place, operand in zip(self.factors(), (a, b), strict=True):
            args[place] = operand
        if self.has_bias and len(args) > 2:
            args[2] = None
        out: Tensor = self.func(*args, **kwargs)
        return out


def _but_first(given: dict[str, Any]) -> dict[str, Any]:
    return dict(list(given.items())[1:])


_ASKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_OPENED: dict[Any, FunctionType] = {}
_TORCH_OPS = re.compile(r"torch\._?ops\.(\w+)$")
_ALIASES = {
    "rmul": "mul", "imul": "mul", "radd": "add", "iadd": "add", "isub": "sub", "truediv": "div",
    "itruediv": "div", "idiv": "div", "rtruediv": "rdiv", "ipow": "pow", "absolute": "abs",
}  # fmt: skip


@cache
def name_of(func: Any) -> str:
    """`torch.Tensor.__mul__`, `torch.mul`, `Tensor.mul_`, `torch.ops.aten.mul.Tensor` -> `mul`.

    What is not torch's own keeps its full name, for it may compute anything: `mylib::mul` for
    `torch.ops.mylib.mul`, `mymodule.mul` for a function that dispatches as torch's do.
    """
    name, owner = _spelled(func), _owner(func)
    if owner or _is_attribute(func) or name in ("__getitem__", "__setitem__"):
        return owner + name
    plain = name.strip("_")
    return _ALIASES.get(plain, plain)


@cache
def _spelled(func: Any) -> str:
    """The name that a function bears where it is at home."""
    func = _defined(func)
    name = str(getattr(func, "__name__", repr(func)))
    if _TORCH_OPS.match(_home(func)):
        return name.split(".")[0]  # `mul.Tensor`
    return str(func.__qualname__) if isinstance(func, FunctionType) and _owner(func) else name


@cache
def _owner(func: Any) -> str:
    """What stands before the name of a function that is not torch's own; empty for torch's."""
    home = _home(_defined(func))
    if namespace := _TORCH_OPS.match(home):
        return "" if namespace[1] == "aten" else f"{namespace[1]}::"
    return "" if home.split(".")[0] == "torch" else f"{home}."


def _defined(func: Any) -> Any:
    """What was defined: the attribute that is read or set, the operation of a `custom_op`."""
    if _is_attribute(func):  # `x.T`, `x.shape`, `x.data = y`
        attribute = getattr(func, "__self__", func)
        return getattr(attribute, "fget", attribute)
    return getattr(func, "_opoverload", func)


def _is_attribute(func: Any) -> bool:
    return getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")


def _home(defined: Any) -> str:
    """The module of a function, or of the class that a method or an attribute is of."""
    home = getattr(defined, "__module__", None)
    return str(home or getattr(getattr(defined, "__objclass__", None), "__module__", "torch"))


def _on_a_copy(func: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function that overwrites its first operand, as one that gives the result back instead."""

    def copied(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first = first.clone()
        func(first, *args, **kwargs)
        return first

    return copied


def carries(value: Any) -> bool:
    """True if a tensor in `value` carries relevance: it requires grad and is not a parameter."""
    if isinstance(value, Tensor):
        return value.requires_grad and not isinstance(value, nn.Parameter)
    return any(map(carries, tensors(value)))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from tensors(v)
    elif isinstance(value, dict):
        yield from tensors(tuple(value.values()))
    elif isinstance(value, slice):
        yield from tensors((value.start, value.stop, value.step))


def swapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: swapped(v, change) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(swapped(v, change) for v in value)
    if isinstance(value, slice):
        return slice(*(swapped(v, change) for v in (value.start, value.stop, value.step)))
    if isinstance(value, tuple):  # torch's own, such as (values, indices)
        return type(value)([swapped(v, change) for v in value])
    return value


# -- operations of several kinds, written out ------------------------------------------------------


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


# -- modules that count as one operation -----------------------------------------------------------

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


# -- one's own -------------------------------------------------------------------------------------

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
REGISTERED: dict[Any, list[str | Formula]] = {}
"""By name or class; the last counts."""


class Registration:
    """What `register` gives back; `remove()` undoes it, and so does leaving a `with` block."""

    def __init__(self, key: Any, rule: str | Formula) -> None:
        self._key, self._rule = key, rule
        REGISTERED.setdefault(key, []).append(rule)

    def remove(self) -> None:
        """The operation or module has the rule that it would have without this registration."""
        rules = REGISTERED.get(self._key, [])
        if self._rule in rules:
            rules.remove(self._rule)
        if not rules:
            REGISTERED.pop(self._key, None)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def register(what: Callable[..., Any], rule: str | Formula) -> Registration:
    """Says how relevance passes an operation or a class of modules of one's own.

    >>> class MyNorm(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x / x.norm(dim=-1, keepdim=True)
    >>> handle = register(torch.lgamma, "activation")       # an elementwise function
    >>> handle.remove()                                     # it is unknown again
    >>> with register(MyNorm, "linear"):                    # a module: its derivative, unopened
    ...     coverage(MyNorm(), torch.ones(1, 4))
    >>> with register(MyNorm, lambda g, x, y: g / x.norm(dim=-1, keepdim=True)):
    ...     coverage(MyNorm(), torch.ones(1, 4))

    A registered module counts as one operation; it must be called as `module(x)`.

    Args:
        what: a function of torch (`torch.lgamma`, `F.grid_sample`), an operation of one's own
            (`torch.ops.mylib.scan`, what `torch.library.custom_op` gives), or a subclass of
            `nn.Module`.
        rule: `"linear"` (the derivative under all rules), `"activation"` or `"exponent"`
            (elementwise in the first argument: the rules of that kind apply), or a formula
            `(g, x, y) -> coefficient at x`, with `g` the coefficient at the output `y`; it is used
            under all rules but those that are derivatives throughout.

    Returns:
        A handle with `remove()`, which is a context manager too.

    Raises:
        TypeError: `what` is neither; ValueError: there is no such kind.
    """
    if not callable(rule) and rule not in ("linear", "activation", "exponent"):
        raise ValueError(
            "`rule` must be 'linear', 'activation', 'exponent' or a formula (g, x, y) -> "
            f"coefficient; got {rule!r}; see register's examples"
        )
    if isinstance(what, type):
        if not issubclass(what, nn.Module):
            raise TypeError(
                f"`what` must be a function or a class of modules; got the class {what.__name__}; "
                "register the nn.Module that holds it"
            )
        key: Any = what
    elif callable(what) and not isinstance(what, nn.Module):
        key = name_of(what)
    else:
        raise TypeError(
            f"`what` must be a function or a class of modules; got {type(what).__name__}; "
            "pass the class, not an instance"
        )
    return Registration(key, rule)
