"""Options and parameters that every test file shares."""

import collections
import os
import sys

# This comes first, since Triton decides when it is imported whether functions are interpreted. On a
# GPU they are compiled: TRITON_INTERPRET=0 pytest tests/gpu, as `make gpu` does.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from fused_attention import _native
from fused_attention.tools import testing
from paths import HELPERS
from selection import covering

# Assertions in the helpers show their values, as those in test modules do.
pytest.register_assert_rewrite(
    *(path.stem for path in HELPERS.glob("*.py") if path.stem not in sys.modules)
)

# The number of examples for each property. All quick runs try the same examples, and each full run
# draws others. No test fails because it takes long.
_ANY_TIME = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=60, derandomize=True, **_ANY_TIME)
settings.register_profile("full", max_examples=1500, **_ANY_TIME)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the tests marked slow")


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "quick")


@pytest.hookimpl(tryfirst=True)  # before -m and -k select
def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    functions = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") and "slow" not in item.keywords:
            functions[item.path, item.originalname].append(item)
    for combinations in functions.values():
        strength = combinations[0].get_closest_marker("covering").args
        rows = [item.callspec.params for item in combinations]
        needed = covering(rows, *strength)
        for number in set(range(len(combinations))) - set(needed):
            combinations[number].add_marker(pytest.mark.slow)
    skip = pytest.mark.skip(reason="slow: runs with --full (make test-full)")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Uses one thread for many tiny calls: other test processes would delay a second thread."""
    with testing.num_threads(1):
        yield


@pytest.fixture(params=_native.isas())
def isa(request):
    """Runs the test on each instruction set of this machine."""
    with testing.cpu_isa(request.param):
        yield request.param
