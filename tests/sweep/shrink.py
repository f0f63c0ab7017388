"""A config of any transformers model made small: by the names of its settings, without downloads.

Sizes that must fit each other (the width of a tower and of what reads it, heads and their width) are
divided by one factor, so that they still fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

FACTORS = (32, 16, 8, 4, 2, 1)
"""What widths are divided by; the first that gives a model that runs is taken."""

NARROWEST = 64
"""No width is asked to be less, if it was more."""

VOCABULARY = 512
"""Words; the highest ids are those of special tokens."""

DEEPEST = 9
"""Layers that are kept where every kind of layer is among so many, else `SHALLOW`."""
SHALLOW = 2

_WIDTH = re.compile(
    r"hidden_size|mamba_d_head|intermediate_size|embedding_size|projection_size|proj_size|output_size|output_dim"
    r"|(^|_)dims?($|_)|^d_(model|ff|kv|inner|head|rel)$|^dff$|n_embd|n_inner|_channels|_rank$|planes|upsample_groups"
    r"|width|units|filters|head_size|kv_channels|num_pos_feats|coordinate_size|shape_size|input_size"
    r"|hidden_sizes|embed_dims|feedforward|ffn_dim|hidden_channels|_features$|d_state_size|n_hidden"
)
_NO_WIDTH = re.compile(
    r"num_channels|^in_channels$|audio_channels|input_channels|mask_input|kernel|image|patch|window"
    r"|vocab|codebook_size|mel|example_dim|action|label|stride|ratio|factor|_layers|(?<!upsample_)groups|position"
)
_DEPTH = re.compile(
    r"^(\w+_)?(num_)?(hidden_)?layers$|^n_layers?$|^depths?$|^(\w+_)?depth$|^num_layer$"
    r"|^(en|de)coder_depths$|^num_hidden_groups$|^n_(input|recurrent|output)_layers$|_num_layers$"
    r"|^num_blocks$|^layers_count$|^num_block_repeats$"
)
_NO_DEPTH = re.compile(
    r"cross_attention_layers|conv_layers|kv_shared|feat_extract|^max_depth|^min_depth"
)
_EXPERTS = re.compile(
    r"^(num|n)_(\w+_)?experts$|^moe_num_experts$|^num_experts_\w+$|^n_routed_experts$"
)
_CHOSEN = re.compile(r"experts_per_tok|^moe_(k|topk|top_k)$|^num_selected_experts$|^top_?k$")
_TOKEN = re.compile(r"(token|_id|_index|_ids|_indices|tokens|_offset)$")
_PLACES = re.compile(
    r"(indices|indexes|indice|_ids|out_index|feature_layers?|cross_attention_layers|attn_layers"
    r"|hook_layers|intermediate_layers|_layer_idx|layer_ids|layers_block)$"
)
_TYPES = ("layers_block_type", "layer_types", "mlp_layer_types", "layer_type_list")
"""Names of what may be computed from other settings: the kind of each layer."""
_LAST = re.compile(r"first_k_dense|num_dense_layers|moe_layer_start|max_window_layers")


def factors(config: Any) -> list[int]:
    """What a config's widths may be divided by, the largest first."""
    names = ("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim")
    queue, widths = [config], []
    for one in queue:
        queue += parts(one)
        widths += [v for v in (vars(one).get(n) for n in names) if type(v) is int]
    widest = max(widths, default=768)
    return [f for f in FACTORS if f == 1 or widest // f >= NARROWEST]


def shrink(config: Any, factor: int) -> Any:
    """Make a config small, in place, with all configs that it holds.

    Args:
        config: a `PreTrainedConfig` with its default values.
        factor: one of `FACTORS`.
    """
    _Shrinking(factor).one(config)
    return config


def parts(config: Any) -> Iterator[Any]:
    """The configs that a config holds."""
    for value in vars(config).values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if hasattr(item, "to_diff_dict"):
                yield item


class _Shrinking:
    """One factor for a config and its parts, and one number for each special token."""

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._tokens: dict[int, int] = {}
        self._seen: set[int] = set()

    def one(self, config: Any) -> None:
        if id(config) in self._seen:
            return
        self._seen.add(id(config))
        for part in parts(config):
            self.one(part)
        self._complete(config)
        values = dict(vars(config))
        depths = {name: v for name, v in values.items() if _is_depth(name, v)}
        places = [len(v) for name, v in values.items() if _PLACES.search(name) and _numbers(v)]
        values |= {name: getattr(config, name, None) for name in _TYPES if name not in values}
        layers = {name: _fewer(v, values, places) for name, v in depths.items()}
        patch = values.get("patch_size")
        stages = "stage_names" in values and "num_hidden_layers" in layers
        for name, value in dict(vars(config)).items():
            if name in _STAGES:
                continue
            changed = layers.get(name)
            if changed is None:
                changed = self._value(name, value, patch if isinstance(patch, int) else 16)
            if isinstance(changed, list) and _is_list_of_layers(value, depths):
                changed = self._of_layers(value, changed, depths, layers)
            if _PLACES.search(name) and _numbers(value) and layers:
                changed = _among(value, max(_depth_of(d) for d in layers.values()))
            if changed is not value and changed != value:
                _put(config, name, changed)
        self._layers_that_differ(config, patch if isinstance(patch, int) else 16)
        _fit_heads(config)
        _split_positions(config)
        if stages:
            _fewer_stages(config, values, layers["num_hidden_layers"])

    def _layers_that_differ(self, config: Any, patch: int) -> None:
        """Settings of single layers, of those that are left."""
        spec = vars(config).get("_heterogeneity_spec")
        if spec is not None:
            layers = dict(spec.per_layer_overrides)
            config.per_layer_config = None
            config.per_layer_config = {
                index: {name: self._value(name, one, patch) for name, one in layer.items()}
                for index, layer in layers.items()
                if index < config.num_hidden_layers
            }

    def _complete(self, config: Any) -> None:
        """Give values to settings that a model needs and that have none by default."""
        set_now = vars(
            config
        )  # attributes that differ from layer to layer raise when they are read
        heads, hidden = set_now.get("num_attention_heads"), set_now.get("hidden_size")
        missing: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads if type(hidden) is type(heads) is int else None,
            "num_experts_per_tok": 2,
            "prediction_length": 4,
            "context_length": 8,
            "pad_token_id": 0,
        }
        for name, value in missing.items():
            if value is not None and name in set_now and set_now[name] is None:
                _put(config, name, value)
        if set_now.get("use_cache"):
            _put(config, "use_cache", False)
        for name in [name for name in set_now if name.endswith("layerdrop")]:
            _put(config, name, 0.0)  # which layers run must not depend on the draws before

    def _of_layers(self, before: Any, changed: Any, depths: Any, layers: Any) -> Any:
        name = next(name for name, depth in depths.items() if depth == len(before))
        return changed[: layers[name]]

    def _value(self, name: str, value: Any, patch: int) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._number(name, value, patch)
        if isinstance(value, float) and name in ("depth_coefficient", "width_coefficient"):
            return min(value, 0.5)
        if isinstance(value, (list, tuple)):
            of_layers = (
                name == "in_channels" and len(value) > 2
            )  # the channels of an image are one number
            name = "hidden_channels" if of_layers else name
            return type(value)(self._value(name, item, patch) for item in value)
        if isinstance(value, dict):
            return {key: self._value(str(key), item, patch) for key, item in value.items()}
        return value

    def _number(self, name: str, value: int, patch: int) -> int:
        if "vocab" in name and value > VOCABULARY:
            return VOCABULARY
        if _TOKEN.search(name) and value >= VOCABULARY:
            return self._tokens.setdefault(value, VOCABULARY - 1 - len(self._tokens))
        if _EXPERTS.search(name) and not _CHOSEN.search(name):
            return min(value, 4)
        if _CHOSEN.search(name):
            return min(value, 2)
        if name in ("n_group", "num_expert_group"):
            return min(value, 2)
        if "kv_shared" in name:
            return 0
        if name == "topk_group" or _LAST.search(name):
            return min(value, 1)
        if name == "max_source_positions" and self._factor > 1:
            return min(value, 64)
        if name in ("image_size", "pretrain_image_size", "crop_size") and value > 64:
            return max(64, 4 * patch) if self._factor > 1 else value
        if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 2 * self._factor:
            return value // self._factor
        return value


