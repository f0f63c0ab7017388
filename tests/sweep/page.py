"""The page that says what became of every architecture."""

from __future__ import annotations

import datetime
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers

import surgery

from .models import cases
from .run import Result

PASSED, REFUSED, FAILED, EMPTY, NOT_BUILT = (
    "passed",
    "refused",
    "failed",
    "nothing to drop",
    "not built",
)

INTRODUCTION = """\
# Architectures

Every model type of transformers, as far as a small model of it can be made without downloads:
`make sweep` makes one from its default config, with narrow layers and few of them, and finds inputs
with which it runs. Then, with `"all-linear"` and with every weight of two and more dimensions (linear
layers, convolutions, embeddings, recurrent layers, experts, routers and other bare parameters):

* `plan_dropconnect` and `apply_dropconnect` accept it;
* `eval()` gives the bits that the plain model gives;
* `save_pretrained` writes the files that the plain model writes, and plain transformers loads them;
* in a training step every weight that gets a gradient has dropped, and its gradient is exactly zero
  where its mask is, as computed again from the key that was drawn;
* nothing warns of a weight that is read where it is not dropped;
* `strip_dropconnect` gives back the same objects with the same bits.

*Passed* is a model for which all of this holds for every weight. *Refused* is one of which some weights
cannot be dropped: the plan names them with the reason, and all of the above holds for the others.
"""

REASONS = {
    r"of its own": "a config or a part of another model, without a PreTrainedModel of its own",
    r"requires the \w+ library|No module named|ImportError": "needs a library that is not there",
    r"^too large": "too large with widths that suit its other settings",
    r"took too long|process died": "took too long, or too much memory",
    r"^not made": "no model from its default config, made small by rules",
    r"^does not run": "no inputs found with which it runs",
}
"""Groups of what was not built: what its reason says, and the name of the group."""


def page(results: Iterable[Result], missing: Sequence[str] = ()) -> str:
    """The whole page, from the results of a sweep and the cases that it did not reach."""
    known = {one["case"]: one for one in sorted(results, key=lambda one: str(one["case"]))}
    types = [one for one in known.values() if not one["head"]]
    heads = [one for one in known.values() if one["head"]]
    parts = [
        INTRODUCTION,
        _conditions(),
        _summary(types, heads),
        _refused([*types, *heads]),
        _failed([*types, *heads]),
        _not_built([*types, *heads]),
        _section("Not reached", {"the sweep was cut off before": list(missing)}),
        _left_out([*types, *heads]),
        _passed(types, heads),
    ]
    return "\n".join(part for part in parts if part)


def _conditions() -> str:
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}, dropconnect-surgery "
        f"{surgery.__version__}, {day}.\n"
    )


def _summary(types: Sequence[Result], heads: Sequence[Result]) -> str:
    lines = [
        "| | in all | built | passed | refused | failed | nothing to drop | not built |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, own in (("model types", types), ("classes with heads", heads)):
        counted = Counter(one["status"] for one in own)
        built = len(own) - counted[NOT_BUILT]
        cells = (
            len(own),
            built,
            *(counted[s] for s in (PASSED, REFUSED, FAILED, EMPTY, NOT_BUILT)),
        )
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    share = share_refused(_refused_of_built(types), _refused_of_built([*types, *heads]))
    return "\n".join(lines) + f"\n\n{share}"


def _refused_of_built(results: Sequence[Result]) -> tuple[int, int]:
    counted = Counter(one["status"] for one in results)
    return counted[REFUSED], len(results) - counted[NOT_BUILT]


def share_refused(types: tuple[int, int], both: tuple[int, int]) -> str:
    """The sentence that says how many are refused of how many: of the model types, and of these and
    classes with heads together."""
    one, other = (f"{some} of {of}, {100 * some / max(of, 1):.1f} %" for some, of in (types, both))
    return f"Refused of the model types that were built: {one}; with the classes with heads: {other}.\n"


def _refused(results: Sequence[Result]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    linear = [one["case"] for one in results if one.get("refused_linear")]
    for one in results:
        if one["status"] == REFUSED:
            rules = Counter(_rule(rule) for rule in one["refused"].values())
            for rule, count in rules.items():
                groups[rule].append(f"{one['case']} ({count} of {count + one['sites']})")
    note = f'Of the weights that `"all-linear"` means: {", ".join(linear) or "none"}.\n'
    return _section("Refused", groups, "with how many of their weights", note)


def _rule(text: str) -> str:
    """What was refused, without what differs from site to site."""
    text = re.sub(r"^\w*: ", "", text)
    return text.removeprefix(": ").partition(";")[0].strip()


def _failed(results: Sequence[Result]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for one in results:
        if one["status"] == FAILED:
            groups[one["reason"][:200]].append(one["case"])
    return _section("Failed", groups)


def _not_built(results: Sequence[Result]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for one in results:
        if one["status"] == NOT_BUILT:
            names = (name for text, name in REASONS.items() if re.search(text, one["reason"]))
            groups[next(names, one["reason"])].append(one["case"])
    return _section("Not built", groups)


def _left_out(results: Sequence[Result]) -> str:
    """What the plain model does not do, so that nothing could be compared."""
    groups: dict[str, list[str]] = defaultdict(list)
    for one in results:
        for what in one.get("left_out", ()):
            groups[what.partition(":")[0]].append(one["case"])
    return _section("Not compared, because of the plain model", groups)


def _passed(types: Sequence[Result], heads: Sequence[Result]) -> str:
    groups = {
        "model types": [one["case"] for one in types if one["status"] == PASSED],
        "classes with heads": [one["case"] for one in heads if one["status"] == PASSED],
    }
    return _section("Passed", groups)


def _section(
    title: str, groups: dict[str, list[str]], what: str = "", note: str | None = None
) -> str:
    """Cases by reason, the commonest first."""
    if not any(groups.values()):
        return ""
    lines = [f"## {title}", "", *([note] if note else [])]
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        if not names:
            continue
        many = f"{len(names)}, {what}" if what else f"{len(names)}"
        lines += [f"**{_plain(reason)}** ({many}):", *_wrapped(names), ""]
    return "\n".join(lines)


def _plain(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _wrapped(cases: Sequence[str]) -> list[str]:
    text = ", ".join(case.replace("_", "\\_") for case in cases) + "."
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def write(results: Iterable[Result], path: Path) -> None:
    """Write the page."""
    found = list(results)
    known = {one["case"] for one in found}
    missing = [str(case) for case in cases() if str(case) not in known]
    path.write_text(page(found, missing), encoding="utf-8")
