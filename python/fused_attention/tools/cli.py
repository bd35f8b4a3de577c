"""The command line: python -m fused_attention COMMAND.

doctor    prints what this machine and build have; exits with 0 if a fast backend is usable here,
          else with 1
explain   prints what serves a call of a given shape, and why each preferred backend refuses it
record    runs a script, and prints what served its calls of attention, and why; exits as the script
features  prints the capability table in Markdown
verify    runs the correctness matrix on our kernels or another function; exits with 0 if all
          is right, 1 if something is wrong, 2 if nothing could be checked, 130 if interrupted
bench     times our kernels, other libraries and another function on tables of cases; exits with 0
          if all results are right, 1 if one is wrong, 130 if interrupted. bench compare: two runs
tune      measures the fastest tile sizes on this GPU, and prints them as rows of kernels/tiles.py

The commands fetch, train, translate, summarize, generate, transcribe and embed are in
model_commands.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _native
from ..call import backends
from ..call.backends import BACKENDS, REFERENCE, feature_table
from ..call.explain import explain
from ..call.options import DEFAULTS as OPTIONS
from ..call.problem import DTYPES
from ..errors import ArgumentTypeError, ArgumentValueError
from ..operators._torch import fake_tensors
from .console import write_json
from .contracts import CHOICE, LEVELS
from .model_commands import CommandError, add_commands

ENVIRONMENT_VARIABLES = (
    "FUSED_ATTENTION_BACKEND",
    "FUSED_ATTENTION_STRICT",
    "FUSED_ATTENTION_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
)
CLOSED = 128 + 13  # the exit code of a program that SIGPIPE has ended
NUMBERS = {name: x for name, x in OPTIONS._asdict().items() if isinstance(x, float)}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
SHORT_NAMES |= {"float": "float32", "half": "float16", "double": "float64"}


# -- doctor ------------------------------------------------------------------------------


def diagnose() -> dict[str, Any]:
    """Returns what `doctor` prints, as data."""
    return {
        "fused_attention": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": {
            "isas_compiled": _native.compiled_isas(),
            "isas_usable": _native.isas(),
            "isa_active": _native.active_isa(),
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "build": _native.build_info(),
        "backends": {
            row.name: {"usable": not row.missing(), "reason": row.missing()} for row in BACKENDS
        },
        "environment": {
            name: os.environ[name] for name in ENVIRONMENT_VARIABLES if name in os.environ
        },
    }


def print_diagnosis(report: dict[str, Any]) -> None:
    cpu, build = report["cpu"], report["build"]
    lines = {
        "fused_attention": report["fused_attention"],
        "torch": f"{report['torch']} (CPU capability {cpu['torch_capability']})",
        "python": f"{report['python']} on {report['platform']}",
        "CPU ISAs": f"{cpu['isa_active']} in force; usable {', '.join(cpu['isas_usable'])}; "
        f"compiled {', '.join(cpu['isas_compiled'])}",
        "threads": cpu["threads"],
        "build": f"{build['compiler']}, for torch >= {build['torch_target_version']}",
    }
    for name, state in report["backends"].items():
        lines[f"backend {name}"] = "usable" if state["usable"] else state["reason"]
    for name, value in report["environment"].items():
        lines[name] = value
    for title, text in lines.items():
        print(f"{title:<24}{text}")


def doctor(arguments: argparse.Namespace) -> int:
    report = diagnose()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_diagnosis(report)
    backends.requested("auto")  # raises if FUSED_ATTENTION_BACKEND is invalid
    usable = [name for name, state in report["backends"].items() if state["usable"]]
    return 0 if usable != [REFERENCE.name] else 1


# -- explain -----------------------------------------------------------------------------


def size(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a size, got {text!r}")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    return tuple(size(part) for part in text.split(","))


def thread_counts(text: str) -> list[int]:
    counts = text.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise argparse.ArgumentTypeError(f"expected numbers >= 1 such as 2 or 1,2,4, got {text!r}")
    return [int(count) for count in counts]


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a percentage >= 0, got {text!r}")
    return value


def new_file(text: str) -> str:
    """Checks the path now, rather than after minutes of work."""
    folder = os.path.dirname(text) or "."
    if not os.path.isdir(folder) or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return text


def existing_file(text: str) -> str:
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"expected a file that exists, got {text!r}")
    return text


def folder(text: str) -> Path:
    if os.path.exists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")
    return Path(text)


def dtype_name(text: str) -> str:
    return SHORT_NAMES.get(text, text)


def query_shape(text: str) -> tuple[int, ...]:
    if len(shape(text)) != 4:
        raise argparse.ArgumentTypeError(f"expected four sizes B,Hq,Sq,D, got {text!r}")
    return shape(text)


def device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def usable_device(text: str) -> str:
    """Returns the device's name, after a tensor has been made there."""
    try:
        torch.empty(1, device=device(text)).item()
    except Exception as error:  # by device: RuntimeError, AssertionError, NotImplementedError
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return text