def _fit_heads(config: Any) -> None:
    """Fewer heads, where they do not divide the width any more."""
    set_now = vars(config)
    heads, width = set_now.get("num_attention_heads"), set_now.get("hidden_size")
    if type(heads) is int and type(width) is int and width % heads and not set_now.get("head_dim"):
        _put(config, "num_attention_heads", math.gcd(heads, width))


def _split_positions(config: Any) -> None:
    """Rotary positions of time, height and width share the dimensions of a head."""
    rope = vars(config).get("rope_parameters")
    if not isinstance(rope, dict) or "mrope_section" not in getattr(
        type(config), "ignore_keys_at_rope_validation", ()
    ):
        return
    set_now = vars(config)
    width = set_now.get("head_dim") or set_now["hidden_size"] // set_now["num_attention_heads"]
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    first = half // 4
    rope["mrope_section"] = [first, (half - first + 1) // 2, (half - first) // 2]


_STAGES = ("stage_names", "_out_indices", "_out_features", "out_indices", "out_features")
"""What backbones say of their stages; the number of stages stays, where it is not that of layers."""


def _fewer_stages(config: Any, values: dict[str, Any], depth: int) -> None:
    """The outputs of a backbone whose stages are its layers: the last ones."""
    names = list(values["stage_names"])[: depth + 1]
    count = min(len(values.get("_out_indices") or [0]), depth)
    indices = list(range(depth + 1 - count, depth + 1))
    vars(config).update(
        stage_names=names, _out_indices=indices, _out_features=[names[i] for i in indices]
    )


def _put(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a setting that says no to what is small
        return


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )


def _is_depth(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not _DEPTH.search(name) or _NO_DEPTH.search(name):
        return False
    return (isinstance(value, int) and value > 0) or _numbers(value)


def _depth_of(depth: Any) -> int:
    return depth if isinstance(depth, int) else max(depth)


def _fewer(depth: Any, values: dict[str, Any], places: list[int]) -> Any:
    """Layers enough for each kind of them, and for all layers whose output is asked for."""
    if not isinstance(depth, int):
        return type(depth)(min(one, 1 if len(depth) > 2 else SHALLOW) for one in depth)
    wanted = min(depth, max([SHALLOW, *(n for n in places if n <= depth)]))
    for value in values.values():
        if isinstance(value, (list, tuple)) and len(value) == depth > 1:
            kinds = [str(item) for item in value]
            if len(set(kinds)) <= 4:
                first = max(kinds.index(kind) for kind in set(kinds)) + 1
                wanted = max(wanted, first if first <= DEEPEST else wanted)
    return wanted


def _is_list_of_layers(value: Any, depths: dict[str, Any]) -> bool:
    return len(value) > SHALLOW and any(
        isinstance(d, int) and d == len(value) for d in depths.values()
    )


def _among(value: Any, depth: int) -> Any:
    """Indices of layers, brought below the depth: as many as before, if there are so many layers."""
    highest = max(value)
    if highest < depth or highest <= 0:
        return value
    count = len(value)
    if count <= depth:
        return type(value)(depth - count + i for i in range(count))
    return type(value)(min(item, depth - 1) for item in value)
