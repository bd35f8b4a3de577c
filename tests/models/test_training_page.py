"""docs/training.md is the page that the results give."""

import pytest

from paths import ROOT


@pytest.fixture
def train_models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_models

    return train_models


FOUND = {"steps": 3, "training_seconds": 1.0, "losses": [1.0] * 21}  # of a run, besides its results


def redirect(train_models, tmp_path, monkeypatch):
    """Redirects the results and the page to a temporary folder; nothing is fetched."""
    monkeypatch.setattr(train_models, "RESULTS", tmp_path / "training.csv")
    monkeypatch.setattr(train_models, "SAMPLES", tmp_path / "training_samples.csv")
    monkeypatch.setattr(train_models, "PAGE", tmp_path / "training.md")
    monkeypatch.setattr(train_models, "fetch", lambda name: name)


def test_the_page_is_that_of_the_results(train_models):
    about, figures, samples = train_models.load()
    assert train_models.PAGE.read_text() == train_models.page(about, figures, samples)
    for name, found in figures.items():  # the page also works for some of them
        assert train_models.page(about, {name: found}, samples)


def test_two_at_a_time_keep_the_results_of_both(train_models, tmp_path, monkeypatch):
    """The second script, with another --only, ends while the first is in the middle of a run."""
    redirect(train_models, tmp_path, monkeypatch)
    plan = {
        name: run for name, run in train_models.plan(False).items() if name in ("lm", "caption")
    }
    monkeypatch.setattr(train_models, "plan", lambda quick: plan)

    def run(settings, directory, seconds, after_step):
        if settings.task == "lm":
            monkeypatch.setattr("sys.argv", ["train_models.py", "--only", "caption"])
            train_models.main()
        found = {"lm": {"perplexity": 95.5}, "caption": {"exact": 0.5, "samples": [("a", "b")]}}
        return {**FOUND, "results": found[settings.task]}

    monkeypatch.setattr(train_models, "run", run)
    monkeypatch.setattr("sys.argv", ["train_models.py", "--only", "lm"])
    train_models.main()
    about, figures, samples = train_models.load()
    assert figures.keys() == {"lm", "caption"} and figures["lm"]["losses_every_20"] == "1 1"
    assert [(row["right"], row["answer"]) for row in samples["caption"]] == [("a", "b")]
    assert train_models.PAGE.read_text() == train_models.page(about, figures, samples)
    assert "## Captions" in train_models.PAGE.read_text()


def test_a_quick_run_leaves_the_results_alone(train_models, tmp_path, monkeypatch):
    redirect(train_models, tmp_path, monkeypatch)
    monkeypatch.setattr(train_models, "run", lambda *arguments: {**FOUND, "results": {}})
    monkeypatch.setattr("sys.argv", ["train_models.py", "--quick", "--only", "lm"])
    train_models.main()
    assert list(tmp_path.iterdir()) == []
