"""Plain downloads: cached, resumed, tried again, or one line that says why not."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hub_protocol import git_sha, sha256
from huggingface_hub.utils import WeakFileLock
from tiny_models import (
    refusal,
)

from deit_models import (
    FetchError,
    IntegrityError,
    SaveError,
)
from deit_models.hub import fetch
from deit_models.hub.fetch import Access


@pytest.fixture
def hub(hub_server, hub_env):
    assert hub_env
    return hub_server


@pytest.fixture(scope="module")
def pth():
    return bytes(range(256)) * 200


@pytest.fixture
def download(hub_env, tmp_path):
    """`download(url, digest)`: what `from_pretrained` does with a url source's file."""
    assert hub_env
    return lambda url, digest=None: fetch.url_file(url, Access(cache_dir=tmp_path / "own"), digest=digest)


def test_interrupted_download_resumes_where_it_stopped(hub, download, pth):
    url = hub.add_file("authors.pth", pth)
    hub.cut("/files/", after=10_000)
    assert download(url, sha256(pth)).read_bytes() == pth
    assert [request.headers.get("range") for request in hub.requests] == [None, "bytes=10000-"]


def test_download_that_never_ends_well_is_one_line_and_resumes_later(hub, download, pth):
    url = hub.add_file("authors.pth", pth)
    hub.cut("/files/", after=1000, times=None)
    assert "connection lost" in refusal(FetchError, lambda: download(url, sha256(pth)))
    hub.heal()
    assert download(url, sha256(pth)).read_bytes() == pth
    assert [request.headers.get("range") for request in hub.requests] == [
        None,
        "bytes=1000-",
        "bytes=2000-",
        "bytes=3000-",
    ]


def test_part_of_another_file_is_thrown_away(hub, download, tmp_path, pth):
    url = hub.add_file("authors.pth", pth)
    part = fetch.assets_dir("downloads", Access(cache_dir=tmp_path / "own")) / "authors.pth.part"
    part.write_bytes(b"x" * 100)
    refusal(IntegrityError, lambda: download(url, sha256(pth)))
    assert download(url, sha256(pth)).read_bytes() == pth


def test_part_longer_than_the_file_is_thrown_away(hub, download, tmp_path, pth):
    url = hub.add_file("authors.pth", pth)
    part = fetch.assets_dir("downloads", Access(cache_dir=tmp_path / "own")) / "authors.pth.part"
    part.write_bytes(b"x" * (len(pth) + 1))
    assert download(url, sha256(pth)).read_bytes() == pth


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_refused_download_is_one_line(hub, download, status, asked):
    hub.fail("/files/", status=status, times=None)
    assert f"answered {status}" in refusal(FetchError, lambda: download(f"{hub.url}/files/a.pth"))
    assert hub.count("GET", "/files/") == asked


@pytest.mark.parametrize("reset", [False, True])
def test_busy_or_cut_download_is_asked_again(hub, download, pth, reset):
    url = hub.add_file("authors.pth", pth)
    hub.fail("/files/", times=1)
    hub.cut("/files/", after=0, reset=reset)
    assert download(url, sha256(pth)).read_bytes() == pth


def test_download_on_a_full_disk_is_one_line_and_resumes_later(hub, download, pth, full_disk):
    url = hub.add_file("authors.pth", pth)
    with full_disk(10_000):
        assert "File too large" in refusal(SaveError, lambda: download(url, sha256(pth)))
    assert hub.count("GET") == 1
    assert download(url, sha256(pth)).read_bytes() == pth


def test_eight_at_once_download_once(hub, download, pth):
    url = hub.add_file("authors.pth", pth)
    hub.delay("/files/", seconds=0.1)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: download(url, sha256(pth)), range(8)))
    assert [path.read_bytes() for path in paths] == [pth]
    assert hub.count("GET") == 1


def test_other_addresses_than_http_are_refused(download, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"x")
    assert "only http" in refusal(FetchError, lambda: download((tmp_path / "a.pth").as_uri()))


@pytest.fixture
def impatient(tmp_path):
    return Access(cache_dir=tmp_path / "own", wait_s=0.3)


def test_lock_of_a_process_that_fetches_nothing_is_one_line(hub, impatient, pth):
    url = hub.add_file("authors.pth", pth)
    folder = fetch.assets_dir("downloads", impatient)
    with WeakFileLock(folder / "authors.lock"):
        assert "authors.lock is held by another process" in refusal(FetchError, lambda: fetch.url_file(url, impatient))
    assert fetch.url_file(url, impatient).read_bytes() == pth


def test_lock_of_a_process_that_fetches_is_awaited(hub, impatient, pth):
    url = hub.add_file("authors.pth", pth)
    part = fetch.assets_dir("downloads", impatient) / "authors.pth.part"

    def other() -> None:
        with WeakFileLock(part.with_name("authors.lock")):
            started.set()
            for length in range(0, 1000, 100):
                part.write_bytes(pth[:length])
                time.sleep(0.1)

    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        started.wait()
        assert fetch.url_file(url, impatient).read_bytes() == pth
        done.result()


def test_lock_in_the_cache_of_the_hub_is_one_line(hub, impatient, tmp_path):
    hub.add_repo("me/m", {"config.json": b"{}"})
    lock = tmp_path / "own" / ".locks" / "models--me--m" / f"{git_sha(b'{}')}.lock"
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock):
        assert "held by another" in refusal(FetchError, lambda: fetch.hub_file("me/m", "config.json", impatient))
    fetch.hub_file("me/m", "config.json", impatient)
    with WeakFileLock(lock):
        assert fetch.hub_file("me/m", "config.json", impatient).read_bytes() == b"{}"


def test_silent_server_is_asked_again_and_then_one_line(hub, impatient, pth):
    started, url = time.monotonic(), hub.add_file("authors.pth", pth)
    hub.delay("/files/", seconds=5, times=1)
    assert fetch.url_file(url, impatient).read_bytes() == pth
    hub.delay("/files/", seconds=5)
    url = hub.add_file("other.pth", pth)
    assert "connection lost" in refusal(FetchError, lambda: fetch.url_file(url, impatient))
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusal_of_the_hub_is_told_by_its_status(hub, impatient, status):
    hub.add_repo("me/m", {"config.json": b"{}"})
    hub.fail("/resolve/", status=status, times=None)
    message = refusal(FetchError, lambda: fetch.hub_file("me/m", "config.json", impatient))
    assert "cannot be reached" not in message


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("edit", [None, lambda data: data.replace(b"3", b"4"), lambda data: bytes(len(data))])
def test_other_small_file_than_announced_is_refused_and_fetched_anew(hub, impatient, name, edit):
    hub.add_repo("me/m", {name: b'{"num_heads": 3}'})
    hub.corrupt(name, edit)
    assert "git SHA-1" in refusal(IntegrityError, lambda: fetch.hub_file("me/m", name, impatient))
    hub.heal()
    path = fetch.hub_file("me/m", name, impatient)
    assert path.read_bytes() == b'{"num_heads": 3}'
    path.resolve().write_bytes(b"")
    offline = replace(impatient, local_files_only=True)
    assert "git SHA-1" in refusal(IntegrityError, lambda: fetch.hub_file("me/m", name, offline))
    assert fetch.hub_file("me/m", name, impatient).read_bytes() == b'{"num_heads": 3}'
