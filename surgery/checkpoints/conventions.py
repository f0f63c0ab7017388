"""What others call the weights that they drop, and what the plain modules of torch call them.

Told by names and shapes alone. The sources: `torchnlp/nn/weight_drop.py`, `weight_drop.py` of
salesforce/awd-lstm-lm, `fastai/text/models/awdlstm.py`, `torch/nn/utils/parametrize.py`,
`mixout/mixlinear.py` of bloodwass/mixout, `probly/representation/dropconnect.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..spec.errors import SurgeryError
from ..spec.forms import shown
from ..spec.names import RAW
from .roles import Roles

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Renaming:
    """What becomes of the keys of a checkpoint. Keys that are named nowhere stay as they are."""

    names: dict[str, str] = field(default_factory=dict)
    """From old to new."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Keys that the plain model does not have, and why."""
    copies: dict[str, str] = field(default_factory=dict)
    """Keys that are left out if their values are those of another key."""


@dataclass(frozen=True)
class Convention:
    """One library's names."""

    names: str
    """How its raw keys look, for messages."""
    rename: Callable[[Shapes], Renaming]
    plain: bool = False
    """Whether its weights may have their plain names already."""


_MASKED = "a masked copy of the raw weight"


def _torchnlp(shapes: Shapes) -> Renaming:
    """`weight_hh_l0_raw`; after an `eval()` also `weight_hh_l0`."""
    found = Renaming()
    for key in shapes:
        plain = key.removesuffix(RAW)
        if plain != key:
            found.names[key] = plain
            if plain in shapes:
                found.left_out[plain] = _MASKED
    return found


def _awd_lstm(shapes: Shapes) -> Renaming:
    """`rnns.0.module.weight_hh_l0_raw` beside `rnns.0.module.weight_ih_l0`; after a forward also
    `rnns.0.module.weight_hh_l0`, which is masked."""
    found = Renaming()
    wrappers = {
        match[1] for key in shapes if (match := re.fullmatch(r"(|.*\.)module\.[^.]+_raw", key))
    }
    for key in shapes:
        for wrapper in wrappers:
            if key.startswith(f"{wrapper}module."):
                inside = key.removeprefix(f"{wrapper}module.")
                if key + RAW in shapes:
                    found.left_out[key] = _MASKED
                else:
                    found.names[key] = wrapper + inside.removesuffix(RAW)
    return found


def _fastai(shapes: Shapes) -> Renaming:
    """`0.rnns.0.weight_hh_l0_raw` beside `0.rnns.0.module.weight_ih_l0`; of some releases also
    `0.rnns.0.module.weight_hh_l0`. `0.encoder_dp.emb` is `0.encoder` again."""
    found = Renaming()
    matches = [re.fullmatch(r"(|.*\.)([^.]+)_raw", key) for key in shapes]
    raw = {match[0]: (match[1], match[2]) for match in matches if match}
    wrappers = {prefix for prefix, _ in raw.values()}
    wrappers = {one for one in wrappers if any(key.startswith(f"{one}module.") for key in shapes)}
    for key in shapes:
        prefix, name = raw.get(key, ("", ""))
        if name and prefix in wrappers:
            found.names[key] = prefix + name
        for wrapper in wrappers:
            if key.startswith(f"{wrapper}module."):
                inside = key.removeprefix(f"{wrapper}module.")
                if f"{wrapper}{inside}{RAW}" in shapes:
                    found.left_out[key] = _MASKED
                else:
                    found.names[key] = wrapper + inside
        again = re.fullmatch(r"(.*)_dp\.emb\.weight", key)
        if again and f"{again[1]}.weight" in shapes:
            found.copies[key] = f"{again[1]}.weight"
    return found


def _parametrize(shapes: Shapes) -> Renaming:
    """`parametrizations.weight.original`; what else is below is of the parametrization itself."""
    found = Renaming()
    for key in shapes:
        match = re.fullmatch(r"(|.*\.)parametrizations\.([^.]+)\.(.+)", key)
        if match and match[3] == "original":
            found.names[key] = match[1] + match[2]
        elif match and re.match(r"\d+\.", match[3]):
            found.left_out[key] = "of the parametrization, which is no part of the plain module"
    return found


def _mixout(shapes: Shapes) -> Renaming:
    """`weight`, and `target` where that was registered: the pretrained weight."""
    found = Renaming()
    for key, shape in shapes.items():
        match = re.fullmatch(r"(|.*\.)target", key)
        if match and shapes.get(f"{match[1]}weight") == shape:
            found.left_out[key] = "the pretrained weight, which is not in the plain module"
    return found


def _probly(shapes: Shapes) -> Renaming:
    """`model.` before every key: `DropConnect` is a module around the model."""
    if not shapes or not all(key.startswith("model.") for key in shapes):
        return Renaming()
    return Renaming({key: key.removeprefix("model.") for key in shapes})


def _surgery(shapes: Shapes) -> Renaming:
    """`weight_raw`, `weight_anchor`."""
    roles = Roles({key: (shape,) for key, shape in shapes.items()})
    roles.check()
    anchors = dict.fromkeys(roles.keys("anchor"), "an anchor")
    return Renaming({key: key.removesuffix(RAW) for key in roles.keys("raw")}, anchors)


CONVENTIONS = {
    "torchnlp": Convention("`weight_hh_l0_raw`", _torchnlp),
    "awd-lstm": Convention("`rnns.0.module.weight_hh_l0_raw`", _awd_lstm),
    "fastai": Convention("`rnns.0.weight_hh_l0_raw` beside `rnns.0.module.weight_ih_l0`", _fastai),
    "parametrize": Convention("`parametrizations.weight.original`", _parametrize),
    "mixout": Convention("`target` beside `weight`", _mixout, plain=True),
    "probly": Convention("`model.` before all", _probly, plain=True),
    "surgery": Convention("`weight_raw`", _surgery),
}
"""By the name that `surgery convert --from` knows."""


def renaming(convention: str, shapes: Shapes) -> Renaming:
    """What becomes of the keys of a checkpoint.

    Raises:
        ValueError: there is no such convention.
        SurgeryError: no key follows it, or two would have one name.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    known = CONVENTIONS[convention]
    found = known.rename(shapes)
    if not (found.names or found.left_out or known.plain):
        others = [
            name for name, one in CONVENTIONS.items() if not one.plain and one.rename(shapes).names
        ]
        hint = f"; it looks like {' or '.join(others)}" if others else ""
        raise SurgeryError(
            f"no key looks like {known.names}, as those of {convention} do{hint}. The first key is "
            f"{shown(next(iter(shapes), ''))}"
        )
    _check_apart(found, shapes)
    return found


def _check_apart(found: Renaming, shapes: Shapes) -> None:
    seen: dict[str, str] = {}
    for key in shapes:
        if key not in found.left_out:
            new = found.names.get(key, key)
            if new in seen:
                raise SurgeryError(
                    f"{shown(seen[new])} and {shown(key)} would both be {shown(new)}"
                )
            seen[new] = key


def looks_raw(key: str) -> bool:
    """Whether a key looks as if no plain module had it."""
    return key.endswith(RAW) or "parametrizations." in key
