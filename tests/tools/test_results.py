"""Tests benchmarks/result_tables.py, and the tables that are committed."""

import multiprocessing
import re
import sys

import pytest

import fused_attention
from fused_attention.tools.benchmark.harness import Timing
from paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import result_tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def test_what_is_written_is_read(tmp_path):
    rows = [
        {"case": "a, b", "median ms": 1 / 3, "disturbed": False, "note": "x"},
        {"case": "c", "extra": 12345678.9, "disturbed": True, "median ms": float("nan")},
    ]
    path = tmp_path / "folder" / "table.csv"
    result_tables.write(path, {"cpu": "one, two", "date": "today"}, rows)
    about, found = result_tables.read(path)
    assert about == {"cpu": "one; two", "date": "today"}
    assert found == [
        {"case": "a, b", "median ms": "0.333333", "disturbed": "no", "extra": "", "note": "x"},
        {"case": "c", "median ms": "", "disturbed": "yes", "extra": "12345679", "note": ""},
    ]


def test_ratios_are_to_ours():
    timings = {"ours": Timing(2.0, 1.9, 0.1, 7), "PyTorch": Timing(5.0, 4.0, 0.2, 7)}
    ours, theirs = result_tables.beside({"case": "x"}, timings, "ours")
    assert ours["median / ours"] == 1 and theirs["median / ours"] == 2.5
    assert theirs["peer"] == "PyTorch" and theirs["minimum ms"] == 4.0


def add(path, number):
    for i in range(5):
        row = {"case": f"{number} {i}", "value": i}
        result_tables.update(path, {"date": str(number)}, [row], "case")


def test_no_update_is_lost(tmp_path):
    path = tmp_path / "table.csv"
    others = [multiprocessing.Process(target=add, args=(path, number)) for number in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    _, rows = result_tables.read(path)
    assert len(rows) == 15
    result_tables.update(path, {"date": "later"}, [{"case": "1 3", "value": 9}], "case")
    changed = {row["case"]: (row["value"], row["date"]) for row in result_tables.read(path)[1]}
    assert changed["1 3"] == ("9", "later") and changed["2 4"] == ("4", "2")


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.csv")), ids=lambda path: path.stem)
def test_committed_tables_say_on_which_machine(path):
    about, rows = result_tables.read(path)
    assert rows and all(None not in row for row in rows), "a row has more cells than the head"
    assert {"cpu", "gpu", "device", "machine"} & set(about), about


def test_results_are_tables():
    assert not list(RESULTS.rglob("*.json"))


def test_the_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", text, re.MULTILINE)[1] == fused_attention.__version__
