"""A plugin of mypy: in tests an attribute of a module is what the test takes it for.

torch declares every parameter, buffer and child of an `nn.Module` that no annotation names as
`Tensor | Module`. The package looks which it is; a test that takes one for the other fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

TESTS = os.path.join(os.getcwd(), "tests", "")
UNDECLARED = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


class Modules(Plugin):
    """Looks at every attribute that is read."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type]:
        return as_taken


def as_taken(context: AttributeContext) -> Type:
    """The declared type of an attribute, or any in a test where torch does not know it."""
    declared = get_proper_type(context.default_attr_type)
    if not context.api.path.startswith(TESTS) or not isinstance(declared, UnionType):
        return declared
    unknown = {str(item) for item in declared.items} == UNDECLARED
    return AnyType(TypeOfAny.special_form) if unknown else declared


def plugin(version: str) -> type[Plugin]:
    """What mypy asks for."""
    return Modules
