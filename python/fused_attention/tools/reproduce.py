"""Writes scripts that reproduce a fault with torch alone.

A script draws the inputs of a case as `testing.make_inputs` does, calls the implementation, and
compares one result with the definition in float64, which it spells out. It prints the error and
exits with 1 if the result is wrong. The script for a probe has the probe's own source.
"""

from __future__ import annotations

import inspect
import re

import torch

from .contracts import MASKED_LSE, MASKED_ROWS, Probe, demanded
from .targets import Target
from .testing import Case, Error

HEAD = '''"""{title}

Exits with 1 if the result is wrong. Run it where the function can be imported."""

import math
import os
import sys
from functools import partial

import torch

sys.path.insert(0, os.getcwd())
{source}
'''

SDPA_CALL = """

def call(query, key, value, mask=None, bias=None, key_padding_mask=None, causal=False, **options):
    if key_padding_mask is not None:
        seen = ~key_padding_mask[:, None, None, :]
        mask = seen if mask is None else mask & seen
    if bias is not None:
        mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    return f(query, key, value, attn_mask=mask, is_causal=bool(causal), **options)
"""


def slug(name: str) -> str:
    """Returns a name that files may have."""
    return re.sub(r"\W+", "_", name).strip("_")[:60]


def assemble(title: str, target: Target, lines: list[str]) -> str:
    head = HEAD.format(title=title, source=target.source)
    if target.signature == "sdpa":
        head += SDPA_CALL
    return "\n".join([head, *lines, ""])


def probe_script(title: str, target: Target, probe: Probe) -> str:
    """Returns the script for a probe."""

    def without_types(signature: re.Match[str]) -> str:
        return re.sub(r": \w+", "", signature.group(1)) + ":"

    source = inspect.getsource(probe.check)
    source = re.sub(r"^(def .*\)) -> str \| None:", without_types, source)
    options = "".join(f", {name}={x!r}" for name, x in probe.options.items())
    arguments = f"{function_of(target)}, query, key, value{options}"
    lines = [
        *["", source, ""],
        *inputs(probe.case, gradients=False),
        f"fault = {probe.check.__name__}({arguments})",
        'print(fault or "right")',
        "raise SystemExit(fault is not None)",
    ]
    return assemble(title, target, lines)


def script(
    title: str, target: Target, case: Case, result: str, error: Error | None, contract: str
) -> str:
    """Returns the script for a case.

    result: what is compared, "out", "lse" or "dquery" and so on, or the name of an input, which
    must not be written to. error: says how large the error may be; None: about 0.
    """
    leaves = leaves_of(case)
    backward = result[1:] in leaves
    lines = inputs(case, gradients=backward)
    if backward:
        lines.append(f"leaf = {result[1:]}.requires_grad_()")
    if result in leaves:
        lines.append(f"before = {result}.clone()")
    returned, lse = ("got, got_lse", ", return_lse=True") if target.has_lse else ("got", "")
    call = f"{function_of(target)}(query, key, value{options(case)}{lse})"
    lines += ["", f"{returned} = {call}"]
    if result in leaves:
        lines += [
            f"written = not torch.equal({result}, before)",
            f'print("{result} was written to" if written else "right")',
            "raise SystemExit(written)",
        ]
        return assemble(title, target, lines)
    lines += ["", *definition(case, result[1:] if backward else None)]
    rows = MASKED_ROWS if result == "out" else MASKED_LSE
    if backward:
        outputs, incoming = ["out"], ["grad_out"]
        if target.has_lse and result != "dvalue":  # fully masked rows have no gradient
            lines.append("grad_lse = grad_lse.masked_fill(lse.isinf(), 0.0)")
            outputs, incoming = ["out", "lse"], ["grad_out", "grad_lse"]
        for name, prefix, leaf in (("want", "", "exact"), ("got", "got", "leaf")):
            ys = [f"{prefix}_{y}".removesuffix("_out") if prefix else y for y in outputs]
            dys = [f"{dy}.to({y}.dtype)" for y, dy in zip(ys, incoming, strict=True)]
            joined = f"[{', '.join(ys)}], {leaf}, [{', '.join(dys)}]"
            lines.append(f"({name},) = torch.autograd.grad({joined})")
    else:
        lines.append(f"want = {result}" + "\ngot = got_lse" * (result == "lse"))
        if rows not in demanded(contract) and not case.sinks:
            last = ", keepdim=True" if result == "out" else ""
            lines.append(f"blind = ~seen.any(-1{last})  # fully masked rows are not compared")
            lines.append("got, want = got.masked_fill(blind, 0.0), want.masked_fill(blind, 0.0)")
    wide = str(torch.promote_types(case.dtype, torch.float32))
    dtype = wide if result in ("lse", "dsinks") else "leaf.dtype" if backward else "query.dtype"
    allowed = error.allowed if error is not None and error.measure in ("max", "rms") else 1e-2
    measure = "square().mean().sqrt()" if error and error.measure == "rms" else "abs().max()"
    lines += [
        "",
        "assert got.shape == want.shape, (got.shape, want.shape)",
        f"assert got.dtype == {dtype}, got.dtype",
        "difference = torch.where(got == want, 0.0, got.double() - want)",
        f"error, allowed = difference.{measure}.item(), {allowed:.3g}",
        f'print(f"{result}: error {{error:.3g}}, allowed {{allowed:.3g}}")',
        "raise SystemExit(not error <= allowed)",
    ]
    return assemble(title, target, lines)


def function_of(target: Target) -> str:
    return "call" if target.signature == "sdpa" else "f"


def leaves_of(case: Case) -> list[str]:
    return ["query", "key", "value"] + ["bias"] * bool(case.bias) + ["sinks"] * case.sinks


