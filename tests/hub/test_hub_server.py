"""The local Hub against the real client: what tests of the package may rely on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from hub_server import HTML_PAGE, HubServer, flip_middle_bit
from huggingface_hub import HfApi, ModelCard, hf_hub_download, model_info, snapshot_download, whoami
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WEIGHTS = bytes(range(256)) * 1000
REPO = "me/model"
NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def sha(hub_server: HubServer, hub_env: object) -> str:
    assert hub_env  # the client points at the server
    return hub_server.add_repo(REPO, {"config.json": b'{"a": 1}', NAME: WEIGHTS})


def test_cold_download_asks_head_then_storage(hub_server, hub_env, sha):
    path = Path(hf_hub_download(REPO, NAME))
    assert path.read_bytes() == WEIGHTS
    assert path.is_relative_to(hub_env.cache / "models--me--model" / "snapshots" / sha)
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    assert [(r.method, r.path.split("/")[1], r.status) for r in hub_server.requests] == [
        ("HEAD", "me", 302),
        ("GET", "cdn", 200),
    ]


def test_small_file_comes_directly_with_a_git_etag(hub_server):
    path = Path(hf_hub_download(REPO, "config.json"))
    assert path.read_bytes() == b'{"a": 1}'
    assert len(path.resolve().name) == 40
    assert [r.status for r in hub_server.requests] == [200, 200]


def test_warm_download_asks_for_the_etag_only_and_a_commit_for_nothing(hub_server, sha):
    hf_hub_download(REPO, NAME)
    hub_server.requests.clear()
    hf_hub_download(REPO, NAME)
    assert [r.method for r in hub_server.requests] == ["HEAD"]
    hf_hub_download(REPO, NAME, revision=sha)
    assert len(hub_server.requests) == 1


def test_offline_uses_the_cache_and_asks_nothing(hub_server, hub_env):
    cold = hf_hub_download(REPO, NAME)
    hub_server.requests.clear()
    hub_env.go_offline()
    assert hf_hub_download(REPO, NAME) == cold
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json")
    assert hub_server.requests == []


def test_branches_and_commits_give_their_own_content(hub_server, sha):
    second = hub_server.commit(REPO, {NAME: b"new"})
    third = hub_server.commit(REPO, {NAME: b"side"}, branch="refs/pr/1")
    assert all(len(commit) == 40 for commit in (sha, second, third))
    wanted = {sha: WEIGHTS, "main": b"new", second: b"new", "refs/pr/1": b"side"}
    assert {rev: Path(hf_hub_download(REPO, NAME, revision=rev)).read_bytes() for rev in wanted} == wanted


def test_private_repository_needs_its_token(hub_server, hub_env):
    hub_server.add_repo("me/secret", {NAME: WEIGHTS}, private_token="hf_key")
    with pytest.raises(RepositoryNotFoundError, match="401"):
        hf_hub_download("me/secret", NAME)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as wrong:
        hf_hub_download("me/secret", NAME, token="hf_expired")
    assert not isinstance(wrong.value, RepositoryNotFoundError)
    hub_env.login("hf_key")
    assert Path(hf_hub_download("me/secret", NAME)).read_bytes() == WEIGHTS
    storage = hub_server.requests[-1]
    assert storage.path.startswith("/cdn/")
    assert "authorization" not in storage.headers
    hub_env.login()
    with pytest.raises(RepositoryNotFoundError, match="404"):
        model_info("me/secret")


def test_missing_repository_file_and_revision_are_told_apart(hub_env):
    with pytest.raises(RepositoryNotFoundError, match="401"):
        hf_hub_download("me/nothing", NAME)
    with pytest.raises(EntryNotFoundError, match="404"):
        hf_hub_download(REPO, "nothing.safetensors")
    with pytest.raises(RevisionNotFoundError, match="404"):
        hf_hub_download(REPO, NAME, revision="nothing")
    hub_env.login()
    with pytest.raises(RepositoryNotFoundError, match="404"):
        hf_hub_download("me/nothing", NAME)


def test_upload_arrives_and_downloads(hub_server, hub_env, tmp_path):
    folder = tmp_path / "upload"
    folder.mkdir()
    (folder / NAME).write_bytes(WEIGHTS[::-1])  # the server holds WEIGHTS: nobody would send them again
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    hub_env.login()
    api = HfApi()
    assert api.whoami()["name"] == whoami()["name"] == "tester"
    for _ in range(2):
        assert api.create_repo("tester/new", private=True, exist_ok=True).repo_id == "tester/new"
    commit = api.upload_folder(repo_id="tester/new", folder_path=folder)
    assert hub_server.files("tester/new", commit.oid)[NAME] == WEIGHTS[::-1]
    info = api.model_info("tester/new")
    assert (info.sha, info.private) == (commit.oid, True)
    assert {".gitattributes", "README.md", NAME} == set(api.list_repo_files("tester/new"))
    assert ModelCard.load("tester/new").data.license == "apache-2.0"
    assert (Path(snapshot_download("tester/new")) / NAME).read_bytes() == WEIGHTS[::-1]
    assert hub_server.count("PUT", "/upload/") == 1
    hub_env.logout()
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo("tester/other")


def test_plain_file_supports_ranges(hub_server):
    url = hub_server.add_file("deit.pth", WEIGHTS)
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == WEIGHTS
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=1000-"})) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == "bytes 1000-255999/256000"
        assert answer.read() == WEIGHTS[1000:]


def test_503_on_head_is_retried_and_on_the_body_is_not(hub_server):
    hub_server.fail("/resolve/", times=2)
    assert Path(hf_hub_download(REPO, NAME)).read_bytes() == WEIGHTS
    assert [r.status for r in hub_server.requests] == [503, 503, 302, 200]
    hub_server.fail("/cdn/")
    with pytest.raises(HfHubHTTPError, match="503"):
        hf_hub_download(REPO, NAME, force_download=True)
    hub_server.fail("/resolve/", times=None)
    hub_server.requests.clear()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json")
    assert hub_server.count("HEAD") == 7


@pytest.mark.parametrize("after", [0, 100_000])
def test_cut_connection_is_tried_again(hub_server, after):
    hub_server.cut("/cdn/", after=after)
    assert Path(hf_hub_download(REPO, NAME)).read_bytes() == WEIGHTS
    assert hub_server.count("GET", "/cdn/") == 2


def test_connection_always_cut_leaves_nothing_in_the_cache(hub_server, hub_env):
    hub_server.cut("/cdn/", after=1000, times=None)
    with pytest.raises(Exception, match="peer closed connection"):
        hf_hub_download(REPO, NAME)
    assert hub_server.count("GET", "/cdn/") == 6
    assert hub_env.blobs() == []


def test_reset_connection_is_not_tried_again(hub_server, hub_env):
    hub_server.cut("/cdn/", after=1000, reset=True)
    with pytest.raises(Exception, match="reset by peer"):
        hf_hub_download(REPO, NAME)
    assert hub_env.blobs() == []


def test_html_page_instead_of_the_file_is_refused_by_its_size(hub_server, hub_env):
    hub_server.replace("/cdn/")
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, NAME)
    assert hub_env.blobs() == []
    hub_server.replace(method=None)
    with pytest.raises(LocalEntryNotFoundError, match=r"(?i)x-repo-commit"):
        hf_hub_download(REPO, NAME)
    url = hub_server.add_file("deit.pth", WEIGHTS)
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == HTML_PAGE


def test_corrupt_bytes_of_the_right_size_reach_the_cache(hub_server):
    hub_server.corrupt("/cdn/")
    assert Path(hf_hub_download(REPO, NAME)).read_bytes() == flip_middle_bit(WEIGHTS)
    hub_server.heal()
    assert Path(hf_hub_download(REPO, NAME, force_download=True)).read_bytes() == WEIGHTS


def test_delay_runs_into_the_time_limit(hub_server):
    hub_server.delay("/resolve/", seconds=0.5, times=1)
    assert Path(hf_hub_download(REPO, NAME, etag_timeout=0.1)).read_bytes() == WEIGHTS
    assert hub_server.count("HEAD") == 2


def test_another_process_talks_to_the_same_server(hub_server):
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download({REPO!r}, {NAME!r}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert Path(shown.stdout.strip()).read_bytes() == WEIGHTS
    assert len(hub_server.requests) == 2


def test_server_is_gone_after_the_block():
    with HubServer() as server:
        server.add_repo(REPO, {NAME: WEIGHTS})
        hf_hub_download(REPO, NAME, endpoint=server.url)
    hf_hub_download(REPO, NAME, endpoint=server.url)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "config.json", endpoint=server.url)
