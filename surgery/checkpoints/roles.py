"""Which keys of a checkpoint are raw, which are plain, and which are anchors. There is no model to ask,
so this is told by names, by shapes, and by the plan if one lies beside the files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ..spec.errors import SurgeryError
from ..spec.forms import shown
from ..spec.names import ANCHOR, RAW, raw_name
from ..spec.plan import Plan, Site
from ..torch_private.wrappers import WRAPPED

Role = Literal["plain", "raw", "anchor"]


class Roles:
    """The roles of the keys of one checkpoint, over all its files.

    A key is raw if it ends in `_raw`, and an anchor if it ends in `_anchor`, lies beside a raw key, and
    has the shape and dtype of it. If there is a plan, a raw key must be of a weight that it lists: a
    model may have parameters of its own that are called so. Wrappers around the model, or inside of it,
    do not count.
    """

    def __init__(self, tensors: Mapping[str, tuple[Any, ...]], plan: Plan | None = None) -> None:
        """
        Args:
            tensors: by key, something that is equal for tensors of one shape and dtype.
            plan: what `dropconnect.json` beside the files says.
        """
        self._sites = None if plan is None else _by_name(plan)
        self._roles = {key: self._role(key, tensors) for key in tensors}

    def __getitem__(self, key: str) -> Role:
        """What a key is."""
        return self._roles[key]

    def keys(self, role: Role) -> list[str]:
        """The keys that have a role."""
        return [key for key, its in self._roles.items() if its == role]

    def plain(self, key: str) -> str | None:
        """The key of the plain model; None for an anchor."""
        role = self._roles.get(key, "plain")
        return None if role == "anchor" else key.removesuffix(RAW) if role == "raw" else key

    def site(self, key: str) -> Site | None:
        """The site of a plain key, as the plan says it."""
        return None if self._sites is None else _listed(key, self._sites)

    def check(self) -> None:
        """Raise `SurgeryError` if a raw key cannot have its plain name, because that is taken."""
        for key in self.keys("raw"):
            plain = key.removesuffix(RAW)
            if plain in self._roles:
                raise SurgeryError(
                    f"both {shown(plain)} and {shown(key)} are there, and only one of them can be the "
                    "weight; remove the other"
                )

    def _role(self, key: str, tensors: Mapping[str, tuple[Any, ...]]) -> Role:
        if self._is_raw(key):
            return "raw"
        raw = raw_name(key.removesuffix(ANCHOR))
        beside = key.endswith(ANCHOR) and raw in tensors and self._is_raw(raw)
        return "anchor" if beside and tensors[raw] == tensors[key] else "plain"

    def _is_raw(self, key: str) -> bool:
        plain = key.removesuffix(RAW)
        if plain == key or plain.endswith(".") or not plain:
            return False
        return self._sites is None or _listed(plain, self._sites) is not None


def _by_name(plan: Plan) -> dict[str, Site]:
    """The sites of a plan under all their names."""
    return {name: site for site in plan for name in (site.name, *site.shared_with)}


def _listed(key: str, sites: Mapping[str, Site]) -> Site | None:
    """The site that a plain key names: in a model that contains the planned one, the key is longer."""
    parts = [part for part in key.split(".") if part not in WRAPPED]
    names = (".".join(parts[start:]) for start in range(len(parts)))
    return next((sites[name] for name in names if name in sites), None)


def missing_sites(plan: Plan, roles: Roles, keys: Iterable[str]) -> list[str]:
    """Names of the sites of a plan of which a checkpoint has no weight, by any of their names."""
    there = {site.name for key in keys if (site := roles.site(roles.plain(key) or ""))}
    return [site.name for site in plan if site.name not in there]
