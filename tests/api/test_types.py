"""Runs a type checker on calls: results have types, and wrong arguments are found."""

import subprocess
import sys
from pathlib import Path

import pytest

from paths import HELPERS, ROOT

pytest.importorskip("mypy")
WRONG = {
    "fa.attention(q, q, q, causl=True)": "Unexpected keyword argument",
    "fa.attention(q, q, q, causal=1.5)": "No overload variant",
    "x: torch.Tensor = fa.attention(q, q, q, return_lse=True)": "Incompatible types",
    "fa.attention(q, q)": "No overload variant",
}


def mypy(*paths: Path) -> list[str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-color-output"]
    done = subprocess.run(
        [*command, "--follow-imports=silent", "--ignore-missing-imports", *map(str, paths)],
        cwd=ROOT, env={"MYPYPATH": "python", "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    return (done.stdout + done.stderr).splitlines()


@pytest.mark.slow  # takes a minute if mypy has no cache of torch; make lint checks the calls
def test_typed_calls(tmp_path):
    lines = "\n".join(WRONG)
    wrong = tmp_path / "wrong.py"
    wrong.write_text(f"import torch\nimport fused_attention as fa\nq = torch.zeros(1)\n{lines}\n")
    found = mypy(HELPERS / "typed_calls.py", wrong)
    assert "in 1 file (checked 2 source files)" in found[-1], found  # typed_calls.py has no error
    for number, message in enumerate(WRONG.values(), 4):
        assert any(f"wrong.py:{number}: error" in x and message in x for x in found), found
