"""Finished pictures on disk, under a quota and a time, and the signed URLs that lead to them."""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

from unclip.checkpoints.files import atomic_file
from unclip.errors import OutputError

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(rf"[0-9a-f]{{32}}\.({'|'.join(MEDIA_TYPES)})")


class Results:
    """A folder of pictures with random names.

    Args:
        folder: created if needed.
        keep_s: files older than this are removed.
        quota_bytes: the oldest files are removed when there are more bytes.
        url_s: how long a URL is valid.

    Raises: OutputError for a folder that cannot be written.
    """

    def __init__(self, folder: Path, *, keep_s: float, quota_bytes: float, url_s: float) -> None:
        self._folder = folder / "pictures"
        self._keep_s, self._quota, self._url_s = keep_s, quota_bytes, url_s
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._secret = _secret(folder / "secret")
        except OSError as error:
            raise OutputError(f"the folder of results {folder} cannot be written: {error}") from error
        self.sweep()

    def put(self, content: bytes, suffix: str) -> str:
        """Keep a file and return its name. Raises: OutputError when it cannot be written."""
        name = f"{secrets.token_hex(16)}.{suffix}"
        with atomic_file(self._folder / name, overwrite=False) as draft:
            draft.write_bytes(content)
        self.sweep()
        return name

    def path(self, name: str) -> Path | None:
        """The file of a name; None when there is none (any more)."""
        path = self._folder / name
        return path if _NAME.fullmatch(name) and path.is_file() else None

    def remove(self, name: str) -> None:
        """Remove a file."""
        path = self.path(name)
        if path is not None:
            path.unlink(missing_ok=True)

    def url(self, name: str) -> str:
        """The path and query of a URL that is valid for some time."""
        expires = int(time.time() + self._url_s)
        return f"/v1/files/{name}?{urlencode({'expires': expires, 'signature': self._sign(name, expires)})}"

    def is_signed(self, name: str, expires: str, signature: str) -> bool:
        """Whether a URL's signature is right and its time has not passed."""
        if not re.fullmatch(r"[0-9]{1,12}", expires) or not signature.isascii():
            return False
        right = hmac.compare_digest(self._sign(name, int(expires)), signature)
        return right and time.time() < int(expires)

    def sweep(self) -> None:
        """Remove files that are too old, and the oldest ones above the quota."""
        with self._lock, contextlib.suppress(OSError):
            files = sorted(
                ((file.stat().st_mtime, file.stat().st_size, Path(file.path)) for file in os.scandir(self._folder)),
                reverse=True,
            )
            total, oldest = 0, time.time() - self._keep_s
            for place, (changed, size, path) in enumerate(files):
                total += size
                if changed < oldest or (total > self._quota and place):
                    path.unlink(missing_ok=True)

    def _sign(self, name: str, expires: int) -> str:
        return hmac.new(self._secret, f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()


def _secret(path: Path) -> bytes:
    """The secret of a folder's URLs, which stay valid after a restart."""
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()
