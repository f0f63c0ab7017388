"""sentence-transformers: a model whose modules are operated on saves all of them plain, and so does
each kind of module by itself.

Loaded through the entry point `surgery.plugins` once `sentence_transformers` is imported. The sites are
saved under the names that they have in what was saved, so `load_dropconnect` finds them there.
"""

from collections.abc import Iterator
from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer

from surgery.verbs.savers import teach, works_plain, writes_plain

try:
    from sentence_transformers.base.modules import Module
except ImportError:  # before version 5.4
    from sentence_transformers.models import Module


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _with_subclasses(one)


for kind in (SentenceTransformer, CrossEncoder):
    for owner in kind.__mro__:
        for name in {"save", "save_pretrained"}.intersection(vars(owner)):
            teach(owner, name, writes_plain)
for owner in _with_subclasses(Module):
    if "save" in vars(owner):
        teach(owner, "save", writes_plain)
teach(Module, "save_torch_weights", works_plain)
