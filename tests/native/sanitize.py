"""`make sanitize`: the kernels, without torch, under sanitizers and on an emulated 64-bit Arm CPU.

The driver (driver.cpp) is compiled with the kernels of every instruction set, with the flags of
setup.py, and run for each of them that this machine has: under AddressSanitizer and UBSan on one
thread, under ThreadSanitizer on several, and, where Debian's g++-aarch64-linux-gnu and qemu-user
are installed, cross-compiled under UBSan. It prints the number of cases at the end, and exits with
code 1 on a failure.
"""

import argparse
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")  # changes the directory to ROOT
NATIVE = Path("tests/native")
BUILD = Path("build/sanitize")
UNDEFINED = "-fsanitize=undefined,float-cast-overflow"
ARM_PACKAGES = "Debian's packages g++-aarch64-linux-gnu and qemu-user"


@dataclass(frozen=True)
class Build:
    """How one driver is compiled, and how it is run."""

    name: str
    flags: str
    threads: int
    compiler: list[str] = field(default_factory=lambda: SETUP["compiler"]())
    runner: tuple[str, ...] = ()
    isas: dict[str, str] = field(default_factory=lambda: SETUP["CPU"]["ISAS"])  # and their flags

    @property
    def driver(self) -> Path:
        return BUILD / self.name / "driver"

    def compile(self) -> None:
        """Compiles in parallel what changed since its object, each source with its own flags."""
        self.driver.parent.mkdir(parents=True, exist_ok=True)
        defines = [f"-DFUSED_ATTENTION_ISA_{name.upper()}" for name in self.isas]
        common = ["-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra"]
        common += ["-Icsrc", "-pthread", *self.flags.split(), *defines]
        folder = self.driver.parent
        kernels = sorted(Path("csrc/cpu").glob("kernels_*.cpp"))
        # Each object, with its source and flags of its own.
        objects = {
            folder / source.with_suffix(".o").name: (source, "")
            for source in (NATIVE / "driver.cpp", Path("csrc/cpu/dispatch.cpp"))
        }
        for isa, flags in self.isas.items():
            own = f"{flags} -DFUSED_ATTENTION_ISA={isa}"
            objects |= {folder / f"{x.stem}-{isa}.o": (x, own) for x in kernels}
        headers = [Path("setup.py"), *Path("csrc").glob("*.h"), *Path("csrc/cpu").iterdir()]

        def compile_one(target: Path) -> None:
            source, own_flags = objects[target]
            inputs = [*headers, *NATIVE.glob("*.[ch]*")] if source.parent == NATIVE else headers
            newest = max(path.stat().st_mtime for path in inputs)
            if target.exists() and target.stat().st_mtime > newest:
                return
            print(f"{self.name}: compiling {target.stem}\n", end="", flush=True)
            command = [*self.compiler, *common, *own_flags.split()]
            subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, objects))
        command = [*self.compiler, *common, *map(str, objects), "-o", str(self.driver)]
        subprocess.run(command, check=True)

    def run(self, *arguments: str) -> str:
        environment = {
            # GCC before 14 misaligns 64-byte vectors otherwise (PR 110027).
            "ASAN_OPTIONS": "detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        command = [*self.runner, str(self.driver), *arguments]
        result = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE)
        output = result.stdout.decode()
        if result.returncode != 0:
            print(output)
            sys.exit(f"exit status {result.returncode} from: {shlex.join(command)}")
        return output


def builds() -> list[Build]:
    # ThreadSanitizer needs fixed addresses, which address randomisation may give to other memory.
    fixed = ("setarch", platform.machine(), "-R") if shutil.which("setarch") else ()
    found = [
        Build("address", f"-fsanitize=address {UNDEFINED} -fno-sanitize-recover=all", threads=1),
        Build("thread", "-fsanitize=thread", threads=3, runner=fixed),
    ]
    arm, qemu = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if arm and qemu:
        runner = (qemu, "-L", "/usr/aarch64-linux-gnu")
        flags = f"{UNDEFINED} -fno-sanitize-recover=all"
        found.append(Build("arm64", flags, 1, [arm], runner, {"baseline": ""}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="cases for each instruction set")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="one of address, thread, arm64")
    options = parser.parse_args()
    summary = []
    for build in (build for build in builds() if options.only in (None, build.name)):
        build.compile()
        usable = build.run().split()
        for isa in build.isas:
            if isa not in usable:
                summary.append(f"{build.name:8} {isa:9} skipped: not on this machine")
                continue
            print(f"{build.name}: {isa}", flush=True)
            # ThreadSanitizer is the slowest and Arm is emulated, so these run half as many cases.
            cases = options.cases if build.name == "address" else options.cases // 2
            build.run(isa, str(cases), str(options.seed), str(build.threads))
            summary.append(f"{build.name:8} {isa:9} {cases} cases")
    if not any(build.name == "arm64" for build in builds()):
        summary.append(f"{'arm64':8} {'baseline':9} skipped: {ARM_PACKAGES} are not installed")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
