"""What lies in the cache: listed, verified, cleared, as functions and as commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_protocol import sha256
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from tiny_models import published_files, refusal, tiny_model
from toy_manifest import HEAD, put_in_force, register_toys, toy_table

import deit_models
from deit_models import FetchError, UnknownModelError, from_pretrained
from deit_models.cli import main
from deit_models.hub.cache import cached_files, clear_cache, verify_cache

WEIGHTS = "model.safetensors"
LISTED, OWN, OTHER = "deit/toy", "me/own", "openai/clip"


@pytest.fixture
def full_cache(hub_server, hub_env, own_registry, monkeypatch, tmp_path):
    """Weights of every kind; gives the address of the plain download."""
    assert hub_env.cache
    assert own_registry is None
    model = tiny_model()
    torch.save({"model": model.state_dict()}, tmp_path / "toy.pth")
    url = hub_server.add_file("toy-1234.pth", tmp_path / "toy.pth")
    hub_server.add_repo(LISTED, published_files(model, "timm"))
    hub_server.add_repo(OWN, published_files(tiny_model(seed=1)))
    hub_server.add_repo(OTHER, {"config.json": b'{"model_type": "clip"}', WEIGHTS: b"theirs"})
    register_toys(model, "toy", "bear")
    toy = toy_table(f'repo = "{LISTED}"\nlayout = "timm"')
    bear = toy_table(f'url = "{url}"\nlayout = "native"\npayload = "model"', name="bear")
    put_in_force(f"{HEAD}{toy}\n{bear}", monkeypatch)
    for name in ("toy", "bear", OWN):
        from_pretrained(name)
    for name in ("config.json", WEIGHTS):
        hf_hub_download(OTHER, name)
    return url


def by_kind(files):
    return sorted((file.kind, file.model, file.source) for file in files)


def others_are_left(*kept: str) -> bool:
    """Whether another library still finds these repositories' weights."""
    return all(isinstance(try_to_load_from_cache(repo, WEIGHTS), str) for repo in (OTHER, *kept))


def change_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)


def test_list_knows_models_and_sources_and_leaves_other_libraries_out(full_cache, hub_server):
    files = cached_files()
    assert by_kind(files) == [
        ("converted", "bear", full_cache),
        ("download", "bear", full_cache),
        ("hub", "deit_micro_distilled_patch4_32", OWN),  # told from its config.json
        ("hub", "toy", LISTED),  # told from the manifest
    ]
    for file in files:
        assert file.size_bytes == file.path.stat().st_size > 10_000
        if file.kind == "hub":
            assert file.revision == hub_server.repos[file.source].branches["main"]
            assert file.digest == sha256(hub_server.files(file.source)[WEIGHTS])


def test_every_revision_of_a_repository_is_listed(full_cache, hub_server):
    assert full_cache
    hub_server.commit(OWN, published_files(tiny_model(seed=2)))
    from_pretrained(OWN)
    files = [file for file in cached_files() if file.source == OWN]
    assert {file.revision for file in files} == set(hub_server.repos[OWN].commits)


