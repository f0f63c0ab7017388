"""Errors of the public verbs. All are `ValueError`s: the input was wrong and nothing was changed."""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    """A text of others (a name in a file, what another library says of one) as one line that a terminal
    can be given: what cannot be printed is escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


class SurgeryError(ValueError):
    """A model or a plan cannot be operated on as asked. The model is as it was before the call.

    Each argument is one line of the message. Names in it may come from a file, and files from anywhere,
    so what cannot be printed is escaped.
    """

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class NoMatchError(SurgeryError):
    """A pattern, class or name in `targets` or `exclude` matches nothing."""


class NotOperatedError(SurgeryError):
    """The call needs a model with DropConnect in place, and this one has none (or not there)."""

    @classmethod
    def none_in(cls, model: object, wanted: str = "") -> NotOperatedError:
        """That there is none in the whole model; `wanted` goes on with what it was for."""
        return cls(f"{type(model).__name__} has no DropConnect in place{wanted}")


def raise_all(
    problems: Iterable[str], action: str = "put DropConnect in place", *, shown: int = 8
) -> None:
    """Raise one `SurgeryError` that lists every problem; do nothing if there is none."""
    found = list(problems)
    if not found:
        return
    lines = [f"  - {problem}" for problem in found[:shown]]
    if len(found) > shown:
        lines.append(f"  - ... and {len(found) - shown} more")
    head = f"cannot {action}; the model is unchanged:"
    raise SurgeryError(head, *lines)
