"""Files of the Hub and plain downloads, such as the authors' `.pth` files: cached, complete, resumed, tried again."""

from __future__ import annotations

import http.client
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import (
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # imported there, not listed
from huggingface_hub.utils.tqdm import tqdm

from ..checkpoint import Source
from ..errors import CheckpointError, FetchError, IntegrityError, SaveError, first_line, one_line
from ..files import CHUNK_BYTES, check_digest, git_sha1_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 3
RETRY_DELAY_S = 1.0
"""Before the second attempt; doubled before the third."""
TIMEOUT_S = 30.0
WAIT_S = 120.0


class NoSuchFileError(FetchError):
    """The repository exists, without such a file at that revision."""


class HubUnreachableError(FetchError):
    """No connection to the Hub at all, so none to its other repositories either."""


class TransientError(FetchError):
    """A failure that a second attempt may cure: a busy server, a lost connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Access to network, cache and file: keywords of `from_pretrained`, and the function of the Hub client.

    `wait_s` is the time without a byte, of a server or of a process that holds a lock, after which waiting ends; by
    default HF_HUB_DOWNLOAD_TIMEOUT, where it is set, else two minutes.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    payload: str | None = None
    download: Callable[..., str] = hf_hub_download
    wait_s: float | None = None

    @property
    def patience_s(self) -> float:
        """The time after which waiting ends."""
        if self.wait_s is not None:
            return self.wait_s
        return constants.HF_HUB_DOWNLOAD_TIMEOUT if os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") else WAIT_S

    def at(self, revision: str | None) -> Access:
        """The same access to another revision, unless the caller pinned one."""
        return self if self.revision is not None else replace(self, revision=revision)

    @property
    def offline(self) -> bool:
        """Whether the network must not be used, by argument or by HF_HUB_OFFLINE."""
        return self.local_files_only or huggingface_hub.is_offline_mode()


def first_sound(name: str, sources: Iterable[Source], access: Access, use: Callable[[Source, Access], T]) -> T:
    """The result of `use` for the first source that is there and sound; failures are logged.

    Raises: FetchError, SaveError, CheckpointError: no source is.
    """
    failures: list[FetchError | SaveError | CheckpointError] = []
    for source in sources:
        # the client waits half a minute for a Hub it cannot reach: once is enough, a second copy may still be cached
        down = source.repo is not None and any(isinstance(failure, HubUnreachableError) for failure in failures)
        try:
            return use(source, replace(access, local_files_only=True) if down else access)
        except (FetchError, SaveError, CheckpointError) as error:
            failures.append(error)
            logger.warning("%s: %s", name, error)
    if len(failures) == 1:
        raise failures[0]
    kinds = (kind for kind in (CheckpointError, SaveError) if all(isinstance(failure, kind) for failure in failures))
    kind = next(kinds, FetchError)
    reasons = "; ".join(one_line(str(failure), 255 // len(failures)) for failure in failures)
    raise kind(f"no source of {name} gave its weights: {reasons}") from failures[-1]


def hub_file(repo_id: str, filename: str, access: Access) -> Path:
    """A file of a Hub repository, from the cache or the network; small ones are compared with their git SHA-1.

    Raises: NoSuchFileError: the repository lacks it. SaveError: no space, no permission. FetchError: any other failure,
        with the reason and what to do. IntegrityError: other bytes than the Hub announced; the cache forgets them.
    """
    _await_locks(repo_id, filename, access)
    at = _reached(repo_id, filename, access)
    path = with_retries(lambda: _hub_file(repo_id, filename, at))
    blob = path.resolve()
    try:
        if _is_hex(blob.name, 40) and (actual := git_sha1_of(blob)) != blob.name:
            told = f"git SHA-1 is {actual[:16]}..., expected {blob.name[:16]}..."
            raise IntegrityError(f"{repo_id}/{filename}: {told}; the file was changed")
        if filename.endswith(".json"):  # those kept as large files; weights are compared when they are read
            check_digest(blob, etag_digest(path), name=f"{repo_id}/{filename}")
    except IntegrityError:
        forget(path, access)
        raise
    return path


def _reached(repo_id: str, filename: str, access: Access) -> Access:
    """The access by which the client gets a file at once: it would ask a Hub that is down again and again.

    Raises: NoSuchFileError: the cache knows that this commit lacks it. HubUnreachableError: no connection, no copy.
    """
    revision = access.revision or constants.DEFAULT_REVISION
    cache = None if access.cache_dir is None else Path(access.cache_dir)
    try:
        cached = try_to_load_from_cache(repo_id, filename, cache_dir=cache, revision=revision)
        url = hf_hub_url(repo_id, filename, revision=revision)
    except (hub_errors.HFValidationError, ValueError):
        return access  # the client says why
    if _is_hex(revision, 40) and cached is not None:  # what a commit holds never changes
        if isinstance(cached, str):
            return access
        raise NoSuchFileError(f"{repo_id}/{filename} at {revision}: the repository has no such file")
    if access.offline:
        return access
    timeout_s = access.patience_s / ATTEMPTS
    timeout_s = min(timeout_s, constants.HF_HUB_ETAG_TIMEOUT) if isinstance(cached, str) else timeout_s

    def ask() -> str | None:
        try:
            return get_hf_file_metadata(url, token=access.token, timeout=timeout_s).commit_hash
        except (hub_errors.HfHubHTTPError, hub_errors.FileMetadataError):
            return None  # there is a server; the client does what its answer calls for
        except hub_errors.HTTPError as error:  # type: ignore[attr-defined]  # imported there, not listed
            raise TransientError(f"{constants.ENDPOINT} cannot be reached ({first_line(error)})") from error

    try:
        commit = ask() if isinstance(cached, str) else with_retries(ask)
    except TransientError as error:
        if isinstance(cached, str):
            logger.warning("%s/%s: %s; loading the copy in the cache", repo_id, filename, error)
            return replace(access, local_files_only=True)
        raise HubUnreachableError(f"{repo_id}/{filename}: {error}, and the file is not in the cache") from error
    current = isinstance(cached, str) and commit == commit_of(Path(cached))
    return replace(access, revision=commit) if current else access


def _await_locks(repo_id: str, filename: str, access: Access) -> None:
    """Wait for other processes that fetch from a repository: the client itself would wait for ever."""
    cache, folder = Path(access.cache_dir or constants.HF_HUB_CACHE), f"models--{repo_id.replace('/', '--')}"
    if access.offline or any((cache / folder / "snapshots").glob(f"*/{filename}")):
        return
    for path in (cache / ".locks" / folder).glob("*.lock"):
        with _lock(path, cache / folder / "blobs", access):
            continue


@contextmanager
def _lock(path: Path, folder: Path, access: Access) -> Iterator[None]:
    """A lock between processes. Raises: FetchError: another one holds it, and no file of the folder grows."""
    with ExitStack() as stack:
        while True:
            before = [file.stat().st_size for file in folder.glob("*")]
            try:
                stack.enter_context(WeakFileLock(path, timeout=access.patience_s))
                break
            except TimeoutError as error:
                if before == [file.stat().st_size for file in folder.glob("*")]:
                    held = f"{path} is held by another process, which received nothing in {access.patience_s:g} s"
                    raise FetchError(f"{held}; end it, or remove the file") from error
        yield


def forget(path: Path, access: Access) -> None:
    """Remove a cached download of other contents, so that the next try fetches it again.

    Only files of the cache are removed: never one the user named.
    """
    if commit_of(path) is not None or path.parent == assets_dir("downloads", access):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def with_retries(fetch: Callable[[], T]) -> T:
    """Call `fetch` up to three times, with growing pauses, while it fails with a TransientError."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return fetch()
        except TransientError as error:
            delay = RETRY_DELAY_S * 2**attempt
            logger.warning("%s; trying again in %g s", error, delay)
            time.sleep(delay)
    return fetch()


# Errors of the Hub client, ours for them, and the reason; the first class that fits decides.
_REFUSALS: tuple[tuple[type[Exception], type[FetchError], str], ...] = (
    (hub_errors.EntryNotFoundError, NoSuchFileError, "the repository has no such file"),
    (hub_errors.GatedRepoError, FetchError, "gated; accept its terms on its page, then pass token=..."),
    (hub_errors.RevisionNotFoundError, FetchError, "no such revision; pass a branch, a tag or a full commit id"),
    (
        hub_errors.RepositoryNotFoundError,
        FetchError,
        "no such repository, or a private one; for a private one pass token=... or run `hf auth login`",
    ),
    (hub_errors.HFValidationError, FetchError, "not a valid repository id; expected owner/name"),
)


def _hub_file(repo_id: str, filename: str, access: Access) -> Path:
    where = f"{repo_id}/{filename}" + (f" at {access.revision}" if access.revision else "")
    try:
        path = access.download(
            repo_id,
            filename,
            revision=access.revision,
            token=access.token,
            cache_dir=None if access.cache_dir is None else Path(access.cache_dir),
            local_files_only=access.offline,
        )
    except hub_errors.LocalEntryNotFoundError as error:
        if access.offline:
            reason = "not in the cache, and offline; load it once with network, or pass a path"
            raise FetchError(f"{where}: {reason}") from error
        # the same error as for a server that answers with an error, which another repository may not meet
        cause = error.__cause__
        kind = FetchError if isinstance(cause, hub_errors.HfHubHTTPError) else HubUnreachableError
        if isinstance(cause, hub_errors.HfHubHTTPError) and cause.response.status_code < 500:
            raise FetchError(f"{_failure(cause, where)}; the file is not in the cache") from error
        reason = f"{constants.ENDPOINT} cannot be reached, and the file is not in the cache"
        raise kind(f"{where}: {reason}") from error
    except Exception as error:
        for refusal, kind, reason in _REFUSALS:
            if isinstance(error, refusal):
                raise kind(f"{where}: {reason}") from error
        raise _failure(error, where) from error
    return Path(path)


def _failure(error: Exception, where: str) -> Exception:
    """A failed transfer as one of our errors; any other error as it is."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        kind = TransientError if status >= 500 or status == 429 else FetchError
        advice = "; is the token right, and may it read this?" if status in (401, 403) else ""
        return kind(f"{where}: the server answered {status}{advice}")
    # HTTPError is the base class of whatever HTTP library the installed client uses
    if isinstance(error, hub_errors.HTTPError):  # type: ignore[attr-defined]  # imported there, not listed
        # the client has tried again itself until no byte came for about a minute
        kind = FetchError if "Timeout" in type(error).__name__ else TransientError
        return kind(f"{where}: connection lost ({first_line(error)})")
    if isinstance(error, OSError):
        # a full disk has an errno; a download that came out short has none
        return (SaveError if error.errno is not None else TransientError)(f"{where}: {first_line(error)}")
    return error


def optional_hub_file(repo_id: str, filename: str, access: Access) -> Path | None:
    """Like `hub_file`, but None where the repository has no such file, or, without the Hub, the cache has none."""
    try:
        return hub_file(repo_id, filename, access)
    except NoSuchFileError:
        return None
    except FetchError as error:
        if access.offline or isinstance(error, HubUnreachableError):
            logger.warning("%s; loading without it", error)
            return None
        raise


def commit_of(path: Path) -> str | None:
    """The commit a cached Hub file belongs to: the cache's `snapshots/<commit>/` folder."""
    folder = path.parent
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else None


def etag_digest(path: Path) -> str | None:
    """The SHA-256 the Hub announced for a cached large file: the name of the blob it links to."""
    blob = path.resolve().name
    return blob if _is_hex(blob, 64) else None


def _is_hex(name: str, length: int) -> bool:
    return len(name) == length and set(name) <= set("0123456789abcdef")


def assets_dir(namespace: str, access: Access) -> Path:
    """A folder for files that the Hub's own cache has no place for; made if need be."""
    parent = None if access.cache_dir is None else Path(access.cache_dir) / "assets"
    try:
        return cached_assets_path(library_name="deit_models", namespace=namespace, assets_dir=parent)
    except (OSError, ValueError) as error:  # ValueError: a file is in its place
        raise SaveError(f"the cache folder cannot be made ({first_line(error)}); pass cache_dir=...") from error


def url_file(url: str, access: Access, *, digest: str | None = None) -> Path:
    """A plain download, cached under its file name; a broken-off one is resumed by the next attempt.

    Args:
        url: http or https.
        access: cache folder and offline flag.
        digest: leading digits of the SHA-256, checked before the file gets its name.

    Raises: FetchError: offline, or the server failed. SaveError: no space, no permission. IntegrityError: other bytes
        than announced.
    """
    path = assets_dir("downloads", access) / file_name(url)
    if path.exists():
        return path
    if access.offline:
        raise FetchError(f"{url} is not in the cache, and offline; load it once with network, or pass a path")
    with _lock(path.with_suffix(".lock"), path.parent, access):
        if not path.exists():  # or another process fetched it while this one waited
            with_retries(lambda: _download(url, path, digest, min(TIMEOUT_S, access.patience_s / ATTEMPTS)))
    return path


def file_name(url: str) -> str:
    """The name a download is cached under."""
    return PurePosixPath(urlsplit(url).path).name


def _download(url: str, path: Path, digest: str | None, timeout_s: float) -> None:
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    if request.type not in ("http", "https"):
        raise FetchError(f"{url}: only http and https addresses are fetched")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            resumed = response.status == 206
            left = int(response.headers.get("Content-Length") or -1)
            with part.open("ab" if resumed else "wb") as file:
                got = _copy(response, file, left, name=path.name)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing left to resume: the part is whole, or is not of this file
            part.unlink()
        kind = TransientError if error.code >= 500 or error.code in (416, 429) else FetchError
        raise kind(f"{url}: the server answered {error.code}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise TransientError(f"{url}: connection lost ({first_line(error)})") from error
    except OSError as error:
        raise SaveError(f"{url}: cannot write {part}: {first_line(error)}") from error
    if left >= 0 and got < left:
        raise TransientError(f"{url}: connection lost after {got} of {left} bytes")
    try:
        check_digest(part, digest, name=url)
    except IntegrityError:
        part.unlink()
        raise
    os.replace(part, path)


def _copy(response: Any, file: Any, left: int, *, name: str) -> int:
    got = 0
    # disable=None: a bar on a terminal, none in a pipe
    total = left if left > 0 else None
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None) as bar:  # type: ignore[no-untyped-call]
        while chunk := response.read(CHUNK_BYTES):
            file.write(chunk)
            got += len(chunk)
            bar.update(len(chunk))
    return got