def explain_shape(arguments: argparse.Namespace) -> int:
    batch, heads_q, seqlen_q, head_dim = arguments.shape
    heads_kv = heads_q if arguments.kv_heads is None else arguments.kv_heads
    seqlen_k = seqlen_q if arguments.sk is None else arguments.sk
    head_dim_v = head_dim if arguments.dv is None else arguments.dv
    dtype = DTYPE_NAMES[arguments.dtype]
    with fake_tensors():  # shapes without memory

        def tensor(*shape: int, dtype: torch.dtype = dtype, grad: bool = False) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=arguments.device, requires_grad=grad)

        options: dict[str, Any] = {
            "causal": arguments.causal or False,
            "diagonal": arguments.diagonal,
            "window_size": tuple(arguments.window),
            "return_lse": arguments.lse,
            "backend": arguments.backend,
            **{name: getattr(arguments, name) for name in NUMBERS},
        }
        if arguments.mask:
            options["mask"] = tensor(*arguments.mask, dtype=torch.bool)
        if arguments.bias:
            options["bias"] = tensor(*arguments.bias, grad=arguments.bias_grad)
        if arguments.key_padding:
            options["key_padding_mask"] = tensor(batch, seqlen_k, dtype=torch.bool)
        if arguments.alibi:
            options["alibi_slopes"] = tensor(heads_q, dtype=torch.float32)
        if arguments.sinks:
            options["sinks"] = tensor(heads_q, dtype=torch.float32)
        explanation = explain(
            tensor(batch, heads_q, seqlen_q, head_dim, grad=arguments.grad),
            tensor(batch, heads_kv, seqlen_k, head_dim, grad=arguments.grad),
            tensor(batch, heads_kv, seqlen_k, head_dim_v, grad=arguments.grad),
            **options,
        )
    print(explanation)
    return 0


def record(arguments: argparse.Namespace) -> int:
    from . import console
    from .record import run_recorded

    code, calls = run_recorded(arguments.script, arguments.arguments)
    print(calls.table())
    console.write_text("--json", arguments.json, calls.to_json() + "\n")
    return code


def features(arguments: argparse.Namespace) -> int:
    print(feature_table())
    return 0


# -- verify and bench ------------------------------------------------------------------


def verify(arguments: argparse.Namespace) -> int:
    from . import console, foreign, targets, verify

    if arguments.impl:
        if arguments.backend or arguments.isa:
            raise ArgumentValueError("--impl: expected without --backend and --isa, which are ours")
        implementation = foreign.load(arguments.impl, arguments.signature)
        implementations = [targets.foreign_target(implementation)]
    else:
        implementations = targets.own_targets(arguments.backend, arguments.isa)
    checks = verify.selected(arguments.quick, cases=arguments.case, skip=arguments.skip)
    with console.progress(len(checks)) as step:
        reports = verify.verify(
            implementations,
            checks,
            contract=arguments.contract,
            backward=not arguments.forward_only,
            allow=arguments.allow,
            step=step,
        )
    for report in reports:
        print(report)
    if arguments.repro:
        for file in verify.write_reproductions(arguments.repro, implementations, reports):
            print(f"wrote {file}")
    interrupted = any(report.interrupted for report in reports)
    wrong = any(report.faults for report in reports)
    nothing = not any(report.calls for report in reports)
    code = 130 if interrupted else 1 if wrong else 2 if nothing else 0
    document: dict[str, Any] = {"passed": code == 0, "interrupted": interrupted}
    document |= {"targets": [report.as_json() for report in reports], "machine": diagnose()}
    write_json(arguments.json, document)
    return code


