"""Compiles a `Launch` ahead of time, without a GPU, as Triton's JIT does when it is started."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_process import compiling


@dataclass(frozen=True)
class Pointer:
    """The properties of a tensor that the JIT looks at."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class CompiledLaunch:
    """Compiled code of a launch.

    parameters: the paths in `Launch.args` to the arguments that are not compiled in, in order.
    shared: bytes of dynamic shared memory per block. threads: per block. scratch: bytes of global
    memory per block. binary: a cubin or hsaco.
    """

    name: str
    assembly: str
    binary: bytes
    parameters: tuple[tuple[int, ...], ...]
    shared: int
    threads: int
    scratch: int
    descriptors: tuple[dict[str, Any], ...]

    def arguments(self, args: tuple[Any, ...]) -> list[Any]:
        """Returns the arguments of the compiled kernel, without its last two: scratch memory and a
        profile. A `TensorDescriptor` stands for several parameters, see `ptx/triton_compile.py`."""
        return [_at(args, path) for path in self.parameters]


def compile_launch(target: str, launch: Any) -> CompiledLaunch:
    """Compiles a launch; raises RuntimeError if it does not compile.

    target: a key of `tiles.ARCHS`. launch: a `fused_attention.kernels.launch.Launch` with tensors
    on any device.
    """
    function = launch.kernel.fn
    return compiling(
        _compile,
        target,
        (function.__module__, function.__name__),
        _without_data(launch.args),
        launch.constants,
        launch.options,
    )


def _without_data(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(x.dtype, x.data_ptr() % 4096)
    if isinstance(x, TensorDescriptor):
        return replace(x, base=_without_data(x.base))
    if isinstance(x, tuple):
        return (
            type(x)(*map(_without_data, x))
            if hasattr(x, "_fields")
            else tuple(map(_without_data, x))
        )
    return x


def _at(x: Any, path: tuple[int, ...]) -> Any:
    for i in path:
        x = x[i]
    return x


def _parameters(signature: Any, path: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if isinstance(signature, str):
        if signature != "constexpr":
            yield path
    else:
        for i, part in enumerate(signature):
            yield from _parameters(part, (*path, i))


def _compile(
    target: str, name: tuple[str, str], args: tuple[Any, ...], constants: Any, launch_options: Any
) -> CompiledLaunch:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    is_amd = target.startswith("gfx")
    gpu = (
        GPUTarget("hip", target, 64)
        if is_amd
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )
    function = getattr(importlib.import_module(name[0]), name[1])
    backend = make_backend(gpu)
    keywords = constants | launch_options
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, _ = bind(*args, **keywords)
    options, signature, constexprs, attributes = function._pack_args(
        backend, keywords, bound, specialization, None
    )
    source = ASTSource(function, signature, constexprs, attributes)
    kernel = triton.compile(source, target=gpu, options=options.__dict__)
    metadata = kernel.metadata
    return CompiledLaunch(
        metadata.name,
        kernel.asm["amdgcn" if is_amd else "ptx"],
        kernel.asm["hsaco" if is_amd else "cubin"],
        tuple(_parameters(tuple(signature.values())[: len(args)], ())),
        metadata.shared,
        metadata.num_warps * gpu.warp_size,
        0 if is_amd else metadata.global_scratch_size,
        tuple(getattr(metadata, "tensordesc_meta", None) or ()),
    )
