"""The CUDA kernels that nvcc compiles stay within the committed limits (cuda_budgets.py).

Counts say nothing about time, but a kernel that exceeds its budget has become worse.
"""

import re

import pytest

pytest.importorskip("triton", reason="nvdisasm comes with Triton")

import cuda_budgets
import cuda_interpreter

pytestmark = pytest.mark.timeout(3600)  # a cold cache on a busy machine
LIMITS = cuda_budgets.load()["limits"]
needs_nvcc = pytest.mark.skipif(cuda_interpreter.NVCC is None, reason="nvcc not found")


def is_quick(name: str) -> bool:
    """Whether the test runs each time: sm_80 and Hopper kernels, except those of head size 64."""
    return (name.startswith("sm_80") or "hopper" in name) and "64" not in name


@needs_nvcc
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if is_quick(n) else pytest.mark.slow) for n in LIMITS]
)
def test_limit(name):
    entry = cuda_budgets.measure(name)
    same = cuda_interpreter.nvcc_version() == cuda_budgets.load()["nvcc"]
    over = cuda_budgets.excesses(entry, LIMITS[name], same)
    assert not over, "regenerate with tests/helpers/cuda_budgets.py"


@needs_nvcc
@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(n, marks=() if is_quick(n) else pytest.mark.slow)
        for n in cuda_budgets.SCORES
        if "hopper" in n
    ],
)
def test_copying_warps_use_no_register_that_they_gave_back(kernel):
    kept, used = cuda_budgets.copier_registers(kernel)
    assert 0 < used <= kept == 24


def test_limits_are_of_the_known_configurations():
    assert list(LIMITS) == cuda_budgets.CONFIGURATIONS


def test_the_page_is_that_of_the_limits():
    assert cuda_budgets.PAGE.read_text() == cuda_budgets.page(cuda_budgets.load())


@pytest.mark.parametrize(
    "name", [n for n in LIMITS if n.startswith("sm_80") and "main" in LIMITS[n]]
)
def test_counted_products_are_those_of_the_formula(name):
    """The forward has two products per score. The backward has seven in its two kernels: five, and
    s and dp a second time. One m16n8k16 does 2048 multiply-adds, and nothing else is multiplied."""
    products = 4 if "kKeyValue" in name else 3 if "kQuery" in name else 2
    head_dim = int(re.search(r"BFloat16, (\d+)", name)[1])
    assert LIMITS[name]["main"]["matrix"] == products * head_dim / 2
    assert LIMITS[name]["main"]["copy"] > 0


def test_a_limit_that_is_broken_is_noticed():
    entry = LIMITS["sm_80 attention_forward_kernel<BFloat16, 64, true>"]
    assert not cuda_budgets.excesses(entry, entry)
    main = entry["main"]
    for worse in (
        {"stack": entry["stack"] + 100},
        {"registers": entry["registers"] + 20},
        {"main": main | {"total": main["total"] * 1.1}},
        {"main": main | {"spill": 30.0}},
    ):
        assert cuda_budgets.excesses(entry | worse, entry), worse
