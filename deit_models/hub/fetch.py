"""Bytes: a file of the Hub, cached and complete; what every file needs: digests, atomic writes, a cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TypeVar

import huggingface_hub
from huggingface_hub import cached_assets_path, constants, hf_hub_download
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from ..errors import FetchError, IntegrityError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAMES = ("model.safetensors", "pytorch_model.bin")
"""What a repository or folder may call its weights; the first is what is written."""

ATTEMPTS = 3
RETRY_DELAY_S = 1.0
"""Before the second attempt; doubled before the third."""
CHUNK_BYTES = 1 << 20


class NoSuchFileError(FetchError):
    """The repository exists and has no such file at that revision."""


class HubUnreachableError(FetchError):
    """No connection to the Hub at all, so none to its other repositories either."""


class TransientError(FetchError):
    """A failure that a second attempt may cure: a busy server, a lost connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How files are fetched: the keywords of `from_pretrained` that concern the network and the cache."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def at(self, revision: str | None) -> Access:
        """The same access to another revision, unless the caller pinned one."""
        return self if self.revision is not None else replace(self, revision=revision)

    @property
    def offline(self) -> bool:
        """Whether the network must not be touched, by argument or by HF_HUB_OFFLINE."""
        return self.local_files_only or huggingface_hub.is_offline_mode()


def hub_file(repo_id: str, filename: str, access: Access) -> Path:
    """A file of a Hub repository, from the cache or the network.

    Raises: NoSuchFileError: the repository lacks it. FetchError: anything else, with the reason and what to do.
    """
    return with_retries(lambda: _hub_file(repo_id, filename, access))


def with_retries(fetch: Callable[[], T]) -> T:
    """Call `fetch` again, after a growing pause, while it fails with a TransientError; the last attempt's stands."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return fetch()
        except TransientError as error:
            delay = RETRY_DELAY_S * 2**attempt
            logger.warning("%s; trying again in %g s", error, delay)
            time.sleep(delay)
    return fetch()


# What a refusal of the Hub means for the user; the first class that fits decides.
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
        path = hf_hub_download(
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
        # the client says the same of a server that answers with an error, which another repository may not meet
        kind = FetchError if isinstance(error.__cause__, hub_errors.HfHubHTTPError) else HubUnreachableError
        reason = f"{constants.ENDPOINT} cannot be reached, and the file is not in the cache"
        raise kind(f"{where}: {reason}") from error
    except Exception as error:
        for refusal, kind, reason in _REFUSALS:
            if isinstance(error, refusal):
                raise kind(f"{where}: {reason}") from error
        raise _failure(error, where) from error
    return Path(path)


def _failure(error: Exception, where: str) -> Exception:
    """A failed transfer as one of our errors; anything that is not one comes back as it is."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        kind = TransientError if status >= 500 or status == 429 else FetchError
        advice = "; is the token right, and may it read this?" if status in (401, 403) else ""
        return kind(f"{where}: the server answered {status}{advice}")
    # HTTPError is the base class of whatever HTTP library the installed client uses
    if isinstance(error, hub_errors.HTTPError):  # type: ignore[attr-defined]  # imported there, not listed
        return TransientError(f"{where}: connection lost ({first_line(error)})")
    if isinstance(error, OSError):
        # a full disk carries an errno; a download that came out short does not
        return (FetchError if error.errno is not None else TransientError)(f"{where}: {first_line(error)}")
    return error


def optional_hub_file(repo_id: str, filename: str, access: Access) -> Path | None:
    """Like `hub_file`, but None where the repository has no such file (or, offline, the cache has none)."""
    try:
        return hub_file(repo_id, filename, access)
    except NoSuchFileError:
        return None
    except FetchError:
        if access.offline:
            return None
        raise


def commit_of(path: Path) -> str | None:
    """The commit a cached Hub file belongs to: the cache's `snapshots/<commit>/` folder."""
    folder = path.parent
    return folder.name if folder.parent.name == "snapshots" and len(folder.name) == 40 else None


def etag_digest(path: Path) -> str | None:
    """The SHA-256 the Hub announced for a cached large file: the name of the blob it links to."""
    blob = path.resolve().name
    return blob if len(blob) == 64 and set(blob) <= set("0123456789abcdef") else None


def assets_dir(namespace: str, access: Access) -> Path:
    """Where this package keeps what the Hub's own cache has no place for, created if need be."""
    parent = None if access.cache_dir is None else Path(access.cache_dir) / "assets"
    try:
        return cached_assets_path(library_name="deit_models", namespace=namespace, assets_dir=parent)
    except (OSError, ValueError) as error:  # ValueError: the client's word for a file in its place
        raise FetchError(f"the cache folder cannot be made ({first_line(error)}); pass cache_dir=...") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_digest(path: Path, expected: str | None, *, name: str | None = None) -> str | None:
    """Compare a file's SHA-256 with the known leading digits; gives the full digest, or None where none is known.

    Raises: IntegrityError: they differ.
    """
    if expected is None:
        return None
    actual = sha256_of(path)
    if not actual.startswith(expected):
        raise IntegrityError(
            f"{name or path}: SHA-256 is {actual[:16]}..., expected {expected[:16]}...; the file was changed"
        )
    return actual


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes its place only once complete, also while others read it.

    Raises: FetchError: no space, no permission; what was there is left as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
        yield temporary
        os.chmod(temporary, 0o644)  # temporary files are private by default, published ones are not
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise FetchError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """An error's message, or its kind, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
