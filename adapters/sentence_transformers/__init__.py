"""sentence-transformers: a model whose modules are operated on saves all of them plain.

Loaded through the entry point `surgery.plugins` once `sentence_transformers` is imported. The sites are
saved under the names that they have in the whole model, so `load_dropconnect` finds them there.
"""

from sentence_transformers import CrossEncoder, SentenceTransformer

from surgery.verbs.savers import teach, writes_plain

for kind in (SentenceTransformer, CrossEncoder):
    for owner in kind.__mro__:
        for name in {"save", "save_pretrained"}.intersection(vars(owner)):
            teach(owner, name, writes_plain)
