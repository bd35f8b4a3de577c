"""How the Triton kernels run where there is no GPU: in Triton's interpreter, by small tiles.

Triton is imported by the fixtures only: where it is missing, each test module skips itself.
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
    """And attention_forward also for few queries; attention_decode: test_triton_sequences.py."""
    from fused_attention.kernels import launch, tiles
    from triton_calls import SMALL
    from triton_interpreter import use_tiles

    use_tiles(monkeypatch, SMALL)
    monkeypatch.setattr(launch, "DBIAS_PROGRAMS", 8)
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", 0)
