"""docs/training.md is that of the results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_page_is_that_of_the_results(monkeypatch):
    for needed in ("tokenizers", "rich"):
        pytest.importorskip(needed, reason="comes with the extra models")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_models

    results = json.loads(train_models.RESULTS.read_text())
    assert train_models.PAGE.read_text() == train_models.page(results)
    for name in results.keys() - {"machine"}:  # also while there are not all of them
        assert train_models.page({key: results[key] for key in ("machine", name)})
