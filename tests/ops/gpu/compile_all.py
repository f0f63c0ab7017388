"""Compile every kernel for real GPUs, on a machine without one: the interpreter lets pass what Triton's
compiler does not. A program, since here triton must not be told to interpret.

    python tests/ops/gpu/compile_all.py few|all
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from surgery.ops import (
    Law,
    Layout,
    drop_weight,
    example_linear,
    expectation,
    gaussian_linear,
    gaussian_sample,
    key_from_seed,
    masked_linear,
    moments_of,
)
from surgery.ops.gpu import launch, masks

ALL = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)]
if "amd" in backends:
    ALL.append(GPUTarget("hip", "gfx942", 64))

NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
compiled: set[Any] = set()
names: set[str] = set()
planned: set[str] = set()
"""Those whose launches the extension repeats."""


def type_of(arg: Any, parameter: Any) -> str:
    """As Triton's own launch sees an argument."""
    if isinstance(arg, Tensor):
        return "*" + NAMES[arg.dtype]
    if isinstance(arg, float):
        return "fp32"
    special = arg is None or (arg == 1 and not parameter.do_not_specialize)
    return "constexpr" if special else "i32"


def check_parameters(ptx: str, expected: tuple[int, ...]) -> None:
    """What the extension gives to a kernel is what it has, but for two addresses of Triton's own."""
    sizes = tuple(int(bits) // 8 for bits in re.findall(r"\.param \.[uf](\d+)", ptx))
    assert sizes[: len(expected)] == expected, (sizes, expected)
    assert set(sizes[len(expected) :]) <= {8}, (sizes, expected)


def compile_instead(
    kernel: launch.Kernel,
    grid: Any,
    device: Any,
    key: Any,
    args: Any,
    constants: Any,
    plan: launch.Plan | None = None,
) -> bool:
    """What stands for `Kernel.launch` here. Nothing runs, and what should be written is not."""
    function = getattr(importlib.import_module(f"surgery.ops.gpu.{kernel._file}"), kernel.name)
    types = [*map(type_of, args, function.params), *("constexpr" for _ in constants)]
    known = {
        (i,): v for i, (v, t) in enumerate(zip((*args, *constants), types)) if t == "constexpr"
    }
    form = kernel.name, tuple(types), tuple(known.items())
    if form not in compiled:
        compiled.add(form)
        names.add(kernel.name)
        source = ASTSource(function, dict(zip(function.arg_names, types, strict=True)), known)
        for target in ALL if sys.argv[1] == "all" else ALL[1:2]:
            made = triton.compile(source, target=target, options=dict(kernel._options))
            if target.backend != "cuda":
                continue
            if kernel is masks.mask_kernel:
                check_parameters(made.asm["ptx"], masks.parameters(*constants[:2]))
            elif plan is not None:
                planned.add(kernel.name)
                check_parameters(made.asm["ptx"], plan.parameters())
    return True


def cases(every: bool) -> Iterator[tuple[torch.dtype, Tensor | None, Law]]:
    cpu = torch.device("cpu")
    floats = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    for dtype in floats if every else floats[:2]:
        for anchored in (False, True) if every else (dtype == torch.bfloat16,):
            law = Law.of(0.5, cpu, dtype)
            yield dtype, torch.zeros(64, 32).to(dtype) if anchored else None, law
            if every:
                yield dtype, None, Law(law.threshold, law.scale)


def use_all(every: bool) -> None:
    """Call what launches kernels, with and without gradients."""
    key = key_from_seed(1)
    for dtype, anchor, law in cases(every):
        x, weight = (torch.randn(n, 32).to(dtype).requires_grad_() for n in (16, 64))
        for layout in (Layout.elements(2048), Layout.shared((64, 32), (1,))):
            drop_weight(weight, key, law, layout, anchor)
        outputs = [masked_linear(x, weight, None, key, law, Layout.elements(2048), anchor)]
        for examples in (x[:, None], x.repeat(4, 1).view(2, 32, 32), x.view(4, 4, 32)):
            outputs.append(example_linear(examples, weight, key, law, "element", anchor))
        bias = torch.zeros(64).to(dtype).requires_grad_()
        outputs.append(example_linear(x, weight, key, law, "element", anchor, bias=bias))
        outputs.append(gaussian_linear(x, weight, None, law, "element", anchor))
        outputs.append(gaussian_sample(x, torch.ones_like(x)))
        torch.stack([output.sum() for output in outputs]).sum().backward()
        with torch.no_grad():
            moments_of(F.linear, x, weight, None, law, "element", anchor)
            for f in (torch.relu, F.gelu, F.leaky_relu):
                expectation(f, x, torch.ones_like(x))
    with torch.autocast("cpu", torch.bfloat16):
        x, weight = (torch.randn(n, 32).requires_grad_() for n in (16, 64))
        law = Law.of(0.5, x.device, x.dtype)
        u = gaussian_linear(x, weight, None, law, "element")
        u = u + masked_linear(x, weight, None, key, law, Layout.elements(2048), None)
    u.sum().backward()


launch.INTERPRETED = {"cpu"}
launch.repeated.wanted = True
launch.Kernel.launch = compile_instead  # type: ignore[assignment]
use_all(sys.argv[1] == "all")
print(len(compiled), *sorted(names))
print(*sorted(planned))
