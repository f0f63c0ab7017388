"""What torch functions do to the entries of a tensor: the one table, by name.

`surgery.travel` and `surgery.moments` ask it what a function makes of a Gaussian, `surgery.transforms`
what a node of a graph makes of a value. Names are those of `surgery.base.torch_names`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..base.torch_names import WRITERS, canonical


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


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

RISING = _names(
    "celu elu hardsigmoid hardtanh leaky_relu logsigmoid relu relu6 selu sigmoid softplus softsign tanh"
)
"""The activations that never fall, for the usual values of their parameters."""

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

_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow neg pos abs matmul rmatmul mod floordiv "
    "gt lt ge le eq ne and or xor rand ror rxor invert getitem setitem len bool int contains"
)
OPERATORS = (*_OPERATORS.split(), *(name for name in WRITERS if canonical(name) in ELEMENTWISE))
"""Python's operators, which look for a method of the class: `add` for `__add__`. All but `float`, whose
name is that of a cast."""

# --- the same entries, elsewhere or otherwise ------------------------------------------------------

CASTING = _names("bfloat16 cpu cuda double float half to to_copy type type_as")
"""The values of the first argument, in another dtype or on a device."""

COPYING = _names("alias clone contiguous detach detach_copy identity lift_fresh_copy requires_grad")
"""The values of the first argument, and no other."""

PASSING = CASTING | COPYING
"""The values of the first argument, in its form. The result may be the very tensor that was given."""

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

ALIASING = (SELECTING | RESHAPING) - ANEW
"""The result may be the memory of the first argument, so that a write into it is one into that."""

JOINING = _names("cat stack")
"""The entries of several tensors."""

DROPOUTS = _names(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
)
"""The identity in evaluation mode."""

DROPPING = DROPOUTS | _names("native_dropout")
"""The same; `native_dropout` returns its mask too."""

KEEPING = RESHAPING | CASTING | DROPPING
"""In evaluation mode, every entry of the first argument with its value."""

# --- of several entries together -------------------------------------------------------------------

JOINT = _names("softmax log_softmax softmin safe_softmax logsumexp gumbel_softmax")
"""Activations of several entries together."""

GATING = _names("glu")
"""One half of the entries, each times the sigmoid of one of the other half."""

ACROSS = JOINT | GATING
"""Activations that mix entries."""

QUERIES = _names(
    "size dim ndimension numel nelement stride storage_offset element_size get_device is_contiguous "
    "is_floating_point is_complex is_signed is_same_size len result_type sym_numel sym_size sym_stride "
    "assert_async assert_scalar assert_tensor_metadata "
    "new_empty new_empty_strided new_full new_ones new_tensor new_zeros "
    "empty_like full_like ones_like rand_like randint_like randn_like zeros_like"
)
"""Functions that ask for the form, not the value (as those do that make another tensor of it), or check
and return nothing."""

ATTRIBUTES = _names("device dtype is_cuda layout ndim shape")
"""What is read from a tensor and does not depend on its values."""


def is_affine(name: str, positions: Sequence[int]) -> bool:
    """Whether a function is affine in one of its positional arguments.

    Args:
        positions: of the arguments that are Gaussian, or depend on the one value in question. Of more
            than one, no function is.
    """
    if len(positions) != 1:
        return False
    return name in ADDS | REVERSED | SCALES and (name != "div" or positions[0] == 0)
