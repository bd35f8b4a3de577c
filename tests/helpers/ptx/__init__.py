"""An interpreter for PTX, in numpy: it runs the code of Triton and nvcc, and judges every access.

    from ptx import launch
    report = launch(ptx_text, "kernel", grid=(4, 2), block=128, arguments=[q, k, out, 100, 0.125],
                    dynamic_shared=40960, schedule="lockstep")
    assert not report.findings, "\\n".join(map(str, report.findings))

Arguments are numpy arrays and torch CPU tensors (strided views too; outputs are written in place),
numbers, None and `TensorMap`s. For Triton:

    from ptx.triton_compile import compile_triton
    compiled = compile_triton(kernel, {"x": "*fp16", "n": "i32"}, {"BLOCK": 64}, target=80)
    report = compiled.launch(grid=(4,), arguments={"x": x, "n": n})

Targets: sm_80 to sm_90, sm_120, and sm_100 without tcgen05.

A block takes 0.01 to 0.2 s. In lockstep all warps go together, so a missing barrier leaves the
result right, and only the finding shows it; "serial" and "reverse" let one warp run ahead.

Findings, by `Finding.kind`:
- "out of bounds": bytes that no argument owns, with guard bytes around each, and between the rows
  of a strided view; shared and local memory beyond their exact size; "misaligned" accesses;
- "uninitialised shared memory": a read of bytes that nobody wrote;
- "shared race": accesses of two warps to one byte, one of them a write, with no barrier between;
  "lane race": the same for two lanes of a warp; "global race": for global memory. Two threads that
  write the same value to shared memory are no race;
- "overlapping global writes": two blocks write the same byte (atomics excepted);
- "missing async wait": bytes of cp.async, bulk copies or wgmma, or registers of wgmma, touched
  before the wait for them; "missing wgmma fence": registers changed since the last wgmma.fence;
- "missing proxy fence": wgmma or a bulk store reads what a thread wrote, without fence.proxy.async;
- "divergence": an instruction that needs the whole warp without the whole warp; "barrier": threads
  disagree about a barrier or mbarrier; "deadlock": no thread can run; "trap".
An unknown opcode, modifier or directive raises a PTXError that names it.

Limits. Only the path that the given arguments take is judged.
- Numbers are not bit-exact: matrix products are summed in float64, TF32 operands are truncated,
  approximate functions are correctly rounded, .ftz is ignored, fma rounds twice in rare cases.
- An acquire by one lane counts for its warp, and so does a release for global memory; a release by
  one lane covers what the other lanes did in shared memory up to the last barrier at which they all
  met. Only the last lane of a warp that read a byte is remembered. Lanes run in lockstep while they
  are at the same instruction; warp instructions are expected to converge.
- Atomics and volatile accesses make no happens-before edge, so a semaphore between blocks is
  reported as a race, and one that spins may starve the block it waits for. Blocks beyond
  `machine.BATCH_THREADS` threads run one batch after the other.
- Copies take their source, and wgmma its operands, when they are issued; wgmma gives its result at
  once, and the findings say whether a thread looked at it too early. cp.async.mbarrier.arrive lands
  at once. A load by TMA lands only when all threads are blocked and one of them waits for it.
- No calls of device functions (so no device_assert, no printf), clusters, distributed shared
  memory, multicast, bulk reductions, im2col, sparse products, or tcgen05 (sm_100).
The interpreter was written from the PTX ISA. The evidence for it is agreement with float64
references on code of two independent compilers; no GPU has confirmed it.
"""

from .machine import SCHEDULES, Finding, Report, launch
from .parser import PTXError
from .tensor_map import TensorMap

__all__ = ["SCHEDULES", "Finding", "PTXError", "Report", "TensorMap", "launch"]
