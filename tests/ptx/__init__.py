"""An interpreter for PTX, in numpy: it runs what Triton and nvcc emit, and judges every access.

    from ptx import launch
    report = launch(ptx_text, "kernel", grid=(4, 2), block=128, arguments=[q, k, out, 100, 0.125],
                    dynamic_shared=40960, schedule="lockstep")
    assert not report.findings, "\\n".join(map(str, report.findings))

Arguments are numpy arrays and torch CPU tensors (strided views too; outputs are written in place),
numbers, None and `TensorMap`s. For Triton:

    from ptx.triton_compile import compile_triton
    compiled = compile_triton(kernel, {"x": "*fp16", "n": "i32"}, {"BLOCK": 64}, target=80)
    report = compiled.launch(grid=(4,), arguments={"x": x, "n": n})

What is found, by `Finding.kind`:
- "out of bounds": bytes that no argument owns, with guard bytes around each, and between the rows
  of a strided view; shared and local memory beyond their exact size; "misaligned" accesses;
- "uninitialised shared memory": a read of bytes that nobody wrote;
- "shared race": accesses of two warps to one byte, one of them a write, with no barrier between;
  "lane race": the same for two lanes of a warp; "global race": for global memory;
- "overlapping global writes": two blocks write the same byte (atomics excepted);
- "missing async wait": bytes of cp.async, TMA or wgmma touched before the wait for them;
- "divergence": an instruction that needs the whole warp without the whole warp; "barrier": threads
  disagree about a barrier; "deadlock": nobody can run; "trap".
An opcode, modifier or directive that is not known raises PTXError and names it.

Limits. Only the path that the given arguments take is judged. Numbers are not bit-exact: matrix
products are summed in float64, approximate functions are correctly rounded, .ftz is ignored, fma
rounds twice in rare cases. Clocks are kept per warp: a release by one lane counts for its warp.
Atomics make no happens-before edge, so a semaphore between blocks is reported as a race; blocks of
different batches never run at the same time. No calls of device functions, clusters, distributed
shared memory, multicast, or tcgen05. The memory model within a warp is lockstep at one program
counter. Everything was written from the PTX ISA; agreement with float64 references on code of two
independent compilers is the evidence, and no GPU has confirmed it.
"""

from .machine import SCHEDULES, Finding, Report, launch
from .parser import PTXError
from .tensor_map import TensorMap

__all__ = ["SCHEDULES", "Finding", "PTXError", "Report", "TensorMap", "launch"]
