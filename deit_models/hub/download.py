"""Bytes: a plain download, such as the authors' `.pth` files, which the Hub client cannot do: cached, resumed."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from huggingface_hub.utils._fixes import WeakFileLock
from huggingface_hub.utils.tqdm import tqdm

from ..errors import FetchError, IntegrityError
from .fetch import CHUNK_BYTES, Access, TransientError, assets_dir, check_digest, first_line, with_retries

TIMEOUT_S = 30.0


def url_file(url: str, access: Access, *, digest: str | None = None) -> Path:
    """A plain download, cached under its file name; a broken-off one is resumed by the next attempt.

    Args:
        url: http or https.
        access: cache folder and offline flag.
        digest: leading digits of the SHA-256, checked before the file gets its name.

    Raises: FetchError: offline, or the server or the disk failed. IntegrityError: other bytes than announced.
    """
    path = assets_dir("downloads", access) / file_name(url)
    if path.exists():
        return path
    if access.offline:
        raise FetchError(f"{url} is not in the cache, and offline; load it once with network, or pass a path")
    with WeakFileLock(path.with_suffix(".lock")):
        if not path.exists():  # or another process fetched it while this one waited
            with_retries(lambda: _download(url, path, digest))
    return path


def file_name(url: str) -> str:
    """The name a download is cached under."""
    return PurePosixPath(urlsplit(url).path).name


def _download(url: str, path: Path, digest: str | None) -> None:
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    if request.type not in ("http", "https"):
        raise FetchError(f"{url}: only http and https addresses are fetched")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            resumed = response.status == 206
            left = int(response.headers.get("Content-Length") or -1)
            with part.open("ab" if resumed else "wb") as file:
                got = _copy(response, file, total=left, name=path.name)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing left to resume: the part is whole, or is not of this file
            part.unlink()
        kind = TransientError if error.code >= 500 or error.code in (416, 429) else FetchError
        raise kind(f"{url}: the server answered {error.code}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise TransientError(f"{url}: connection lost ({first_line(error)})") from error
    except OSError as error:
        raise FetchError(f"{url}: cannot write {part}: {first_line(error)}") from error
    if left >= 0 and got < left:
        raise TransientError(f"{url}: connection lost after {got} of {left} bytes")
    try:
        check_digest(part, digest, name=url)
    except IntegrityError:
        part.unlink()
        raise
    os.replace(part, path)


def _copy(response: object, file: object, *, total: int, name: str) -> int:
    got = 0
    size = total if total > 0 else None
    # disable=None: a bar on a terminal, none in a pipe
    with tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar:  # type: ignore[no-untyped-call]
        while chunk := response.read(CHUNK_BYTES):  # type: ignore[attr-defined]  # urllib's responses have no public type
            file.write(chunk)  # type: ignore[attr-defined]
            got += len(chunk)
            bar.update(len(chunk))
    return got
