"""Fork a process that computes with torch."""

from __future__ import annotations

import os

import torch


def fork() -> int:
    """`os.fork`, after which threads of autograd can begin side by side in the child.

    A child makes torch's pool of threads anew when it first sets the number of threads. Each thread
    of autograd does so as it begins, and torch's builds for CUDA have several. If two of them do it
    at once, one finds no pool and aborts the process ("Invalid thread pool!").
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(torch.get_num_threads())
    return child
