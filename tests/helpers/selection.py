"""Selects the combinations of parameters that run each time; the others wait for --full."""

import itertools
from typing import Any

import pytest


def quick(names, *chosen):
    """Returns all names as parameters, of which only the chosen ones run each time."""
    return [pytest.param(x, marks=() if x in chosen else pytest.mark.slow) for x in names]


def covering(rows: list[dict[str, Any]], strength: int = 2) -> list[int]:
    """Returns the numbers of rows that are enough: any `strength` values of different parameters
    that meet in some row meet in one of these. Greedy (Cohen et al. 1997, "The AETG System")."""
    met = []
    for row in rows:
        values = [(name, id(value)) for name, value in row.items()]  # values may be unhashable
        met.append(set(itertools.combinations(values, min(strength, len(values)))))
    missing, chosen = set().union(*met), []
    while missing:
        best = max(range(len(rows)), key=lambda n: len(met[n] & missing))
        chosen.append(best)
        missing -= met[best]
    return chosen
