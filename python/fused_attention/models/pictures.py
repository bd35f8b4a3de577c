"""Pictures of attention: heat maps (with matplotlib), and a page to browse layers and heads.

A picture of S queries and S keys has S² cells, so these are for short texts. For long texts,
`AttentionMap` answers questions instead.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..call.problem import check_shape
from ..errors import wrong_value
from .maps import AttentionMap, align

MAX_CELLS = 1 << 22  # in a page, a byte each


@dataclass(frozen=True)
class View:
    """One attention to browse: weights [H, Sq, Sk] in [0, 1], and the texts of its tokens."""

    name: str
    weights: Tensor
    queries: Sequence[str]
    keys: Sequence[str]


def make_views(
    maps: dict[str, AttentionMap], source: Sequence[str], target: Sequence[str], b: int = 0
) -> list[View]:
    """Returns views of a model's `attention_maps` for sequence b, with the tokens of each side."""
    views = []
    for name, map in maps.items():
        queries = source if name.startswith("encoder") else target
        keys = target if name.startswith("decoder") and "cross" not in name else source
        weights = map.rows(range(len(queries)))[b, :, :, : len(keys)]
        views.append(View(name, weights, queries, keys))
    return views


def attention_page(views: Sequence[View], title: str) -> str:
    """Returns a self-contained HTML page to choose a layer, a head and a token with the mouse.

    Its address holds the choice: #view=2&head=0&query=5, where head -1 is the mean of all heads.
    """
    if not views:
        wrong_value("views", "at least one", 0)
    cells = sum(view.weights.numel() for view in views)
    if cells > MAX_CELLS:
        wrong_value("views", f"at most {MAX_CELLS} weights", cells, "fewer tokens or layers")
    data: dict[str, Any] = {"title": title, "views": []}
    for view in views:
        shape = (view.weights.shape[0], len(view.queries), len(view.keys))
        check_shape(f"weights of {view.name}", view.weights, "[H, queries, keys]", shape)
        cells_of_view = (view.weights.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        data["views"].append(
            {
                "name": view.name,
                "heads": shape[0],
                "queries": list(view.queries),
                "keys": list(view.keys),
                "weights": base64.b64encode(bytes(cells_of_view.flatten().tolist())).decode(),
            }
        )
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text ends the script
    return Path(__file__).with_name("page.html").read_text().replace("DATA", text, 1)


def heat_map(view: View, path: Path, title: str = "") -> None:
    """Saves a heat map of the mean over the heads, with tokens on both axes."""
    plt = _pyplot()
    Sq, Sk = len(view.queries), len(view.keys)
    figure, axes = plt.subplots(figsize=(2 + 0.3 * Sk, 1.6 + 0.3 * Sq), layout="constrained")
    axes.imshow(view.weights.mean(0).sqrt().tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(Sk), view.keys, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(Sq), view.queries)
    axes.set_title(title or view.name, loc="left")
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def alignment_plot(view: View, seconds: float, path: Path, title: str = "") -> list[float]:
    """Draws the part of a sound in which each token was heard; returns when each part begins.

    seconds: the length of the sound, which the keys cover evenly. The line is the best monotonic
    path.
    """
    plt = _pyplot()
    weights = view.weights.mean(0)
    Sq, Sk = weights.shape
    steps = align(weights)
    begins = [min(j for i, j in steps if i == token) * seconds / Sk for token in range(Sq)]
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.24 * Sq), layout="constrained")
    extent = (0, seconds, Sq - 0.5, -0.5)
    axes.imshow(
        weights.sqrt().tolist(), cmap="Blues", aspect="auto", extent=extent, interpolation="none"
    )
    times = [(j + 0.5) * seconds / Sk for _, j in steps]
    axes.plot(times, [i for i, _ in steps], color="#c0392b", lw=1)
    axes.set_yticks(range(Sq), view.queries)
    axes.set_xlabel("seconds")
    axes.set_title(title or view.name, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return begins


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
