"""docs/training.md is that of the results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def train_models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_models

    return train_models


def test_the_page_is_that_of_the_results(train_models):
    results = json.loads(train_models.RESULTS.read_text())
    assert train_models.PAGE.read_text() == train_models.page(results)
    for name in results.keys() - {"machine"}:  # also while there are not all of them
        assert train_models.page({key: results[key] for key in ("machine", name)})


def test_two_at_a_time_keep_the_results_of_both(train_models, tmp_path, monkeypatch):
    """One with --only, which ends while the other is in the middle of its runs."""
    stored = json.loads(train_models.RESULTS.read_text())
    monkeypatch.setattr(train_models, "RESULTS", tmp_path / "training.json")
    monkeypatch.setattr(train_models, "PAGE", tmp_path / "training.md")
    monkeypatch.setattr(train_models, "fetch", lambda name: name)
    plan = {
        name: run for name, run in train_models.plan(False).items() if name in ("lm", "caption")
    }
    monkeypatch.setattr(train_models, "plan", lambda quick: plan)

    def run(settings, directory, seconds, after_step):
        if settings.task == "lm":
            monkeypatch.setattr("sys.argv", ["train_models.py", "--only", "caption"])
            train_models.main()
        return {**stored[settings.task], "losses": [1.0]}

    monkeypatch.setattr(train_models, "run", run)
    monkeypatch.setattr("sys.argv", ["train_models.py", "--only", "lm"])
    train_models.main()
    results = json.loads(train_models.RESULTS.read_text())
    assert results.keys() == {"machine", "lm", "caption"}
    assert train_models.PAGE.read_text() == train_models.page(results)
    assert "## Captions" in train_models.PAGE.read_text()


def test_a_quick_run_leaves_the_results_alone(train_models, tmp_path, monkeypatch):
    monkeypatch.setattr(train_models, "RESULTS", tmp_path / "training.json")
    monkeypatch.setattr(train_models, "PAGE", tmp_path / "training.md")
    monkeypatch.setattr(train_models, "fetch", lambda name: name)
    found = {"steps": 3, "training_seconds": 1.0, "results": {}, "losses": [1.0]}
    monkeypatch.setattr(train_models, "run", lambda *arguments: found.copy())
    monkeypatch.setattr("sys.argv", ["train_models.py", "--quick", "--only", "lm"])
    train_models.main()
    assert list(tmp_path.iterdir()) == []
