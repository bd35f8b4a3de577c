"""Tests the page in a real browser, and the plots."""

import html.parser
import os
import shutil
import subprocess

import pytest
import torch

from fused_attention.errors import ArgumentValueError
from fused_attention.models.attend import pad
from fused_attention.models.maps import attention_maps
from fused_attention.models.pictures import (
    View,
    alignment_plot,
    attention_page,
    heat_map,
    make_views,
)
from small_transformers import SOURCES, TARGETS, model_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUND = [os.environ.get("FUSED_ATTENTION_CHROMIUM"), *map(shutil.which, BROWSERS)]
BROWSER = next(filter(None, FOUND), None)
SOURCE_TOKENS = ["Die", "Daten", "<b>", "konn&ten", "nicht", "</script>", "."]
TARGET_TOKENS = ["The", 'da"ta']


@pytest.fixture(scope="module")
def views():
    model = model_of("norm first")
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.self_attention.query.weight.data *= 4
    for block in model.decoder.blocks:
        block.cross_attention.query.weight.data *= 4
    maps = attention_maps(model, *pad(TARGETS), *pad(SOURCES))
    return make_views(maps, SOURCE_TOKENS, TARGET_TOKENS)


def test_views(views):
    shapes = {view.name: tuple(view.weights.shape) for view in views}
    assert shapes == {
        f"{name}_attention": shape
        for i in range(2)
        for name, shape in (
            (f"encoder.blocks.{i}.self", (4, 7, 7)),
            (f"decoder.blocks.{i}.self", (4, 2, 2)),
            (f"decoder.blocks.{i}.cross", (4, 2, 7)),
        )
    }
    for view in views:
        assert (len(view.queries), len(view.keys)) == view.weights.shape[1:]
        torch.testing.assert_close(view.weights.sum(-1), torch.ones_like(view.weights[..., 0]))


class Page(html.parser.HTMLParser):
    """A page as a browser renders it: texts and attributes by the id that encloses them."""

    def __init__(self, text):
        super().__init__()
        self.title, self.found, self.inside = "", {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "br"):
            self.inside.append((tag, attributes.get("id")))
        if tag in ("span", "button") and self.where():
            self.found.setdefault(self.where(), []).append([attributes, ""])

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.inside and self.inside[-1][0] == "title":
            self.title += data
        elif self.where() and self.inside[-1][0] in ("span", "button"):
            self.found[self.where()][-1][1] += data

    def where(self):
        return next((name for _, name in reversed(self.inside) if name), None)


def browse(path, address, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *options]
    command += [f"--user-data-dir={path.parent / 'profile'}", f"file://{path}{address}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_the_page_in_a_browser(views, tmp_path):
    path = tmp_path / "attention.html"
    path.write_text(attention_page(views, "A <title>"))
    number, cross = next((i, v) for i, v in enumerate(views) if "1.cross" in v.name)
    for head, weights in ((2, cross.weights[2]), (-1, cross.weights.mean(0))):
        address = f"#view={number}&head={head}&query=1"
        dump = browse(path, address, "--dump-dom")
        page = Page(dump.stdout)
        assert page.title == "A <title>", dump.stderr
        assert [text for _, text in page.found["layers"]] == [view.name for view in views]
        assert [text for _, text in page.found["heads"]] == ["mean", "0", "1", "2", "3"]
        pressed = [text for a, text in page.found["heads"] if a["aria-pressed"] == "true"]
        assert pressed == ["mean" if head < 0 else str(head)]
        assert [text for _, text in page.found["queries"]] == TARGET_TOKENS
        chosen = [text for a, text in page.found["queries"] if a["aria-selected"] == "true"]
        assert chosen == TARGET_TOKENS[1:]
        assert [text for _, text in page.found["keys"]] == SOURCE_TOKENS
        shown = torch.tensor([float(a["data-weight"]) for a, _ in page.found["keys"]])
        torch.testing.assert_close(shown, weights[1], atol=0.5 / 255 + 1e-4, rtol=0)
    page = Page(browse(path, "#view=99&head=99&query=99", "--dump-dom").stdout)  # shows the last
    assert page.title == "A <title>"
    assert [a["aria-pressed"] for a, _ in page.found["layers"]][-1] == "true"


@pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")
def test_the_page_is_drawn(tmp_path):
    """A weight of 1 is the darkest blue, and nothing else on the map is."""
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "attention.html"
    view = View("layer", torch.eye(6)[None], list("abcdef"), list("uvwxyz"))
    path.write_text(attention_page([view], "Six"))
    picture = tmp_path / "page.png"
    browse(path, "#head=0", f"--screenshot={picture}", "--window-size=900,900")
    pixels = torch.from_numpy(image.imread(picture).copy())[..., :3] * 255
    blue = ((pixels - torch.tensor([47.0, 111.0, 176.0])).abs().amax(-1) < 2).nonzero()
    on_the_map = blue[blue[:, 0] > 500].double()
    assert len(on_the_map) == pytest.approx(6 * 28**2, rel=0.02)  # cells of 28 pixels
    assert torch.corrcoef(on_the_map.T)[0, 1] > 0.95  # along the diagonal


def test_a_page_says_what_is_wrong():
    with pytest.raises(ArgumentValueError, match="views: expected at least one"):
        attention_page([], "x")
    with pytest.raises(ArgumentValueError, match="weights of a: expected shape"):
        attention_page([View("a", torch.rand(1, 2, 3), ["x"], ["y"])], "x")
    many = View("a", torch.zeros(1).expand(1, 3000, 3000), [""] * 3000, [""] * 3000)
    with pytest.raises(ArgumentValueError, match="views: expected at most 4194304 weights"):
        attention_page([many], "x")


def test_plots(views, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    cross = next(view for view in views if "cross" in view.name)
    heat_map(cross, tmp_path / "map.png", "title")
    weights = torch.full((2, 3, 8), 0.05)
    weights[:, 0, 0:3] = weights[:, 1, 3:5] = weights[:, 2, 5:8] = 0.9
    heard = View("sound", weights, ["a", "b", "c"], [""] * 8)
    assert alignment_plot(heard, 4.0, tmp_path / "sound.png") == [0.0, 1.5, 2.5]
    for name in ("map.png", "sound.png"):
        pixels = image.imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 100 and len(set(map(tuple, pixels.reshape(-1, 4)))) > 20
