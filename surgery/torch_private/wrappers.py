"""How wrappers of torch name the one module inside. Imports nothing: the command line reads names in
files without torch."""

WRAPPED = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Where wrappers of torch keep the one module inside. Some state dicts name them and some do not;
without these, plain keys of one kind would not be found in the other."""
