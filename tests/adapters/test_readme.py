"""What the README prints is what the code prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers

from surgery import plan_dropconnect

README = Path(__file__).parents[2] / "README.md"


def model_to_plan() -> Any:
    """GPT-2 on the meta device; with weights by transformers 5.0, which ties nothing there."""
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    tied = gpt2.lm_head.weight is gpt2.transformer.wte.weight
    return gpt2 if tied else transformers.GPT2LMHeadModel(gpt2.config)


def test_plan_in_the_readme() -> None:
    gpt2 = model_to_plan()
    block = re.search(
        r"(print\(plan_dropconnect[^\n]*)\n```\n\n```text\n(.*?)\n```", README.read_text(), re.S
    )
    assert block is not None
    call, printed = block.groups()
    scope = {"gpt2": gpt2, "plan_dropconnect": plan_dropconnect}
    assert str(eval(call.removeprefix("print(").removesuffix(")"), scope)) == printed