def bench(arguments: argparse.Namespace) -> int:
    from . import console, foreign
    from .benchmark import bench, peers, report, suites

    tables = suites.chosen(arguments.suite, arguments.quick)
    if arguments.device != "cpu":
        suites.require_attention(tables)
    implementation = None
    if arguments.impl:
        implementation = foreign.load(arguments.impl, arguments.signature)
    if arguments.png:
        report.require_matplotlib()
    counts = arguments.threads or [torch.get_num_threads()]
    with console.progress(bench.PASSES * len(counts) * sum(map(len, tables.values()))) as step:
        result = bench.bench(
            tables,
            peers.bench_peers(implementation),
            seconds=arguments.seconds or (1.0 if arguments.quick else 3.0),
            threads=counts,
            device=arguments.device,
            step=step,
        )
    print(console.marked(report.as_text(result, console.width()), "WRONG"))
    write_json(arguments.json, report.as_json(result))
    console.write_text("--markdown", arguments.markdown, report.as_markdown(result))
    console.write_text("--html", arguments.html, report.as_html(result))
    if arguments.png:
        report.save_png(result, arguments.png)
    if result.interrupted:
        return 130
    judged = {peers.OURS, implementation.name if implementation else ""}
    return 1 if any(m.peer in judged for m in result.wrong) else 0


def bench_compare(arguments: argparse.Namespace) -> int:
    from . import console
    from .benchmark import compare

    before, after = (compare.read(path) for path in arguments.reports)
    changes = compare.changes(before, after)
    print(compare.as_text(changes, before, after, arguments.threshold, console.width()))
    return 1 if any(change.slower_by(arguments.threshold) for change in changes) else 0


def tune(arguments: argparse.Namespace) -> int:
    from . import tune

    device, dtype = tune.require_gpu(), DTYPE_NAMES[arguments.dtype]
    from ..kernels.tiles import arch_of

    results = tune.tune(dtype, arguments.head_dims)
    arch = arch_of(device).name
    print(f"\nFor _TABLE in kernels/tiles.py ({torch.cuda.get_device_name(device)}):\n")
    print(tune.rows(results, arch, dtype.itemsize))
    document = {"arch": arch, "dtype": arguments.dtype, "tiles": tune.report(results)}
    write_json(arguments.json, {**document, "machine": diagnose()})
    return 0


# -- main --------------------------------------------------------------------------------


