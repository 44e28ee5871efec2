"""The cache: its weights files listed, verified against known digests, and removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import CachedRepoInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ..checkpoint import find_repo, load_manifest
from ..errors import DeitModelsError, FetchError, UnknownModelError
from ..files import read_json, sha256_of
from ..formats.layouts import CONFIG_NAME, WEIGHTS_NAMES, read_config
from . import fetch
from .fetch import Access, file_name


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One weights file of the cache.

    Attributes:
        model: the registered model in it, if known.
        source: the Hub repository, URL, or pickle it came from.
        kind: a Hub file, a plain download, or the safetensors copy of a pickle.
        path: its place.
        size_bytes: its size.
        digest: the expected SHA-256, or its first digits, if known.
        revision: the commit of a Hub file.
    """

    model: str | None
    source: str
    kind: Literal["hub", "download", "converted"]
    path: Path
    size_bytes: int
    digest: str | None
    revision: str | None = None


class Verdict(NamedTuple):
    """Result of verifying a file; `ok` is None where no digest is known."""

    file: CachedFile
    ok: bool | None
    sha256: str


def cached_files(cache_dir: str | os.PathLike[str] | None = None) -> list[CachedFile]:
    """Every weights file in the cache that this package can load, Hub files first."""
    access = Access(cache_dir=cache_dir)
    return [*_hub_files(access), *_downloads(access), *_converted(access)]


def _hub_files(access: Access) -> Iterator[CachedFile]:
    try:
        cache = scan_cache_dir(_hub_cache(access.cache_dir))
    except CacheNotFound:
        return
    except ValueError as error:
        raise FetchError(f"{access.cache_dir} is a file; expected the folder of a cache") from error
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            yield from _repo_files(repo)


def _hub_cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    return Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)


def _repo_files(repo: CachedRepoInfo) -> Iterator[CachedFile]:
    known = find_repo(repo.repo_id)
    for revision in repo.revisions:
        files = {file.file_name: Path(file.file_path) for file in revision.files}
        path = next((files[name] for name in WEIGHTS_NAMES if name in files), None)
        model = known[0].name if known is not None else _model_of(files.get(CONFIG_NAME))
        if path is None or model is None:
            continue  # another library's
        recorded = known is not None and known[1].revision == revision.commit_hash and known[1].sha256
        digest = recorded or fetch.etag_digest(path)
        yield CachedFile(model, repo.repo_id, "hub", path, path.stat().st_size, digest, revision.commit_hash)


def _model_of(config: Path | None) -> str | None:
    try:
        return None if config is None else read_config(read_json(config)).origin.name
    except (DeitModelsError, OSError):
        return None


def _downloads(access: Access) -> Iterator[CachedFile]:
    published = [(info.name, source) for info in load_manifest().values() for source in info.sources if source.url]
    by_name = {file_name(str(source)): (model, str(source), source.digest) for model, source in published}
    for path in sorted(fetch.assets_dir("downloads", access).iterdir()):
        if path.suffix not in (".lock", ".part"):
            model, source, digest = by_name.get(path.name, (None, path.name, None))
            yield CachedFile(model, source, "download", path, path.stat().st_size, digest)


def _converted(access: Access) -> Iterator[CachedFile]:
    by_source = {str(source): info.name for info in load_manifest().values() for source in info.sources}
    for path in sorted(fetch.assets_dir("converted", access).glob("*.safetensors")):
        try:
            record = read_json(path.with_suffix(".json"))
            source, digest = record["source"], record["sha256"]
        except (DeitModelsError, OSError, LookupError):
            source, digest = path.name, None
        yield CachedFile(by_source.get(source), source, "converted", path, path.stat().st_size, digest)


def verify_cache(cache_dir: str | os.PathLike[str] | None = None) -> Iterator[Verdict]:
    """Hash every cached weights file and compare; nothing is removed."""
    for file in cached_files(cache_dir):
        sha256 = sha256_of(file.path)
        yield Verdict(file, ok=None if file.digest is None else sha256.startswith(file.digest), sha256=sha256)


def clear_cache(name: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> list[CachedFile]:
    """Remove cached weights, of one model or repository or all of them; gives what was removed.

    Hub repositories of other libraries stay; broken-off downloads and compiled networks go along with all.
    Raises: UnknownModelError: nothing of that name is in the cache.
    """
    files = [file for file in cached_files(cache_dir) if name is None or name in (file.model, file.source)]
    if name is not None and not files:
        raise UnknownModelError(f"nothing of {name!r} is in the cache; `deit-models cache list` shows what is")
    revisions = {file.revision for file in files if file.revision is not None}
    if revisions:
        scan_cache_dir(_hub_cache(cache_dir)).delete_revisions(*revisions).execute()
    for file in files:
        if file.kind != "hub":
            file.path.unlink(missing_ok=True)
            file.path.with_suffix(".json").unlink(missing_ok=True)
    if name is None:
        for folder, pattern in (("downloads", "*.part"), ("deploy", "*.network")):
            for path in fetch.assets_dir(folder, Access(cache_dir=cache_dir)).glob(pattern):
                path.unlink(missing_ok=True)
    return files
