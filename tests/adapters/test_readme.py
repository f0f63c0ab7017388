"""What the README prints is what the code prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers

from surgery import plan_dropconnect
from surgery.transforms.find import look

README = Path(__file__).parents[2] / "README.md"


def model_to_plan() -> Any:
    """GPT-2 on the meta device; with weights where that does not run even plain: transformers 5.0 asks
    for the value of a mask."""
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    return gpt2 if look(gpt2) else transformers.GPT2LMHeadModel(gpt2.config)


def test_plan_in_the_readme() -> None:
    gpt2 = model_to_plan()
    block = re.search(
        r"(print\(plan_dropconnect[^\n]*)\n```\n\n```text\n(.*?)\n```", README.read_text(), re.S
    )
    assert block is not None
    call, printed = block.groups()
    scope = {"gpt2": gpt2, "plan_dropconnect": plan_dropconnect}
    assert str(eval(call.removeprefix("print(").removesuffix(")"), scope)) == printed
