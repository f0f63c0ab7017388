"""What torch functions do to each element, by name: how `surgery.moments` takes them."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ADDS = _names("add sub subtract radd")
"""Shift a Gaussian, and keep its variance."""

REVERSED = _names("rsub")
"""Shift its negative."""

SCALES = _names("mul multiply rmul div divide true_divide truediv neg negative positive")
"""Linear in a Gaussian that is the first argument, or in any for products."""

CASTS = _names(
    "to type type_as float double half bfloat16 contiguous clone cpu cuda detach alias "
    "_to_copy lift_fresh_copy"
)

VIEWS = _names(
    "view reshape flatten unflatten transpose permute squeeze unsqueeze t swapaxes swapdims movedim "
    "moveaxis getitem select narrow slice chunk split split_with_sizes tensor_split unbind expand "
    "T mT H data real flip fliplr flipud roll repeat tile repeat_interleave index_select take "
    "gather view_as reshape_as expand_as adjoint unsafe_chunk unsafe_split _unsafe_view "
    "broadcast_to"
)
"""Rearrange elements, each of which keeps its distribution."""

QUERIES = _names(
    "size dim ndimension numel nelement stride storage_offset element_size get_device is_contiguous "
    "is_floating_point is_complex is_signed is_same_size len result_type"
)
"""Ask for the form, not the value."""

POINTWISE = _names(
    "abs absolute celu clamp clamp_max clamp_min clip cos cosh elu erf erfc exp exp2 expm1 gelu "
    "hardshrink hardsigmoid hardswish hardtanh leaky_relu lerp logaddexp logaddexp2 log_sigmoid "
    "logsigmoid masked_fill maximum minimum mish nan_to_num pow prelu relu relu6 rpow rrelu selu sgn "
    "sigmoid sign silu sin sinc sinh softplus softshrink softsign special_erf special_erfc "
    "special_exp2 special_expit special_expm1 special_log_ndtr special_ndtr special_sinc square "
    "tanh tanhshrink threshold where addcmul asinh arcsinh atan arctan ceil floor round trunc fix "
    "heaviside hypot deg2rad rad2deg fmax fmin"
)
"""Defined on the whole line, and not linear."""

COMPARISONS = _names(
    "gt greater ge greater_equal lt less le less_equal eq ne not_equal isfinite isinf isnan signbit "
    "logical_not isposinf isneginf"
)
"""Not numbers: whatever reads one gets its value at the mean; a function of one, as in
`u * (u > 0)`, its expectation."""

PARTIAL = _names(
    "acos acosh addcdiv arccos arccosh arcsin arctanh asin atanh erfinv log log10 log1p log2 logit "
    "rdiv reciprocal rsqrt rtruediv special_entr special_log1p special_logit special_ndtri "
    "special_xlog1py special_xlogy sqrt tan xlogy"
)
"""Not defined on the whole line, or with poles: no expectation over a Gaussian, but perhaps over a
function of one, as in `log(1 + exp(u))`."""

JOINT = _names(
    "softmax _softmax log_softmax _log_softmax softmin _safe_softmax logsumexp gumbel_softmax"
)
"""Activations of several elements together: only draws can pass them."""

DROPOUTS = _names(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
)

CLOSED = {
    **{name: name for name in _names("relu leaky_relu relu6 hardtanh hardsigmoid hardswish gelu")},
    **dict.fromkeys(("clamp", "clamp_max", "clamp_min", "clip"), "hardtanh"),
}
"""Names under which `ops.expectation` knows the closed form of an expectation."""