def add_implementation(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--impl", metavar="MODULE:FUNCTION", help="another function to run; see --signature")
    add("--signature", choices=("attention", "sdpa"), help="how to call --impl; else inspected")
    add("--json", type=new_file, metavar="FILE", help="write the result to this file")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m fused_attention", description="Inspects, checks and times attention."
    )
    commands = top.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("doctor", help="shows what this machine and build have")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=doctor)

    command = commands.add_parser("explain", help="shows what serves a call, and why")
    add = command.add_argument
    add("--shape", type=query_shape, required=True, metavar="B,Hq,Sq,D", help="shape of query")
    add("--kv-heads", type=size, metavar="Hkv", help="key heads; default: Hq")
    add("--sk", type=size, metavar="Sk", help="keys; default: Sq")
    add("--dv", type=size, metavar="Dv", help="value's head_dim; default: D")
    add("--dtype", type=dtype_name, choices=DTYPE_NAMES, default="float32")
    add("--device", type=device, default="cpu")
    add("--causal", choices=("top_left", "bottom_right"), nargs="?", const="top_left")
    add("--diagonal", choices=("top_left", "bottom_right"), help="of a window without causal")
    add("--window", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"))
    for name, default in NUMBERS.items():
        add("--" + name.replace("_", "-"), type=float, default=default)
    add("--mask", type=shape, metavar="SHAPE", help="of a boolean mask, such as 1,1,128,128")
    add("--bias", type=shape, metavar="SHAPE", help="of an additive bias")
    add("--bias-grad", action="store_true", help="the bias needs a gradient")
    add("--key-padding", action="store_true")
    add("--alibi", action="store_true")
    add("--sinks", action="store_true")
    add("--grad", action="store_true", help="query, key and value need gradients")
    add("--lse", action="store_true", help="return_lse")
    add("--backend", default="auto")
    command.set_defaults(run=explain_shape)

    command = commands.add_parser("record", help="what served the calls of a script, and why?")
    add = command.add_argument
    add("--json", type=new_file, metavar="FILE", help="write the table to this file too")
    add("script", type=existing_file, metavar="SCRIPT", help="run as python SCRIPT")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")
    command.set_defaults(run=record)

    command = commands.add_parser("features", help="prints the capability table in Markdown")
    command.set_defaults(run=features)

    command = commands.add_parser("verify", help="is it right? runs the correctness matrix")
    add = command.add_argument
    add("--quick", action="store_true", help="single features and pairs only")
    add("--backend", help="check only this backend")
    add("--isa", help="check only this instruction set of the backend cpu")
    add("--forward-only", action="store_true", help="no gradients")
    add(
        "--contract",
        choices=LEVELS,
        metavar="CONTRACT",
        help=f"what is demanded: {CHOICE}",
    )
    repeated: dict[str, Any] = {"action": "append", "default": []}
    add("--case", **repeated, metavar="ID", help="run only this case, such as pair/7; repeatable")
    add("--skip", **repeated, metavar="FEATURE", help="leave out a feature or dtype; repeatable")
    add("--allow", **repeated, metavar="ID", help="a case that may fail; repeatable")
    add("--repro", type=folder, metavar="DIR", help="write a script for each fault: DIR/FAULT.py")
    add_implementation(command)
    command.set_defaults(run=verify)

    command = commands.add_parser(
        "bench",
        help="how fast is it? times ours beside others",
        epilog="bench compare A.json B.json compares two files of --json. Exit codes: 0 all results"
        " are right, 1 one is wrong, 2 invalid arguments, 130 interrupted.",
    )
    add = command.add_argument
    add("--quick", action="store_true", help="small cases, under three minutes")
    names = "forward, backward, decode, varlen, masks, softmax, training, models or frontend"
    add("--suite", action="append", default=[], metavar="SUITE", help=f"{names}; may be repeated")
    add("--seconds", type=seconds, help="spent on each case; default: 3, or 1 with --quick")
    add("--threads", type=thread_counts, metavar="N[,N...]", help="default: those of torch")
    add("--device", type=usable_device, default="cpu", help="default: cpu")
    add_implementation(command)
    add("--markdown", type=new_file, metavar="FILE", help="write a table for a pull request")
    add("--html", type=new_file, metavar="FILE", help="write a page with bars")
    add("--png", type=new_file, metavar="FILE", help="write a picture, by matplotlib")
    command.set_defaults(run=bench)
    actions = command.add_subparsers(metavar="[compare]")
    command = actions.add_parser("compare", help="compares two files of --json")
    add = command.add_argument
    add("reports", nargs=2, metavar="FILE", help="A.json B.json, which bench --json has written")
    add("--threshold", type=percentage, default=5.0, help="slowdown that fails, in %%; default: 5")
    command.set_defaults(run=bench_compare)

    command = commands.add_parser("tune", help="measures the fastest tile sizes on this GPU")
    add = command.add_argument
    add("--dtype", type=dtype_name, choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--head-dims", type=int, nargs="+", choices=(64, 128, 256), default=(64, 128, 256))
    add("--json", type=new_file, metavar="FILE", help="write the result to this file")
    command.set_defaults(run=tune)

    add_commands(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    top = parser()
    arguments = top.parse_args(argv)
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (ArgumentValueError, ArgumentTypeError, NotImplementedError) as error:
        top.exit(2, f"{top.prog}: {error}\n")
    except CommandError as error:
        top.exit(1, f"{top.prog}: {error}\n")
