"""Inputs with which a small model may run: by the names of what its forward takes.

Nothing says what shape `input_features` has in a model that nobody has seen before, so there are
several guesses for a name, and a model runs with the first that suits it.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .shrink import VOCABULARY, parts

ROWS, LENGTH = 2, 8
MOST = 24
"""Combinations that are tried."""

Guess = Callable[["Sizes"], Any]


class Sizes:
    """What a config says, wherever in its parts it says so."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config

    def __call__(self, *names: str, default: Any = None) -> Any:
        """The first of these settings that the config has, or a config that it holds."""
        queue = [self.config]
        for config in queue:
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
            queue += parts(config)
        return default

    def number(self, *names: str, default: int) -> int:
        value = self(*names, default=default)
        while isinstance(value, (list, tuple)) and value:
            value = value[-1]
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    @property
    def words(self) -> int:
        return max(2, min(self.number("vocab_size", default=VOCABULARY), VOCABULARY) // 2)

    @property
    def width(self) -> int:
        return self.number("hidden_size", "d_model", "embed_dim", "hidden_dim", "dim", default=64)

    @property
    def image(self) -> tuple[int, int]:
        size = self("image_size", "img_size", "input_size", "spec_size", default=64)
        if isinstance(size, dict):
            size = [size.get("height", 64), size.get("width", 64)]
        height, width = (
            (size[:2] if len(size) > 1 else size * 2)
            if isinstance(size, (list, tuple))
            else (size, size)
        )
        return int(height), int(width)

    @property
    def channels(self) -> int:
        found = self("num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
        return found if isinstance(found, int) else 3


def _ids(sizes: Sizes, length: int = LENGTH, rows: int = ROWS) -> Tensor:
    """Words that differ; the last is the end of the text, for models that look for one."""
    ids = torch.arange(rows * length).view(rows, length) * 7 % (sizes.words - 4) + 3
    end = sizes("eos_token_id")
    if isinstance(end, int) and 0 <= end < sizes.words * 2:
        ids[:, -1] = end
    return ids


def _numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, max(1, torch.Size(shape).numel())).view(shape)


def _image(sizes: Sizes, *front: int) -> Tensor:
    return _numbers(*front, sizes.channels, *sizes.image)


def _frames(sizes: Sizes) -> int:
    return sizes.number("num_frames", "max_frames", default=2)


def _features(sizes: Sizes) -> int:
    return sizes.number(
        "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", default=80
    )


def _positions(sizes: Sizes) -> int:
    return 2 * sizes.number("max_source_positions", default=32)


GUESSES: tuple[tuple[str, tuple[Guess, ...]], ...] = (
    (
        r"^(input_ids|decoder_input_ids|text_input_ids|query_ids|token_ids)$",
        (
            _ids,
            lambda s: (
                _ids(s)
                .unsqueeze(-1)
                .expand(-1, -1, s.number("num_codebooks", "n_codebooks", default=8))
                % 16
            ),
            lambda s: (
                _ids(s)
                .unsqueeze(1)
                .expand(-1, s.number("num_codebooks", default=4), -1)
                .reshape(-1, LENGTH)
                % 16
            ),
            lambda s: _ids(s)[:1],
        ),
    ),
    (r"attention_mask$", (lambda s: torch.ones(ROWS, LENGTH, dtype=torch.long),)),
    (
        r"^pixel_values(_videos)?$|^images?$|^vision_x$|^pixel_values_images$",
        (
            lambda s: _image(s, ROWS),
            lambda s: _image(s, ROWS, _frames(s)),
            lambda s: _image(s, ROWS, 1),
            lambda s: _numbers(ROWS, s.channels, 64, 64),
            lambda s: _numbers(ROWS, s.channels, 112, 112),
            lambda s: _numbers(ROWS, s.channels, 224, 224),
            lambda s: _numbers(ROWS, s.channels, 2, 32, 32),
            lambda s: _numbers(
                16,
                s.channels
                * s.number("patch_size", default=16) ** 2
                * s.number("temporal_patch_size", default=1),
            ),
            lambda s: _numbers(ROWS, 16, s.channels * s.number("patch_size", default=16) ** 2),
        ),
    ),
    (
        r"^(input_features|audio_features|features|spectrogram|fbank_features)$",
        (
            lambda s: _numbers(ROWS, _features(s), _positions(s)),
            lambda s: _numbers(ROWS, 64, _features(s)),
            lambda s: _numbers(ROWS, _features(s), 64),
            lambda s: _numbers(ROWS, 1, 64 * 16, _features(s)),
            lambda s: _numbers(ROWS, 1, 1001, 64),
            lambda s: _numbers(ROWS, _features(s), 3000),
            lambda s: _numbers(ROWS, 256, _features(s)),
        ),
    ),
    (
        r"^input_values$",
        (
            lambda s: _numbers(ROWS, 8000),
            lambda s: _numbers(ROWS, 1, 9600),
            lambda s: _numbers(ROWS, s.number("max_length", default=1024), _features(s)),
            lambda s: _numbers(ROWS, 64, _features(s)),
            lambda s: _ids(s),
        ),
    ),
    (
        r"^hidden_states?$|^inputs_embeds$|^x$|^(image|encoder)_embeds$|^inputs$|^embeddings$|^encoder_hidden_states$",
        (
            lambda s: _numbers(ROWS, LENGTH, s.width),
            lambda s: _numbers(16, s.width),
            lambda s: _numbers(
                16,
                s.channels
                * s.number("patch_size", default=16) ** 2
                * s.number("temporal_patch_size", default=1),
            ),
            lambda s: _numbers(ROWS, s.width, LENGTH),
            lambda s: _numbers(ROWS, s.width, 8, 8),
            lambda s: _numbers(
                ROWS,
                LENGTH,
                s.number("model_in_dim", "num_mel_bins", "upsample_initial_channel", default=80),
            ),
            lambda s: _numbers(ROWS, s.number("num_mel_bins", "mel_dim", default=80), LENGTH),
        ),
    ),
    (
        r"^(input_features_mask|feature_attention_mask)$",
        (
            lambda s: torch.ones(ROWS, _positions(s), dtype=torch.long),
            lambda s: torch.ones(ROWS, 64, dtype=torch.long),
        ),
    ),
    (r"^visual_feats$", (lambda s: _numbers(ROWS, 4, s.number("visual_feat_dim", default=64)),)),
    (r"^visual_pos$", (lambda s: _numbers(ROWS, 4, s.number("visual_pos_dim", default=4)),)),
    (
        r"grid_thw$",
        (lambda s: torch.tensor([[1, 4, 4]]), lambda s: torch.tensor([[1, 2, 4], [1, 2, 4]])),
    ),
    (r"^bbox$", (lambda s: torch.tensor([1, 2, 3, 4]).expand(ROWS, LENGTH, 4).clone(),)),
    (
        r"^past_values$",
        (
            lambda s: _numbers(
                ROWS,
                s.number("context_length", default=32)
                + max(s("lags_sequence", default=[0]) or [0]),
            ),
            lambda s: _numbers(
                ROWS,
                s.number("context_length", default=32),
                s.number("num_input_channels", "input_size", default=1),
            ),
        ),
    ),
    (
        r"^(past_time_features|future_time_features)$",
        (
            lambda s: _numbers(
                ROWS,
                s.number("context_length", default=32)
                + max(s("lags_sequence", default=[0]) or [0]),
                max(1, s.number("num_time_features", default=1)),
            ),
        ),
    ),
    (
        r"^past_observed_mask$",
        (
            lambda s: torch.ones(
                ROWS,
                s.number("context_length", default=32)
                + max(s("lags_sequence", default=[0]) or [0]),
            ),
        ),
    ),
    (r"^labels$", (lambda s: _ids(s), lambda s: torch.zeros(ROWS, dtype=torch.long))),
    (r"image_sizes$", (lambda s: torch.tensor([list(s.image)] * ROWS),)),
    (r"^(position_ids|cache_position)$", (lambda s: torch.arange(LENGTH).expand(ROWS, -1),)),
    (r"timesteps?$|^time$", (lambda s: torch.rand(ROWS),)),
    (
        r"(audio_codes|codes|input_codes)$",
        (
            lambda s: (
                _ids(s)
                .unsqueeze(1)
                .expand(-1, s.number("num_codebooks", "num_quantizers", default=4), -1)
                % 16
            ),
        ),
    ),
    (r"_ids$", (_ids,)),
    (r"_length[s]?$", (lambda s: torch.full((ROWS,), LENGTH),)),
    (r"_mask$", (lambda s: torch.ones(ROWS, LENGTH, dtype=torch.bool),)),
)

ANYTHING: tuple[Guess, ...] = (
    lambda s: _numbers(ROWS, LENGTH, s.width),
    lambda s: _ids(s),
    lambda s: _numbers(ROWS, s.width),
    lambda s: torch.zeros(ROWS, dtype=torch.long),
    lambda s: _image(s, ROWS),
)
"""For a name of which nothing is known."""

OTHERS = (
    "pixel_values",
    "input_features",
    "input_values",
    "bbox",
    "visual_feats",
    "visual_pos",
    "input_features_mask",
)


def guesses(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments to try, the likeliest first."""
    sizes = Sizes(model)
    for wanted in _wanted(model):
        options = [list(_makers(name)) for name in wanted]
        ranks = itertools.product(*(range(len(one)) for one in options))
        for choice in sorted(itertools.islice(ranks, 4000), key=sum)[:MOST]:
            try:
                yield {n: one[i](sizes) for n, one, i in zip(wanted, options, choice)}
            except (TypeError, ValueError, RuntimeError):
                continue


def _makers(name: str) -> tuple[Guess, ...]:
    return next((makers for pattern, makers in GUESSES if re.search(pattern, name)), ANYTHING)


def _wanted(model: nn.Module) -> Iterator[list[str]]:
    """Names of the inputs to give: the main one and what has no default; then more of those that carry
    data."""
    taken = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [n for n, p in taken.items() if p.default is p.empty and p.kind not in kinds]
    main: Any = getattr(model, "main_input_name", "input_ids")
    if main in taken and main not in names:
        names.append(main)
    if not names:
        names = [next((n for n, p in taken.items() if p.kind not in kinds), main)]
    decodes = getattr(model.config, "is_encoder_decoder", False) or "input_ids" not in taken
    if decodes and "decoder_input_ids" in taken and "decoder_input_ids" not in names:
        names.append("decoder_input_ids")
    yield names
    more = [name for name in ("input_ids", *OTHERS) if name in taken and name not in names]
    for name in more:
        yield [*names, name]
    if len(more) > 1:
        yield [*names, *more]
