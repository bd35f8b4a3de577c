"""Captions of drawn images, a small task in which patches are tokens (Dosovitskiy et al. 2021).

An image of 32 x 32 pixels shows two shapes on a noisy ground, one beside or above the other. Its
caption names the shapes, their colours and places: "a red circle left of a blue triangle".
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .texts import SPECIAL

SIZE, PATCH = 32, 8
COLOURS = {
    "red": (0.9, 0.2, 0.2),
    "green": (0.2, 0.8, 0.3),
    "blue": (0.2, 0.3, 0.9),
    "yellow": (0.9, 0.85, 0.2),
}
SHAPES = ("circle", "triangle", "cross")
PLACES = ("left of", "above")
WORDS = [*SPECIAL, "a", *COLOURS, *SHAPES, "left", "of", "above"]


class Image(NamedTuple):
    """An image, pixels [3, 32, 32] in [0, 1], and its caption."""

    pixels: Tensor
    caption: str


class PatchFront(nn.Module):
    """Each patch of 8 x 8 pixels becomes a token: [B, 16, dim] from [B, 3, 32, 32]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, dim, PATCH, stride=PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.project(pixels).flatten(2).transpose(1, 2)


def draw(rng: random.Random) -> Image:
    """Draws a new image; all random choices come from rng."""
    noise = torch.Generator().manual_seed(rng.getrandbits(32))
    pixels = 0.5 + 0.1 * torch.rand(3, SIZE, SIZE, generator=noise)
    place = rng.choice(PLACES)
    said = []
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for half in (0, 1):
        colour, shape, radius = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.randint(4, 6)
        along, across = 8 + 16 * half + rng.randint(-1, 1), 16 + rng.randint(-6, 6)
        dx, dy = (x - along, y - across) if place == "left of" else (x - across, y - along)
        width = (dy + radius) / 2  # half the width of a triangle, which stands on its base
        dx, dy = dx.abs(), dy.abs()
        inside = {
            "circle": dx**2 + dy**2 <= radius**2,
            "triangle": (dx <= width) & (dy <= radius),
            "cross": (torch.minimum(dx, dy) < 2) & (torch.maximum(dx, dy) <= radius),
        }[shape]
        pixels[:, inside] = torch.tensor(COLOURS[colour])[:, None]
        said.append(f"a {colour} {shape}")
    return Image(pixels, f" {place} ".join(said))


def draw_many(count: int, seed: int) -> list[Image]:
    rng = random.Random(seed)
    return [draw(rng) for _ in range(count)]


def encode_caption(caption: str) -> list[int]:
    return [WORDS.index(word) for word in caption.split()]


def decode_caption(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)
