"""Parses PTX text to a `Kernel`: registers, variables, and instructions with flat targets.

Scopes (`{ .reg .pred p; again: … }`, as inline assembly makes them) are resolved here: a register
or label of an inner scope gets its own number. The syntax is that of the PTX ISA 9.x, chapters 4
and 5, as far as Triton and nvcc emit it.
"""

from __future__ import annotations

import bisect
import functools
import re
from dataclasses import dataclass, field
from typing import Any

TYPE_BITS = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 128,
    "f16": 16,
    "bf16": 16,
    "f32": 32,
    "tf32": 32,
    "f64": 64,
    "f16x2": 32,
    "bf16x2": 32,
    "f32x2": 64,
}


class PTXError(Exception):
    """The text, or something in it, is not known to this interpreter."""


@dataclass(frozen=True)
class Register:
    index: int
    negated: bool = False  # only predicates


@dataclass(frozen=True)
class Immediate:
    value: int | float
    bits: int | None = None  # set for 0f… (32) and 0d… (64): `value` is then the bit pattern


@dataclass(frozen=True)
class Symbol:
    """A special register (`%tid.x`), a variable or a parameter whose address is taken."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; in a tensor copy also `[base, {coordinates}]`."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """`%r1|%p1`: two results, of shfl and setp."""

    first: Any
    second: Any


SINK = Symbol("_")


@dataclass
class Instruction:
    opcode: str  # fully qualified: "ld.global.v4.b32"
    base: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: list[Any]
    guard: Register | None
    location: tuple[int, int] | None  # number of the file, line: from .loc
    line: int  # of the PTX text
    target: int | None = None  # of a branch: index of an instruction

    @property
    def types(self) -> list[str]:
        return [m for m in self.modifiers if m in TYPE_BITS]


@dataclass
class Variable:
    name: str
    space: str
    size: int
    align: int
    type: str
    data: bytes | None = None


@dataclass
class Kernel:
    name: str
    target: str
    parameters: list[Variable] = field(default_factory=list)
    register_types: list[str] = field(default_factory=list)
    register_names: list[str] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: set[int] = field(default_factory=set)  # indices that a branch can reach
    files: dict[int, str] = field(default_factory=dict)
    required_threads: int | None = None

    def where(self, instruction: Instruction) -> str:
        """Returns file:line of the source if .loc gave one, and the line of the PTX text."""
        source = ""
        if instruction.location:
            number, line = instruction.location
            source = f"{self.files.get(number, '?').rsplit('/', 1)[-1]}:{line}, "
        return f"{source}PTX line {instruction.line}: {instruction.opcode}"


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
_STATEMENT = re.compile(
    r"\s*(?:(?P<loc>\.loc\s[^\n]*)|(?P<brace>[{}])|(?P<label>[\w$]+)\s*:(?!:)|(?P<text>[^;]+);)",
    re.S,
)
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local|param)\s+(?:\.align\s+(?P<align1>\d+)\s+)?\.(?P<type>\w+)"
    r"(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?(?:\s+\.align\s+\d+)?\s+(?P<name>[\w$]+)"
    r"\s*(?P<array>\[\s*(?P<count>\d*)\s*\])?(?:\s*=\s*(?P<init>.*))?",
    re.S,
)
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)


@functools.lru_cache(maxsize=8)  # the same text is run under several schedules
def parse(text: str, kernel_name: str | None = None) -> Kernel:
    """Returns the kernel of that name (default: the only one); it is cached: do not change it."""
    text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    entries = {match.group(1): match for match in _ENTRY.finditer(text)}
    if kernel_name is None and len(entries) == 1:
        kernel_name = next(iter(entries))
    if kernel_name not in entries:
        raise PTXError(f"kernel {kernel_name!r}: the text has {sorted(entries)}")
    target = re.search(r"\.target\s+(\w+)", text)
    kernel = Kernel(kernel_name, target.group(1) if target else "")
    for number, path in re.findall(r'\.file\s+(\d+)\s+((?:"[^"]*"\s*)+)', text):
        kernel.files[int(number)] = "/".join(re.findall(r'"([^"]*)"', path))
    parameters_start = entries[kernel_name].end()
    parameters_end = text.index(")", parameters_start)
    for part in _split(text[parameters_start:parameters_end]):
        kernel.parameters.append(_variable(part))
    body_start = text.index("{", parameters_end)
    threads = re.search(
        r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", text[parameters_end:body_start]
    )
    if threads:
        x, y, z = (int(n or 1) for n in threads.groups())
        kernel.required_threads = x * y * z
    module_level = re.sub(r"\.(?:visible|extern|weak|common)\b", "", text[: _first_body(text)])
    for match in re.finditer(r"(?<![\w.])\.(?:shared|global|const)\s[^;]*;", module_level):
        variable = _variable(match.group()[:-1])
        kernel.variables[variable.name] = variable
    _Body(kernel, text, body_start).parse()
    return kernel


def _first_body(text: str) -> int:
    match = re.search(r"\.(?:entry|func)\b", text)
    return match.start() if match else len(text)


def _variable(text: str) -> Variable:
    match = _VARIABLE.search(text)
    if not match:
        raise PTXError(f"declaration not understood: {text.strip()!r}")
    bits = TYPE_BITS.get(match["type"])
    if bits is None:
        raise PTXError(f"type .{match['type']} in {text.strip()!r}")
    count = int(match["count"] or 0) if match["array"] else 1
    align = re.search(r"\.align\s+(\d+)\s+\.\w+\s+[\w$]+", text)
    size = bits // 8 * count
    data = None
    if match["init"]:
        values = [int(v, 0) for v in re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", match["init"])]
        data = b"".join((v % (1 << bits)).to_bytes(bits // 8, "little") for v in values).ljust(
            size, b"\0"
        )
    return Variable(
        match["name"], match["space"], size, int(align.group(1)) if align else bits // 8,
        match["type"], data,
    )  # fmt: skip


def _split(text: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


class _Body:
    def __init__(self, kernel: Kernel, text: str, start: int):
        self.kernel, self.text, self.start = kernel, text, start
        self.newlines = [i for i, char in enumerate(text) if char == "\n"]
        self.registers: list[dict[str, int]] = []  # one a scope, innermost last
        self.branches: list[tuple[Instruction, str, list[int]]] = []
        self.scopes: list[int] = []
        self.labels: dict[tuple[int, str], int] = {}  # (scope, name) -> index of an instruction

    def parse(self) -> None:
        position, location, scope_count = self.start, None, 0
        while True:
            match = _STATEMENT.match(self.text, position)
            if not match:
                raise PTXError(f"line {self._line(position)}: the body of the kernel does not end")
            position = match.end()
            if match["loc"]:
                numbers = re.findall(r"\d+", match["loc"])
                location = (int(numbers[0]), int(numbers[1]))
            elif match["brace"] == "{":
                self.registers.append({})
                self.scopes.append(scope_count)
                scope_count += 1
            elif match["brace"]:
                self.registers.pop()
                self.scopes.pop()
                if not self.scopes:
                    break
            elif match["label"]:
                self.labels[self.scopes[-1], match["label"]] = len(self.kernel.code)
            else:
                self._statement(match["text"].strip(), location, self._line(match.start("text")))
        for instruction, name, scopes in self.branches:
            found = [self.labels[s, name] for s in reversed(scopes) if (s, name) in self.labels]
            if not found:
                raise PTXError(f"line {instruction.line}: no label {name}")
            instruction.target = found[0]
            self.kernel.labels.add(found[0])

    def _line(self, position: int) -> int:
        return bisect.bisect_left(self.newlines, position) + 1

    def _statement(self, text: str, location: tuple[int, int] | None, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith((".shared", ".local")):
            variable = _variable(text)
            self.kernel.variables[variable.name] = variable
        elif text.startswith(".pragma"):
            pass  # loop unrolling hints
        elif text.startswith("."):
            raise PTXError(f"line {line}: directive {text.split()[0]}")
        else:
            self._instruction(text, location, line)

    def _declare(self, text: str) -> None:
        match = _REGISTER.match(text)
        assert match, text
        kind, names = match.groups()
        for name in _split(names):
            numbered = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for n in range(int(numbered.group(2))) if numbered else [None]:
                full = f"{numbered.group(1)}{n}" if numbered else name
                self.registers[-1][full] = len(self.kernel.register_types)
                self.kernel.register_types.append(kind)
                self.kernel.register_names.append(full)

    def _instruction(self, text: str, location: tuple[int, int] | None, line: int) -> None:
        guard = None
        if text.startswith("@"):
            name, text = text[1:].split(None, 1)
            guard = self._operand(name)
            if not isinstance(guard, Register):
                raise PTXError(f"line {line}: guard {name}")
        opcode, _, rest = text.partition(" ") if " " in text else text.partition("\t")
        head = re.match(r"\S+", text)
        assert head
        opcode, rest = head.group(), text[head.end() :]
        base, *modifiers = opcode.split(".")
        try:
            operands = [] if base == "bra" else [self._operand(part) for part in _split(rest)]
        except PTXError as error:
            raise PTXError(f"line {line}: opcode {opcode} is not known ({error})") from error
        instruction = Instruction(opcode, base, tuple(modifiers), operands, guard, location, line)
        if base == "bra":
            self.branches.append((instruction, rest.strip(), list(self.scopes)))
        self.kernel.code.append(instruction)

    def _operand(self, text: str) -> Any:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if text.startswith("!"):
            return Register(self._operand(text[1:]).index, negated=True)
        for scope in reversed(self.registers):
            if text in scope:
                return Register(scope[text])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16), 64)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(
                int(text.rstrip("U"), 0) if not re.fullmatch(r"0\d+", text) else int(text, 8)
            )
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
            return Immediate(float(text))
        offset = re.fullmatch(r"([\w$%.]+?)\s*([+-])\s*(-?\d+)", text)
        if offset:
            sign = -1 if offset.group(2) == "-" else 1
            return Symbol(offset.group(1), sign * int(offset.group(3)))
        if re.fullmatch(r"[\w$%.]+", text):
            return Symbol(text)
        raise PTXError(f"operand not understood: {text!r}")

    def _address(self, text: str) -> Address:
        parts = _split(text)
        coordinates: tuple[Any, ...] = ()
        if len(parts) > 1:
            vector = self._operand(parts[1])
            if not isinstance(vector, Vector):
                raise PTXError(f"address not understood: [{text}]")
            coordinates = vector.items
        match = re.fullmatch(r"([\w$%]+?)\s*(?:([+-])\s*(-?(?:0x[0-9a-fA-F]+|\d+)))?", parts[0])
        if not match:
            raise PTXError(f"address not understood: [{text}]")
        offset = int(match.group(3) or "0", 0) * (-1 if match.group(2) == "-" else 1)
        return Address(self._operand(match.group(1)), offset, coordinates)
