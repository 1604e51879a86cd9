"""A running server as its users reach it: its URL, the key they send, and what it answers to plain GETs."""

import os
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aurora.config import UserError

if TYPE_CHECKING:
    import httpx

_HERE = ("127.0.0.1", "localhost", "::1")  # never asked through a proxy
_TIMEOUT_S = 5.0
_PAGE_LIMIT = 16 << 20  # bytes of an answer; /metrics takes about 0.1 MiB


class NoAnswer(RuntimeError):
    """The server cannot be reached now, or answers that it cannot serve; the message says which."""


def read_client_key(file: Path | None) -> str:
    """The API key to send: the first word of `file`, else AURORA_API_KEY, else "none". Raises UserError."""
    if file is None:
        return os.environ.get("AURORA_API_KEY") or "none"
    try:
        return file.read_text().split()[0]
    except (OSError, IndexError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "holds no key"
        raise UserError(f"--api-key-file {file}: {reason}; put a key on line 1") from error


def check_url(url: str) -> str:
    """`url` without a trailing `/` or `/v1`. Raises UserError unless it begins as URLs do."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url}: must begin with http:// or https://, e.g. http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True)
class Endpoint:
    """One server. `root` is its URL as `check_url` gives it; the key is in no message and no repr."""

    root: str
    client: "httpx.Client"

    @classmethod
    def open(cls, url: str, key: str) -> "Endpoint":
        """Ready to ask; nothing is sent yet. Raises UserError for a URL that is none."""
        import httpx

        root = check_url(url)
        if not (key.isascii() and key.isprintable()):
            raise UserError("the API key holds characters that no header takes; give a plain one")
        try:
            proxied = urlsplit(root).hostname not in _HERE
        except ValueError as error:
            raise UserError(f"--url {url}: {error}") from error
        headers = {"Authorization": f"Bearer {key}"}
        return cls(root, httpx.Client(headers=headers, timeout=_TIMEOUT_S, trust_env=proxied))

    def page(self, path: str) -> str:
        """The text at `path`. Raises NoAnswer for what may pass, UserError for what the user must change."""
        status, text = self._get(path)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise UserError(
                f"{self.root} refuses the API key (HTTP {status}); set AURORA_API_KEY to the server's, "
                "or give --api-key-file"
            )
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise NoAnswer(f"{self.root}{path} answers with status {status}")
        if status != HTTPStatus.OK:
            raise UserError(f"{self.root}{path} answers with status {status}; give the --url of an Aurora server")
        return text

    def answers(self, path: str) -> bool:
        """Whether `path` is answered with status 200."""
        try:
            return self._get(path)[0] == HTTPStatus.OK
        except NoAnswer:
            return False

    def _get(self, path: str) -> tuple[int, str]:
        import httpx

        content = bytearray()
        try:
            with self.client.stream("GET", f"{self.root}{path}") as answer:
                for part in answer.iter_bytes():
                    content += part
                    if len(content) > _PAGE_LIMIT:
                        raise UserError(f"{self.root}{path}: more than {_PAGE_LIMIT >> 20} MiB; is this a server?")
                return answer.status_code, content.decode(errors="replace")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NoAnswer(f"no server answers at {self.root} ({reason})") from error
