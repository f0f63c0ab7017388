"""What torch functions do to the entries of a tensor: the one table, by name.

`surgery.moments` asks it what a function makes of a Gaussian, `surgery.transforms` what a node of a
graph makes of a value. Names are those of `canonical`: no underscores, no synonyms.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SPELLINGS = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctanh": "atanh",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "log_sigmoid": "logsigmoid",
    "moveaxis": "movedim",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "radd": "add",
    "rmul": "mul",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "swish": "silu",
    "true_divide": "div",
    "truediv": "div",
}
"""Other names of the same function: Python's operators, and torch's synonyms."""


def canonical(name: str) -> str:
    """`softmax` for `_softmax`, `relu` for `relu_`, `add` for `__radd__`."""
    name = name.strip("_")
    return SPELLINGS.get(name, name)


# --- of each entry alone ---------------------------------------------------------------------------

ADDS = _names("add sub")
"""Shift a Gaussian, and keep its variance."""

REVERSED = _names("rsub")
"""Shift its negative."""

SCALES = _names("mul div neg positive")
"""Linear in a Gaussian that is the first argument, or in any for products."""

ACTIVATIONS = _names(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu "
    "relu6 rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink threshold"
)
"""An activation by themselves."""

POINTWISE = ACTIVATIONS | _names(
    "abs clamp clamp_max clamp_min cos cosh erf erfc exp exp2 expm1 lerp logaddexp logaddexp2 "
    "masked_fill maximum minimum nan_to_num pow rpow sgn sign sin sinc sinh special_erf special_erfc "
    "special_exp2 special_expit special_expm1 special_log_ndtr special_ndtr special_sinc square where "
    "addcmul asinh atan ceil floor round trunc fix heaviside hypot deg2rad rad2deg fmax fmin"
)
"""Defined on the whole line, and not linear."""

COMPARISONS = _names("gt ge lt le eq ne isfinite isinf isnan signbit logical_not isposinf isneginf")
"""Not numbers: whatever reads one gets its value at the mean; a function of one, as in
`u * (u > 0)`, its expectation."""

PARTIAL = _names(
    "acos acosh addcdiv asin atanh erfinv log log10 log1p log2 logit rdiv reciprocal rsqrt rtruediv "
    "special_entr special_log1p special_logit special_ndtri special_xlog1py special_xlogy sqrt tan "
    "xlogy"
)
"""Not defined on the whole line, or with poles: no expectation over a Gaussian, but perhaps over a
function of one, as in `log(1 + exp(u))`."""

ELEMENTWISE = ADDS | REVERSED | SCALES | POINTWISE | COMPARISONS | PARTIAL

CLOSED = {
    **{name: name for name in _names("relu leaky_relu relu6 hardtanh hardsigmoid hardswish gelu")},
    **dict.fromkeys(("clamp", "clamp_max", "clamp_min"), "hardtanh"),
}
"""Names under which `ops.expectation` knows the closed form of an expectation."""

# --- the same entries, elsewhere or otherwise ------------------------------------------------------

CASTING = _names("bfloat16 cpu cuda double float half to to_copy type type_as")
"""The values of the first argument, in another dtype or on a device."""

COPYING = _names("alias clone contiguous detach detach_copy identity lift_fresh_copy requires_grad")
"""The values of the first argument, and no other."""

SPLITTING = _names("chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split")
"""Parts of the first argument, as a tuple."""

SELECTING = SPLITTING | _names("getitem narrow select slice")
"""A part of the first argument."""

INDEXING = _names("getitem index index_select")
"""The entries of the first argument that a tensor names."""

TRANSPOSING = _names("t T mT adjoint transpose permute")
"""Of a matrix, all of these swap its two dimensions."""

MOVING = TRANSPOSING | _names(
    "broadcast_to data expand expand_as flatten flip fliplr flipud movedim repeat repeat_interleave "
    "reshape reshape_as roll squeeze tile unflatten unsafe_view unsqueeze view view_as H"
)
"""Every entry of the first argument, elsewhere."""

VIEWS = MOVING | SELECTING | INDEXING | _names("gather real take")
"""Rearrange entries, each of which keeps its distribution."""

RESHAPING = COPYING | MOVING
"""Every entry of the first argument."""

ANEW = _names(
    "clone detach_copy flip fliplr flipud lift_fresh_copy repeat repeat_interleave roll tile"
)
"""Of these, the ones whose result is never the memory of the first argument."""

JOINING = _names("cat stack")
"""The entries of several tensors."""

DROPOUTS = _names(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
)
"""The identity in evaluation mode."""

# --- of several entries together -------------------------------------------------------------------

JOINT = _names("softmax log_softmax softmin safe_softmax logsumexp gumbel_softmax")
"""Activations of several entries together: only draws can pass them."""

NORMALISING = _names("batch_norm")
"""Affine in each channel in evaluation mode, and so of a Gaussian a Gaussian."""

QUERIES = _names(
    "size dim ndimension numel nelement stride storage_offset element_size get_device is_contiguous "
    "is_floating_point is_complex is_signed is_same_size len result_type"
)
"""Ask for the form, not the value."""
