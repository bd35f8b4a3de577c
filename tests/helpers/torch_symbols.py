"""Prints the symbols of PyTorch that the built library needs.

python tests/helpers/torch_symbols.py > tests/data/torch_symbols.txt
"""

import re
import subprocess
from pathlib import Path

from paths import ROOT


def torch_symbols(library: Path) -> set[str]:
    """Returns the undefined symbols that belong neither to Python nor to the C and C++ runtimes."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {line.split()[-1] for line in lines}
    runtime = re.compile(r"@|^_?Py|^_ITM_|^__gmon_start__$|^_ZN?[KRO]*St")
    return {name for name in names if not runtime.search(name)}


if __name__ == "__main__":
    (built,) = (ROOT / "python" / "fused_attention").glob("_native*.so")
    print("\n".join(sorted(torch_symbols(built))))
