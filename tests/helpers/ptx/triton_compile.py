"""Compiles a Triton kernel ahead of time, without a GPU, and runs its PTX."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from triton_process import compiling

from .machine import Report, launch
from .tensor_map import TensorMap


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel with everything that a launch needs.

    arguments: names of the kernel's run-time arguments, in order. In the PTX, a tensor descriptor
    takes several parameters, and two pointers follow at the end (global scratch, profile scratch).
    shared: bytes of dynamic shared memory per block. threads: per block; more than 32 * num_warps
    with warp specialisation. global_scratch: bytes per block.
    """

    name: str
    target: int
    ptx: str
    shared: int
    threads: int
    arguments: tuple[str, ...]
    global_scratch: int
    descriptors: tuple[Mapping[str, Any], ...]

    def launch(
        self, grid: Sequence[int], arguments: Mapping[str, Any], schedule: str = "lockstep",
        ptx: str | None = None, seed: int = 0,
    ) -> Report:  # fmt: skip
        """Runs it on numpy arrays or torch CPU tensors, in place; see `ptx.launch`.

        arguments: by name; for a tensor descriptor, a `triton.tools.tensor_descriptor
        .TensorDescriptor` on a CPU tensor. ptx: run this text instead (say, with a planted fault).
        """
        if set(arguments) != set(self.arguments):
            raise ValueError(f"{self.name}: expected {self.arguments}, got {tuple(arguments)}")
        flat = flat_arguments([arguments[name] for name in self.arguments], self.descriptors)
        blocks = int(np.prod(grid))
        scratch = np.zeros(self.global_scratch * blocks, np.uint8) if self.global_scratch else None
        return launch(
            ptx or self.ptx, self.name, grid, self.threads, [*flat, scratch, None], self.shared,
            schedule, seed,
        )  # fmt: skip


def flat_arguments(arguments: Sequence[Any], descriptors: Sequence[Any]) -> list[Any]:
    """Replaces each `TensorDescriptor` by the parameters as which it is passed.

    descriptors: the compiler's metadata of the descriptors, in order.
    """
    flat: list[Any] = []
    described = iter(descriptors)
    for value in arguments:
        if hasattr(value, "block_shape"):
            flat += _descriptor_parameters(value, next(described, None))
        else:
            flat.append(value)
    return flat


def _descriptor_parameters(descriptor: Any, metadata: Mapping[str, Any] | None) -> list[Any]:
    """Returns what Triton's launcher passes for a host descriptor: a TMA map if there is TMA."""
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    nan = descriptor.padding == "nan"
    if metadata is None:
        first = [descriptor.base, *shape, *strides, nan, bool(descriptor.round_f32_to_tf32)]
    else:
        first = [
            TensorMap(
                descriptor.base, metadata["block_size"], shape, strides,
                swizzle=(0, 32, 64, 128)[metadata["swizzle"]], nan_fill=nan,
            )
        ]  # fmt: skip
    return [*first, *shape, *strides]


def compile_triton(
    kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], target: int,
    num_warps: int = 4, num_stages: int = 3, divisible_by_16: Sequence[str] | None = None,
    **options: Any,
) -> CompiledKernel:  # fmt: skip
    """Compiles a @triton.jit function for NVIDIA sm_<target>, as the JIT would at a launch.

    signature: run-time arguments and their types, e.g. {"q": "*fp16", "n": "i32", "scale": "fp32",
    "desc": "tensordesc<fp16[64,64]>"}. constexprs: the others; also integers that are 1 at run
    time, because the JIT makes constants of them. divisible_by_16: arguments that the JIT would
    find to be multiples of 16 (pointers: by address); launched values must keep that promise, or
    accesses go astray. Default: every pointer, no integer.

    The kernel is found again by its name in its module, in a process where Triton compiles.
    Raises RuntimeError with the message of the compiler.
    """
    if divisible_by_16 is None:
        divisible_by_16 = [name for name, kind in signature.items() if kind.startswith("*")]
    function = kernel.fn
    return compiling(
        _compile, (function.__module__, function.__name__), dict(signature), dict(constexprs),
        target, tuple(divisible_by_16),
        {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **options},
    )  # fmt: skip


def _compile(
    name: tuple[str, str], signature: Mapping[str, str], constexprs: Mapping[str, Any],
    target: int, divisible_by_16: Sequence[str], options: Mapping[str, Any],
) -> CompiledKernel:  # fmt: skip
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(name[0]), name[1])
    names = kernel.arg_names
    types = {n: "constexpr" if n in constexprs else signature[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible_by_16}
    source = ASTSource(kernel, types, dict(constexprs), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(options))
    metadata = compiled.metadata
    ptx = compiled.asm["ptx"]
    threads = int(ptx.split(".reqntid", 1)[1].split(None, 1)[0].rstrip(","))
    return CompiledKernel(
        metadata.name, target, ptx, metadata.shared, threads,
        tuple(n for n in names if n not in constexprs), metadata.global_scratch_size,
        tuple(getattr(metadata, "tensordesc_meta", None) or ()),
    )  # fmt: skip
