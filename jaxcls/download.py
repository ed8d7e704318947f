"""Downloads that are checked: size and SHA-256 known before, nothing left when broken off."""

import contextlib
import hashlib
import http.client
import socket
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jaxcls.errors import UserError

CONNECT_SECONDS = 3.0
READ_SECONDS = 30.0


class Archive(NamedTuple):
    """A file on the web: `size` in bytes, `checksum` is its SHA-256 in hex."""

    url: str
    name: str
    size: int
    checksum: str


def unreachable(url: str) -> str:
    """Why the host of a URL, or the proxy in front of it, takes no connection; '' if it does.

    Takes CONNECT_SECONDS at most.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, '')
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if '://' in proxy else f'http://{proxy}')
    port = parts.port or {'https': 443}.get(parts.scheme, 80)
    outcome = []

    def connect():
        try:
            socket.create_connection((parts.hostname, port), CONNECT_SECONDS).close()
            outcome.append('')
        except OSError as e:
            outcome.append(str(e) or type(e).__name__)

    # A thread, since looking a name up has no time limit of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return outcome[0] if outcome else f'no answer in {CONNECT_SECONDS:g} s'


def fetch(archives: Sequence[tuple[Archive, Path]]):
    """Makes every archive be at its path: checks those that are there, downloads the others.

    Raises:
      UserError: a download fails, or a file is not the one expected.
    """
    columns = TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for archive, path in archives:
            if path.exists():
                _check(archive, path, path.stat().st_size, _sha256(path))
            else:
                task = progress.add_task(archive.name, total=archive.size)
                _download(archive, path, lambda n, task=task: progress.advance(task, n))


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _check(archive: Archive, path: Path, size: int, checksum: str):
    if (size, checksum) != (archive.size, archive.checksum):
        raise UserError(
            f'{path} is not {archive.url}: got {size:,} bytes with SHA-256 {checksum}, expected '
            f'{archive.size:,} bytes with {archive.checksum}. Delete it and get it again; if it is '
            f'the file of another data set, move it to {path.parent / "OTHER_NAME"}'
        )


def _download(archive: Archive, path: Path, advance: Callable[[int], Any]):
    """Downloads to PATH.part, and renames once the checksum fits: broken off, nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    digest, size = hashlib.sha256(), 0
    request = urllib.request.Request(archive.url, headers={'User-Agent': 'jaxcls'})
    try:
        with (
            urllib.request.urlopen(request, timeout=READ_SECONDS) as response,
            part.open('wb') as file,
        ):
            while size <= archive.size and (chunk := response.read(1 << 18)):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                advance(len(chunk))
        _check(archive, path, size, digest.hexdigest())
        part.rename(path)
    except (OSError, http.client.HTTPException) as e:
        raise UserError(
            f'Downloading {archive.url} failed: {e}. Run this again, or place the file by hand as '
            f'{path}'
        ) from e
    finally:
        part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # only if empty
