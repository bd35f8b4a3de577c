"""Fixtures that run the Triton kernels without a GPU: in Triton's interpreter, with small tiles.

Only the fixtures import Triton: if it is missing, each test module skips itself.
"""

import pytest


@pytest.fixture(scope="module")
def interpreter():
    """Triton's interpreter, with bfloat16 repaired."""
    from triton_interpreter import quick_calls, repaired_bfloat16

    with repaired_bfloat16(), quick_calls():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Uses small tiles, and attention_forward in place of attention_decode for few queries."""
    from fused_attention.kernels import launch, tiles
    from triton_calls import SMALL
    from triton_interpreter import use_tiles

    use_tiles(monkeypatch, SMALL)
    monkeypatch.setattr(launch, "DBIAS_PROGRAMS", 8)
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", 0)
