"""The cases and peers of `bench --quick` for pytest-benchmark: pytest benchmarks --benchmark-only

Use it for histories and comparisons of commits (--benchmark-autosave, --benchmark-compare). It runs
one peer after the other; for ratios use `python -m fused_attention bench`, which interleaves them.
"""

import pytest

pytest.importorskip("pytest_benchmark")

from fused_attention.tools.benchmark.peers import bench_peers, whole  # noqa: E402
from fused_attention.tools.benchmark.shapes import QUICK, make_inputs  # noqa: E402
from fused_attention.tools.foreign import NotOffered  # noqa: E402


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", bench_peers())
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_speed(benchmark, case, peer):
    benchmark.group = case.name
    try:
        inputs = make_inputs(case)
        call = whole(bench_peers()[peer](case, inputs), case, inputs)
        call()
    except NotOffered as reason:
        pytest.skip(str(reason))
    benchmark.extra_info["flops"] = case.flops()
    benchmark(call)
