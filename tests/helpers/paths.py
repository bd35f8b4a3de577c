"""Paths in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
HELPERS = ROOT / "tests" / "helpers"
CACHE = ROOT / ".cache"  # what the tests compile, kept from run to run
