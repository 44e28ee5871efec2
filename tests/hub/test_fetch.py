"""Plain downloads: cached, resumed, tried again, or one line that says why not."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hub_protocol import sha256
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
