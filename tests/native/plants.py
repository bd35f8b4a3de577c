"""`make plants`: how many one-line faults, planted in the CPU kernels, `make smoke` catches.

Each row of PLANTS replaces a piece of one line of a kernel. The faults are typical of attention
kernels: the edge of a mask, a missing rescale, a ragged edge, a stride, the wrong head. The sources
are copied to build/plants, the fault is planted there, the best instruction set of this machine is
compiled, and the smoke tests run until the first failure. The command prints one line for each
fault with the tests that caught it, and exits with 1 if fewer than REQUIRED faults are caught. It
takes about half an hour on two cores. tests/cpu/test_sources.py checks that every row still fits
the sources.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "plants"
REQUIRED = 18


@dataclass(frozen=True)
class Plant:
    """`old`, which occurs once in csrc/cpu/`file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


PLANTS = [
    Plant(
        "mask edge: the causal diagonal hides one key too few",
        "masking.inl",
        "seq.diagonal_offset - p.window_right - m_start);",
        "seq.diagonal_offset - p.window_right - m_start - 1);",
    ),
    Plant(
        "mask edge: the left end of the window is off by one",
        "masking.inl",
        "seq.diagonal_offset + p.window_left - m_start + 1);",
        "seq.diagonal_offset + p.window_left - m_start);",
    ),
    Plant(
        "mask edge: the last tile of a causal block of queries is skipped",
        "masking.inl",
        "m_end + seq.diagonal_offset + p.window_right;",
        "m_end - 1 + seq.diagonal_offset + p.window_right;",
    ),
    Plant(
        "mask: a block of a shared mask that hides some keys counts as one that hides none",
        "masking.inl",
        "(least == 0 ? kHides : 0)",
        "(most == 0 ? kHides : 0)",
    ),
    Plant(
        "stride: a key padding mask is read as if its rows were contiguous",
        "masking.inl",
        "p.key_padding_mask + seq.b * p.key_padding_stride_b + n_start",
        "p.key_padding_mask + seq.b * p.Sk + n_start",
    ),
    Plant(
        "rescale: the row sum keeps its old maximum",
        "online_softmax.inl",
        "store(rows.sum + x * W, mul(load(rows.sum + x * W), alpha));",
        "store(rows.sum + x * W, load(rows.sum + x * W));",
    ),
    Plant(
        "rescale: the last column of the accumulator is forgotten",
        "attention_forward.inl",
        "rescale<T, kVectors>(p.Dv, t.rows.alpha, t.acc_t);",
        "rescale<T, kVectors>(p.Dv - 1, t.rows.alpha, t.acc_t);",
    ),
    Plant(
        "ragged edge: rows are converted in whole vectors only",
        "tiles.inl",
        "for (; i < count; ++i) dst[i] = load_element<T>(element(src, dtype, i * step), dtype);",
        "for (; i < count; ++i) dst[i] = (T)0;",
    ),
    Plant(
        "ragged edge: products over more than 128 terms drop the rest",
        "tiles.inl",
        "for (int64_t k = kMaxDepth; k < depth; k += kMaxDepth) {",
        "for (int64_t k = kMaxDepth; k + kMaxDepth <= depth; k += kMaxDepth) {",
    ),
    Plant(
        "lse: the sink is missing",
        "online_softmax.inl",
        "return (T)(all.top + __builtin_log(all.sum));",
        "return (T)((double)row_max + __builtin_log((double)row_sum));",
    ),
    Plant(
        "grouped heads: query heads take the keys of the wrong group",
        "attention_forward.inl",
        "const int64_t h_kv = h / (p.Hq / p.Hkv);",
        "const int64_t h_kv = h % p.Hkv;",
    ),
    Plant(
        "stride: ALiBi slopes of each batch entry are read as if they were shared",
        "scores.inl",
        "(T)p.alibi_slopes[tile.seq.b * p.alibi_stride_b + tile.h];",
        "(T)p.alibi_slopes[tile.h];",
    ),
    Plant(
        "pages: keys beyond the end of a page are read from the next one in memory",
        "sequence.inl",
        "min_of(columns, p.page_size - n % p.page_size);",
        "columns;",
    ),
    Plant(
        "softcap: its derivative is 1 - t instead of 1 - t^2",
        "scores.inl",
        "derivative = sub(one, mul(t, t));",
        "derivative = sub(one, t);",
    ),
    Plant(
        "dropout: the gradient of a kept probability is not scaled",
        "attention_backward.inl",
        "dp = select_bits(keep, mul(dp, kept_scale), zero);",
        "dp = select_bits(keep, dp, zero);",
    ),
    Plant(
        "backward: the gradient of lse has the wrong sign",
        "attention_backward.inl",
        "delta -=",
        "delta +=",
    ),
    Plant(
        "backward: one query split is left out of dk and dv",
        "attention_backward.inl",
        "for (int64_t split = 1; split < splits; ++split) {",
        "for (int64_t split = 2; split < splits; ++split) {",
    ),
    Plant(
        "split-KV: the sums of the splits are added without their weights",
        "attention_decode.inl",
        "row_sum += weight * (double)part.row_sum[r];",
        "row_sum += (double)part.row_sum[r];",
    ),
    Plant(
        "decode: the last visible key of every row is hidden",
        "attention_decode.inl",
        "unpadded & low_bits(keys.end - n)",
        "unpadded & low_bits(keys.end - n - 1)",
    ),
    Plant(
        "masked softmax: blocks of a long row are not brought to the maximum of the row",
        "masked_softmax.inl",
        "T block_factor = (T)(factor * power_from(top, t.blocks[b].reference));",
        "T block_factor = (T)factor;",
    ),
]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(COPY / "python")} | environment
    return subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)


def copy_sources() -> None:
    COPY.mkdir(parents=True, exist_ok=True)
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT)
    command = ["xargs", "-0", "cp", "-P", "--preserve=timestamps", "--parents", "-t", str(COPY)]
    subprocess.run(command, input=files, cwd=ROOT, check=True)


def build(isa: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    result = run(command, FUSED_ATTENTION_CUDA="0", FUSED_ATTENTION_ISAS=isa)
    if result.returncode != 0:
        sys.exit(f"the build failed:\n{result.stdout}{result.stderr}")


def smoke() -> list[str]:
    """The names of the smoke tests that fail."""
    result = run([sys.executable, "-m", "pytest", "-q", "-x", "tests/test_smoke.py"])
    failed = re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 0 and not failed:  # a crash is a catch, too
        failed = [f"exit status {result.returncode}"]
    return failed


def main() -> None:
    from fused_attention import _native

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only faults whose name contains one of these")
    options = parser.parse_args()
    plants = [x for x in PLANTS if not options.names or any(n in x.name for n in options.names)]
    isa = next(iter(_native.isas()))
    copy_sources()
    build(isa)
    if smoke():
        sys.exit("the smoke tests fail without a fault")
    caught = 0
    for plant in plants:
        source = COPY / "csrc" / "cpu" / plant.file
        text = source.read_text()
        begin = time.monotonic()
        source.write_text(text.replace(plant.old, plant.new))
        try:
            build(isa)
            failed = smoke()
        finally:
            source.write_text(text)
        caught += bool(failed)
        result = ", ".join(failed) or "MISSED"
        print(f"{plant.name} ({time.monotonic() - begin:.0f} s): {result}", flush=True)
    print(f"{isa}: {caught} of {len(plants)} caught")
    sys.exit(caught < min(REQUIRED, len(plants)))


if __name__ == "__main__":
    main()
