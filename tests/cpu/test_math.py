"""Tests the elementary functions of the kernels against the errors that math.inl states."""

import numpy as np
import pytest

from fused_attention import _native

MAX_ULP = {"exp2": 1.2, "tanh": 1.7}
# The exact function, and the ranges where it is measured in float32 and in float64.
FUNCTIONS = {
    "exp2": (np.exp2, (-126, 127), (-1022, 1023)),
    "tanh": (np.tanh, (-25, 25), (-25, 25)),
}


def apply(function, x):
    out = np.empty_like(x)
    _native.apply_math(function, x, out)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_error_in_ulp(isa, function, dtype):
    rng = np.random.default_rng(0)
    of, *ranges = FUNCTIONS[function]
    near = rng.uniform(-1, 1, 100_001)
    wide = rng.uniform(*ranges[dtype == np.float64], 200_000)
    x = np.concatenate([wide, near, near * 1e-4]).astype(dtype)
    exact = of(x.astype(np.longdouble))
    ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    assert (np.abs(apply(function, x) - exact) / ulp).max() <= MAX_ULP[function]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(isa, dtype):
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, 1.0, -inf, -1e5, nan], dtype)
    np.testing.assert_array_equal(apply("exp2", x), np.array([1, 1, 2, 0, 0, nan], dtype))
    x = np.array([0.0, inf, -inf, 1e30, -1e30, nan], dtype)
    np.testing.assert_array_equal(apply("tanh", x), np.array([0, 1, -1, 1, -1, nan], dtype))


def test_rejects_what_is_no_pair_of_buffers():
    x = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="in, out"):
        _native.apply_math("exp2", x, np.zeros(4))
    with pytest.raises(ValueError, match="in, out"):
        _native.apply_math("exp2", x, np.zeros(8, np.float32)[::2])
    with pytest.raises(ValueError, match="function"):
        _native.apply_math("log", x, x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operations_on_registers_are_counted(isa, dtype):
    """The count may exceed 2^24, up to which a float counts exactly."""
    few, many = 1000, 1 << 25
    assert _native.multiply_registers(dtype, many) * few == (
        _native.multiply_registers(dtype, few) * many
    )
