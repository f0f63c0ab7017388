"""Checkpoints as files, without a model: looked at, made plain, converted, baked.

    weights       which files a checkpoint has, and which keys
    roles         which of its keys are raw, which are plain, which are anchors
    copies        which tensors are stored twice
    tensors, pickles   tensors of checkpoints of any form, read one at a time
    copying       bytes from file to file, and whether they arrived
    output        where the new files go, so that the old checkpoint or the new one is whole
    inspection, strip, convert, bake   one function each: what the command line calls

None of the files but `pickles`, `tensors`, `convert` and `bake` imports torch.
"""
