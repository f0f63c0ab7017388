"""The kinds of torch's own modules: which weights they drop by default, and what dimensions mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..torch_private.recurrent import names_of
from .kind import OTHER, Axes, Kind, calls_by, reads_of, register_kind, varies_in
from .product import LINEAR_PRODUCT, Product, conv_product, product_of


def _conv_product_of(cls: type[nn.Module]) -> Product | None:
    for spatial, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
        if cls.forward is conv.forward:
            return conv_product(spatial)
    return None


def _weight(module: nn.Module) -> Sequence[str]:
    return ("weight",)


def _bias(name: str) -> str | None:
    """`bias_hh_l0` of `weight_hh_l0`, `in_proj_bias` of `in_proj_weight`."""
    return name.replace("weight", "bias") if "weight" in name else None


def rows(name: str, weight: Tensor) -> Axes | None:
    """A matrix with outputs along rows, or a vector of outputs."""
    if weight.ndim == 1:
        return Axes(tuple(weight.shape), input=(), output=(0,))
    return Axes(tuple(weight.shape), input=(1,), output=(0,)) if weight.ndim == 2 else None


def _matrix(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    return rows(name, weight)


def columns(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    """A matrix with inputs along rows (Embedding: a word is an input; transformers' Conv1D)."""
    if weight.ndim != 2:
        return rows(name, weight)
    return Axes(tuple(weight.shape), input=(0,), output=(1,))


def conv_axes(weight: Tensor, groups: int, transposed: bool) -> Axes:
    """Of a filter bank, viewed as (group, output in group, input in group, kernel)."""
    first, second = weight.shape[:2]
    kernel = weight.numel() // max(first * second, 1)
    view = (groups, first // groups, second, kernel)
    if transposed:
        return Axes(view, input=(0, 1), output=(0, 2))
    return Axes(view, input=(0, 2), output=(0, 1))


def _conv(module: Any, name: str, weight: Tensor) -> Axes | None:
    if weight.ndim == 1:
        return rows(name, weight)
    return conv_axes(weight, module.groups, module.transposed)


def _attention(module: nn.Module, name: str, weight: Tensor) -> Axes | None:
    """The packed projection is three matrices on top of each other: query, key and value."""
    if not name.startswith("in_proj_"):
        return rows(name, weight)
    if weight.ndim == 1:
        return Axes((3, weight.shape[0] // 3), input=(0,), output=(0, 1))
    return Axes((3, weight.shape[0] // 3, weight.shape[1]), input=(0, 2), output=(0, 1))


SEPARATE_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The parameters of a MultiheadAttention whose keys or values have another width."""


def _attention_weights(module: nn.Module) -> Sequence[str]:
    widths = {getattr(module, name, None) for name in ("embed_dim", "kdim", "vdim")}
    packed = len(widths) == 1
    return (*(("in_proj_weight",) if packed else SEPARATE_PROJECTIONS), "out_proj.weight")


def _attention_bias(name: str) -> str | None:
    """The separate projections share one packed bias, which goes with none of them alone."""
    return _bias(name) if name == "in_proj_weight" else None


def _recurrent_weights(module: nn.Module) -> Sequence[str]:
    """The AWD-LSTM convention: hidden to hidden, every layer and direction; also those that are no
    parameters any more (pruned, normed), which are refused by name."""
    return tuple(name for name in names_of(module) if name.startswith("weight_hh"))


def _is_of_product(name: str) -> bool:
    """Whether a parameter of a recurrent layer is one of its products: all are."""
    return name.startswith(("weight_", "bias_"))


def _refuse_embedding(module: nn.Module, name: str) -> str | None:
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rewrites the weight in its forward; construct the module without max_norm"
    if getattr(module, "sparse", False):
        return "a sparse gradient cannot pass a mask; construct the module with sparse=False"
    return None


_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

_ATTENTION_READS = (
    *("in_proj_weight", "in_proj_bias", *SEPARATE_PROJECTIONS, "bias_k", "bias_v"),
    *("out_proj.weight", "out_proj.bias"),
)
"""The forward does not call `out_proj`."""

_ATTENTION_VARIES = tuple(one for one in _ATTENTION_READS if one not in ("bias_k", "bias_v"))
"""Those of products."""

_ENCODER_LAYER_READS = (
    *("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
    *("self_attn.out_proj.weight", "self_attn.out_proj.bias"),
    *(f"{child}.{name}" for child in ("linear1", "linear2") for name in ("weight", "bias")),
    *(f"{child}.{name}" for child in ("norm1", "norm2") for name in ("weight", "bias")),
)
"""In `eval()` one kernel computes the whole layer from the weights of the children. In training none of
them is read."""

_ENCODER_LAYER_VARIES = tuple(one for one in _ENCODER_LAYER_READS if not one.startswith("norm"))
"""Those of products."""

_ONLY_CALL = (nn.Sequential, nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)
"""Classes whose forward reads no weight: it calls the children."""

LINEAR = Kind(
    name="linear",
    classes=(nn.Linear,),
    weights=_weight,
    axes=_matrix,
    bias=_bias,
    product=product_of(nn.Linear, product=LINEAR_PRODUCT),
    reads=reads_of(nn.Linear, names=("weight", "bias")),
    linear=True,
)

for _kind in (
    LINEAR,
    Kind(
        name="conv",
        classes=_CONVOLUTIONS,
        weights=_weight,
        axes=_conv,
        bias=_bias,
        product=_conv_product_of,
        reads=reads_of(*_CONVOLUTIONS, names=("weight", "bias")),
    ),
    Kind(
        name="embedding",
        classes=(nn.Embedding, nn.EmbeddingBag),
        weights=_weight,
        axes=columns,
        bias=lambda name: None,
        refuse=_refuse_embedding,
        varies=lambda cls, name: issubclass(cls, nn.Embedding) and name == "weight",
        reads=reads_of(nn.Embedding, nn.EmbeddingBag, names=("weight",)),
    ),
    Kind(
        name="rnn",
        classes=(nn.RNNBase,),
        weights=_recurrent_weights,
        axes=_matrix,
        bias=_bias,
        # Names by which an RNN looks up its list of weights.
        reads=lambda cls, module: names_of(module),
        varies=varies_in(nn.RNN, nn.LSTM, nn.GRU, names=_is_of_product),
    ),
    Kind(
        name="rnn-cell",
        classes=(nn.RNNCellBase,),
        weights=lambda module: ("weight_hh",),
        axes=_matrix,
        bias=_bias,
        reads=reads_of(
            nn.RNNCell,
            nn.LSTMCell,
            nn.GRUCell,
            names=("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
        ),
        varies=varies_in(nn.RNNCell, nn.LSTMCell, nn.GRUCell, names=_is_of_product),
    ),
    Kind(
        name="attention",
        classes=(nn.MultiheadAttention,),
        weights=_attention_weights,
        axes=_attention,
        bias=_attention_bias,
        reads=reads_of(nn.MultiheadAttention, names=_ATTENTION_READS),
        varies=varies_in(nn.MultiheadAttention, names=_ATTENTION_VARIES.__contains__),
    ),
    OTHER.but(
        classes=(nn.TransformerEncoderLayer,),
        reads=reads_of(nn.TransformerEncoderLayer, names=_ENCODER_LAYER_READS),
        rests=calls_by(nn.TransformerEncoderLayer, ("_sa_block", "_ff_block")),
        varies=varies_in(nn.TransformerEncoderLayer, names=_ENCODER_LAYER_VARIES.__contains__),
    ),
    OTHER.but(
        classes=_ONLY_CALL,
        reads=reads_of(*_ONLY_CALL, names=()),
    ),
    OTHER.but(
        # It looks at weights of its layers to choose a path, and calls the layers on each.
        classes=(nn.TransformerEncoder,),
        reads=lambda cls, module: (),
    ),
):
    register_kind(_kind)
