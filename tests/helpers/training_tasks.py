"""Tasks that a small model learns in seconds: to copy, reverse or sort a sequence of symbols."""

import random

from fused_attention.models.training import Pair

BEGIN, END, SYMBOLS = 0, 1, 6

TASKS = {"copy": list, "reverse": lambda s: s[::-1], "sort": sorted}


def make_pairs(task, count, seed, longest=5):
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        source = [rng.randrange(2, 2 + SYMBOLS) for _ in range(rng.randint(2, longest))]
        pairs.append(Pair(source, [BEGIN, *TASKS[task](source), END]))
    return pairs


def size(pair):
    return max(len(pair.source), len(pair.target))
