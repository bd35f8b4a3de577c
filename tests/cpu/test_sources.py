"""Every C++ header compiles alone: it includes what it uses, so that an editor understands it."""

import re
import runpy
import shlex
import shutil
import subprocess

import pytest

from paths import ROOT

SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
HEADERS = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("c*/*.h")])
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*.inl"))
# A kernel file gets the flags of the first of these in its name; AMX includes those of AVX-512.
WIDEST = ("avx512_bf16", "avx512", "amx", "avx2")


def flags_of(path):
    if path in KERNELS:
        name = next((name for name in WIDEST if name in path.name), "baseline")
        return SETUP["CPU"]["ISAS"].get(name, "").split()
    return [f"-isystem{SETUP['find_torch']() / 'include'}", SETUP["STABLE_ABI"]]


def sees_torch(path):
    included = set(re.findall(r'#include ["<]([^">]+)', path.read_text()))
    local = [path.parent / name for name in included if (path.parent / name).exists()]
    return any(name.startswith("torch/") for name in included) or any(map(sees_torch, local))


def parameters():
    for path in (*HEADERS, *KERNELS):
        marks = [pytest.mark.slow] if sees_torch(path) else []  # torch headers take seconds
        yield pytest.param(path, id=path.name, marks=marks)


def test_what_is_looked_at():
    assert len(KERNELS) > 20 and len(HEADERS) > 12
    assert not any(map(sees_torch, KERNELS)), "no torch header in a kernel file"


@pytest.mark.parametrize("path", list(parameters()))
def test_a_file_opens_alone(path):
    if any(isa in path.name for isa in WIDEST) and len(SETUP["CPU"]["ISAS"]) == 1:
        pytest.skip("for x86-64")
    if shutil.which(SETUP["compiler"]()[0]) is None:
        pytest.skip("no C++ compiler")
    assert path.read_text().count("#pragma once") == 1
    flags = ["-std=c++20", "-fsyntax-only", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-w"]
    command = [*SETUP["compiler"](), *flags, *flags_of(path), "-x", "c++", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, shlex.join(command) + "\n" + done.stderr


def test_the_planted_faults_still_fit():
    """`make plants` replaces pieces of lines, each of which must occur once."""
    plants = runpy.run_path(str(ROOT / "tests" / "native" / "plants.py"))["PLANTS"]
    assert len(plants) >= 20
    for plant in plants:
        text = (ROOT / "csrc" / "cpu" / plant.file).read_text()
        assert text.count(plant.old) == 1 and plant.old != plant.new, plant.name
