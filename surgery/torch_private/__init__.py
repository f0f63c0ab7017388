"""What this package uses of torch that torch does not promise to keep: one file for each concern.

Whatever stands below has no public counterpart in torch 2.9, the oldest that is supported, or one that
costs more than a forward should pay; the file says which. Each name has a test of its own in
`tests/torch_private`, which fails with the name and the file once torch behaves in another way.
Another test holds that no other file of the package uses private names, but for those of
`modules.COMMON`: the dicts of a module, and methods that a module class overrides.

    saved_hooks.py   the hooks that decide what autograd keeps
    modules.py       calls, hooks and marks of `nn.Module`; the names that all files may use
    wrappers.py      names that wrappers put between
    recurrent.py     the lists of weights of RNNs
    functional.py    functional calls
    graphs.py        graphs of torch.fx
    trees.py         nested containers
    compiler.py      dynamo, inductor
    gpu.py           launches of Triton kernels
    tensors.py       what a tensor is below its values
    modes.py         gradients, autocast, modes that see each operation
    tracing.py       what follows the calling code
    checkpoints.py   which activation checkpoints are around it

Functions that are called in every forward are torch's own under another name, so that none of them
costs a call more.
"""
