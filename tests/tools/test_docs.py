"""Runs every block of Python in the documents, as a reader would."""

import re

import pytest

from fused_attention.integrations.handle import Handle
from paths import ROOT

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, block in enumerate(BLOCK.findall(path.read_text()), 1)
]


@pytest.fixture
def undone(monkeypatch):
    """Undoes afterwards what a block has changed in other libraries."""
    handles = []
    init = Handle.__init__

    def noted(self, *arguments):
        handles.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Handle, "__init__", noted)
    yield
    for handle in handles:
        handle.undo()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", BLOCKS)
def test_block(block, tmp_path, monkeypatch, undone):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_the_blocks_are_found():
    assert len(BLOCKS) > 20