def test_empty_cache_is_no_error(hub_env, capsys):
    assert not hub_env.cache.exists()
    assert cached_files() == list(verify_cache()) == clear_cache() == []
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr() == ("", "the cache holds no weights\n")
    assert main(["cache", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert main(["cache", "verify"]) == 0
    assert main(["cache", "clear", "--all"]) == 0
    assert capsys.readouterr() == ("", "nothing to remove\n")


def test_file_in_place_of_the_cache_is_one_line(hub_env, tmp_path, capsys):
    assert hub_env
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(FetchError, lambda: cached_files(tmp_path / "file"))
    assert main(["cache", "clear", "--all", "--cache-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_cache_of_ones_own_is_apart(full_cache, hub_server, tmp_path):
    assert full_cache
    from_pretrained(OWN, cache_dir=tmp_path / "mine")
    assert [file.source for file in cached_files(tmp_path / "mine")] == [OWN]
    clear_cache(cache_dir=tmp_path / "mine")
    assert cached_files(tmp_path / "mine") == []
    assert len(cached_files()) == 4
    assert hub_server.repos


def test_list_command_shows_each_file_on_a_line_and_all_of_it_as_json(full_cache, capsys):
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert any(line.split()[1:] == ["MB", "toy", "hub", LISTED] for line in lines)
    assert any(line.split()[1:] == ["MB", "bear", "download", full_cache] for line in lines)
    assert main(["cache", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted((row["kind"], row["model"], row["source"]) for row in rows) == by_kind(cached_files())
    assert all(Path(row["path"]).stat().st_size == row["size_bytes"] for row in rows)


def test_verify_knows_the_digest_of_all_but_plain_downloads(full_cache, capsys):
    verdicts = {verdict.file.kind: verdict for verdict in verify_cache() if verdict.file.source != OWN}
    assert {kind: verdict.ok for kind, verdict in verdicts.items()} == {
        "hub": True,
        "converted": True,
        "download": None,
    }
    for verdict in verdicts.values():
        assert verdict.sha256 == sha256(verdict.file.path.read_bytes())
    assert main(["cache", "verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == ["ok", "ok", "no digest known", "ok"]
    assert full_cache in lines[2]


@pytest.mark.parametrize("kind", ["hub", "converted"])
def test_verify_notices_one_changed_byte(full_cache, kind, capsys):
    assert full_cache
    changed = next(file for file in cached_files() if file.kind == kind)
    change_one_byte(changed.path)
    assert [verdict.file.path for verdict in verify_cache() if verdict.ok is False] == [changed.path]
    assert main(["cache", "verify"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()].count("CHANGED") == 1
    assert main(["cache", "verify", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in rows if row["ok"] is False] == [str(changed.path)]
    assert changed.path.exists()  # verifying removes nothing


@pytest.mark.parametrize("known", ["all", "prefix"])
def test_verify_compares_with_the_manifests_digest_of_that_revision(full_cache, hub_server, monkeypatch, known):
    download = next(file for file in cached_files() if file.kind == "download")
    digest = sha256(download.path.read_bytes())
    recorded = f'sha256 = "{digest}"' if known == "all" else f'sha256_prefix = "{digest[:8]}"'
    bear = toy_table(f'url = "{full_cache}"\nlayout = "native"\n{recorded}', name="bear")
    revision = hub_server.repos[LISTED].branches["main"]
    toy = toy_table(f'repo = "{LISTED}"\nlayout = "timm"\nrevision = "{revision}"\nsha256 = "{"0" * 64}"')
    put_in_force(f"{HEAD}{toy}\n{bear}", monkeypatch)
    assert {v.file.model: v.ok for v in verify_cache() if v.file.kind == "download"} == {"bear": True}
    assert {v.file.model: v.ok for v in verify_cache() if v.file.source == LISTED} == {"toy": False}
    change_one_byte(download.path)
    assert {v.file.model: v.ok for v in verify_cache() if v.file.kind == "download"} == {"bear": False}


@pytest.mark.parametrize("record", [None, "not JSON", "[]", "{}"])
def test_converted_copy_whose_record_is_lost_is_listed_without_digest(full_cache, record):
    assert full_cache
    path = next(file for file in cached_files() if file.kind == "converted").path
    note = path.with_suffix(".json")
    note.unlink() if record is None else note.write_text(record)
    (verdict,) = [verdict for verdict in verify_cache() if verdict.file.kind == "converted"]
    assert (verdict.file.model, verdict.file.source, verdict.ok) == (None, path.name, None)


def test_clear_by_model_removes_download_and_converted_copy(full_cache, hub_env, hub_server):
    removed = clear_cache("bear")
    assert by_kind(removed) == [("converted", "bear", full_cache), ("download", "bear", full_cache)]
    assert [
        path for path in hub_env.home.rglob("*") if path.suffix in (".pth", ".json") and "assets" in path.parts
    ] == []
    assert others_are_left(LISTED, OWN)
    asked = hub_server.count("GET", "/files/")
    from_pretrained("bear")
    assert hub_server.count("GET", "/files/") == asked + 1


@pytest.mark.parametrize(("name", "gone", "kept"), [("toy", LISTED, OWN), (LISTED, LISTED, OWN), (OWN, OWN, LISTED)])
def test_clear_by_model_or_repository_removes_its_weights_alone(full_cache, hub_env, name, gone, kept):
    blobs = len(hub_env.blobs())
    assert [file.source for file in clear_cache(name)] == [gone]
    assert try_to_load_from_cache(gone, WEIGHTS) is None
    assert others_are_left(kept)
    assert blobs - len(hub_env.blobs()) >= 1  # not only the links to them
    assert full_cache in {file.source for file in cached_files()}


def test_clear_of_everything_leaves_other_libraries_alone(full_cache, hub_env, capsys):
    assert full_cache
    broken_off = next(file for file in cached_files() if file.kind == "download").path.with_name("else.pth.part")
    broken_off.write_bytes(b"half")
    assert main(["cache", "clear", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("removed") for line in lines)
    assert cached_files() == []
    assert others_are_left()
    assert not broken_off.exists()
    assert {path.parents[1].name for path in hub_env.blobs()} == {"models--openai--clip"}


def test_clear_of_an_unknown_name_removes_nothing(full_cache, capsys):
    assert full_cache
    message = refusal(UnknownModelError, lambda: clear_cache("deit_tiny_patch16_224"))
    assert "nothing of 'deit_tiny_patch16_224' is in the cache" in message
    assert main(["cache", "clear", OTHER]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert len(cached_files()) == 4
    assert others_are_left()


def test_downloads_of_a_command_show_no_bars_in_a_pipe(full_cache, hub_env, tmp_path, monkeypatch):
    assert full_cache
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    monkeypatch.setenv("PYTHONPATH", str(Path(deit_models.__file__).parents[1]))
    clear_cache()
    command = [sys.executable, "-m", "deit_models", "convert", OWN, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub_env.blobs()
