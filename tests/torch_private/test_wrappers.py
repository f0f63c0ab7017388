"""Canaries of how wrappers name what is inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from surgery.torch_private import wrappers

from .canary import canary


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@canary(wrappers, "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
def test_wrappers_keep_the_module_under_these_names() -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    net = nn.Linear(2, 2)
    compiled: Any = torch.compile(net)
    checkpointed = checkpoint_wrapper.checkpoint_wrapper(net)
    found = {name for one in (compiled, checkpointed) for name, _ in one.named_children()}
    assert found | {_common_utils.FSDP_WRAPPED_MODULE} == wrappers.WRAPPED