def inputs(case: Case, gradients: bool) -> list[str]:
    """Returns the lines that draw the tensors of a case, in the order of `make_inputs`."""
    wide = torch.promote_types(case.dtype, torch.float32)
    lines = [
        f"generator = torch.Generator().manual_seed({case.seed})",
        "\n",
        f"def randn(*shape, dtype={case.dtype}):",
        "    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)",
        "\n",
        f"query = randn({case.B}, {case.Hq}, {case.Sq}, {case.D})",
        f"key = randn({case.B}, {case.Hkv}, {case.Sk}, {case.D})",
        f"value = randn({case.B}, {case.Hkv}, {case.Sk}, {case.Dv})",
    ]

    def shape(letters: str) -> str:
        return ", ".join(map(str, case.broadcast_shape(letters)))

    for name in ("query", "key", "value"):
        if case.memory_format == "BSHD":
            lines.append(f"{name} = {name}.transpose(1, 2).contiguous().transpose(1, 2)")
        if case.memory_format == "strided":
            lines.append(f"{name} = torch.stack([{name}, {name}], -1).flatten(-2)[..., ::2]")
    if case.bias:
        lines.append(f"bias = randn({shape(case.bias)}, dtype={case.bias_dtype or case.dtype})")
    if case.sinks:
        lines.append(f"sinks = randn({case.Hq}, dtype={wide})")
    if case.mask:
        drawn = f"torch.rand({shape(case.mask)}, generator=generator)"
        lines.append(f"mask = {drawn} >= 0.4  # True: visible")
    if case.key_padding:
        drawn = f"torch.rand({shape('BK')}, generator=generator)"
        lines.append(f"key_padding_mask = {drawn} < 0.3  # True: hidden")
    if case.alibi:
        lines.append(f"alibi_slopes = torch.rand({shape(case.alibi)}, generator=generator)")
    if case.dropout_p:
        lines.append(f"philox_seed = torch.tensor([{0x123456789ABCDEF + case.seed}, 5])")
    if gradients:
        lines.append(f"grad_out = randn({case.B}, {case.Hq}, {case.Sq}, {case.Dv})")
        lines.append(f"grad_lse = randn({shape('BHQ')}, dtype={wide})")
    return lines


def options(case: Case) -> str:
    """Returns the keywords of the call as text."""
    tensors = {
        "mask": case.mask,
        "bias": case.bias,
        "key_padding_mask": case.key_padding,
        "alibi_slopes": case.alibi,
        "sinks": case.sinks,
        "philox_seed": case.dropout_p,
    }
    texts = [f", {name}={name}" for name, is_used in tensors.items() if is_used]
    for name in ("causal", "diagonal", "window_size", "scale", "softcap", "dropout_p"):
        if getattr(case, name) != getattr(Case(), name):
            texts.append(f", {name}={getattr(case, name)!r}")
    return "".join(texts)


def definition(case: Case, differentiated: str | None) -> list[str]:
    """Returns the lines that compute out and lse in float64, from `exact` for the named input."""
    sizes = f"{case.B}, {case.Hq}, {case.Sq}, {case.Sk}"
    group = case.Hq // case.Hkv
    left, right = case.window_size
    off = case.offset
    lines = ["# The definition, in float64"]
    if differentiated:
        lines.append(f"exact = {differentiated}.detach().double().requires_grad_()")

    def double(name: str) -> str:
        return "exact" if name == differentiated else f"{name}.detach().double()"

    repeat = f".repeat_interleave({group}, 1)" if group > 1 else ""
    scale = f"{case.D} ** -0.5" if case.scale is None else repr(case.scale)
    lines += [
        f"q = {double('query')}",
        f"k = {double('key')}{repeat}",
        f"v = {double('value')}{repeat}",
        f"i, j = torch.arange({case.Sq}).view(-1, 1){f' + {off}' * bool(off)},"
        f" torch.arange({case.Sk})",
        f"seen = torch.ones({sizes}, dtype=torch.bool)",
    ]
    visibility = {
        "(j <= i)": case.causal,
        f"(j >= i - {left})": left >= 0,
        f"(j <= i + {right})": right >= 0,
        "mask": case.mask,
        "~key_padding_mask[:, None, None, :]": case.key_padding,
    }
    lines += [f"seen = seen & {text}" for text, is_used in visibility.items() if is_used]
    lines.append(f"s = {scale} * (q @ k.mT)")
    if case.softcap:
        lines.append(f"s = {case.softcap} * torch.tanh(s / {case.softcap})")
    if case.bias:
        lines.append(f"s = s + {double('bias')}")
    if case.alibi:
        lines.append(f"slopes = alibi_slopes.double().view(-1, {case.Hq}, 1, 1)")
        lines.append("s = s - slopes * (i - j).abs()")
    lines.append("s = s.masked_fill(~seen, -math.inf)")
    if case.sinks:
        rows = f"{case.B}, {case.Hq}, {case.Sq}, 1"
        lines.append(f"sink = {double('sinks')}.view(-1, 1, 1).expand({rows})")
        lines.append("s = torch.cat([s, sink], -1)")
    lines += ["lse = s.logsumexp(-1)", f"p = s.softmax(-1)[..., :{case.Sk}]"]
    lines.append("p = torch.where(seen.any(-1, keepdim=True), p, 0.0)")
    if case.dropout_p:
        factor = 65536 / max(65536 - round(case.dropout_p * 65536), 1)
        lines += [
            "from fused_attention.reference import dropout_keep_mask  # the bits of this library",
            "",
            f"keep = dropout_keep_mask(philox_seed, {case.dropout_p}, {sizes})",
            f"p = torch.where(keep, {factor!r} * p, 0.0)",
        ]
    return [*lines, "out = p @ v"]
