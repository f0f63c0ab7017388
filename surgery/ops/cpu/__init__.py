"""Kernels for the CPU, in C++: what `gpu/` is for the GPU.

native.py       the kernels as functions of tensors
kernels/        their source: C++ that knows nothing of torch
build.py        how it is compiled and loaded
cache.py        where compiled kernels are kept, and when it is safe to load them
workspace.py    memory for masked weights that live no longer than one product
"""
