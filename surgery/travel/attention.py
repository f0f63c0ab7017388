"""Attention, step by step."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, rule
from .shapes import dropped_inside
from .weight import Weight


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Any:
    """softmax(q k^T * scale + mask) v."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, call.args)), **call.kwargs}
    query, key, value = (given[name] for name in names[:3])
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if given.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (one.repeat_interleave(repeats, -3) for one in (key, value))
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        shape = (query.shape[-2], key.shape[-2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = _additive(~mask, query.dtype)
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1), value)


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


@rule("multi_head_attention_forward", weights=True)
def multi_head_attention(call: Call) -> Any:
    """What `nn.MultiheadAttention` computes. Inside, examples come first."""
    given = _ATTENTION.bind(*call.args, **call.kwargs)
    given.apply_defaults()
    of = given.arguments
    if of["static_k"] is not None or of["static_v"] is not None:
        return NotImplemented
    if of["is_causal"] and of["attn_mask"] is None:
        return NotImplemented  # which torch refuses
    batched, heads = of["query"].ndim == 3, of["num_heads"]
    inputs = [
        x.transpose(0, 1) if batched else x.unsqueeze(0)
        for x in (of[name] for name in ("query", "key", "value"))
    ]
    query, key, value = _projected(inputs, of)
    more = _added_keys(of, query)
    for one, other in more:
        key, value = _longer(key, one), _longer(value, other)
    query, key, value = (_heads(x, heads) for x in (query, key, value))
    scores = torch.matmul(query / math.sqrt(query.shape[-1]), key.transpose(-2, -1))
    for mask in _masks(of, query, len(more)):
        scores = scores + mask
    shares = torch.softmax(scores, -1)
    shares = dropped_inside(call.run, shares, of["dropout_p"])
    mixed = torch.matmul(shares, value).transpose(1, 2).flatten(2)
    result = F.linear(mixed, of["out_proj_weight"], of["out_proj_bias"])
    shares = shares.mean(1) if of["average_attn_weights"] else shares
    if batched:
        result = result.transpose(0, 1)
    else:
        result, shares = result.squeeze(0), shares.squeeze(0)
    return result, shares if of["need_weights"] else None


def _added_keys(of: dict[str, Any], like: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that every row gets, (1, 1, width) each."""
    found = [] if of["bias_k"] is None else [(of["bias_k"], of["bias_v"])]
    if of["add_zero_attn"]:
        zero = torch.zeros(1, 1, like.shape[-1], dtype=like.dtype, device=like.device)
        found.append((zero, zero))
    return found


def _masks(of: dict[str, Any], query: Any, added: int) -> list[Tensor]:
    """What is added to the scores, (rows, heads, queries, keys). All see the keys that were added."""
    rows, heads = query.shape[:2]
    found = []
    if of["attn_mask"] is not None:
        mask = F.pad(_additive(of["attn_mask"], query.dtype), (0, added))
        found.append(mask if mask.ndim == 2 else mask.reshape(rows, heads, *mask.shape[1:]))
    if of["key_padding_mask"] is not None:
        padding = F.pad(_additive(of["key_padding_mask"], query.dtype), (0, added))
        found.append(padding.reshape(rows, 1, 1, -1))
    return found


def _projected(inputs: list[Any], of: dict[str, Any]) -> list[Any]:
    """Queries, keys and values, (rows, tokens, width) each."""
    if of["use_separate_proj_weight"]:
        weights = [of[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = _thirds(of["in_proj_weight"])
    biases = [None] * 3 if of["in_proj_bias"] is None else _thirds(of["in_proj_bias"])
    return [F.linear(*three) for three in zip(inputs, weights, biases)]


def _thirds(packed: Any) -> list[Any]:
    return packed.parts(3) if isinstance(packed, Weight) else list(packed.chunk(3))


def _longer(tokens: Any, more: Tensor) -> Any:
    """With one more token for every row, that of (1, 1, width)."""
    return torch.cat([tokens, more.expand(tokens.shape[0], -1, -1)], 1)


def _heads(x: Any, heads: int) -> Any:
    """(rows, heads, tokens, width of a head) of (rows, tokens, width)."""
    rows, tokens, width = x.shape
    return x.reshape(rows, tokens, heads, width // heads).transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truth values (True: left out) as what is added to scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
