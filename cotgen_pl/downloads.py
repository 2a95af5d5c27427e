"""One file over HTTP, resumed where it broke off."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

CHUNK = 2**20  # bytes
TIMEOUT = 60.0  # seconds without a byte
TRIES = 5  # in a row without one new byte
PASSING = (408, 416, 425, 429)  # client errors that a later attempt may not meet
RANGE_NOT_SATISFIABLE = 416
PARTIAL_CONTENT = 206


class UnreachableError(Exception):
    """A server that is not there, refuses, or never gives the whole file."""


@dataclass(frozen=True)
class Answer:
    """What a server says about a file."""

    etag: str | None
    """Changes when the file does; the hub's own for its large files."""
    revision: str | None
    """The commit, on the hub."""


@dataclass
class _Visit(HTTPRedirectHandler):
    """Keeps what servers say on the way: the hub speaks before it sends a client to its storage."""

    headers: dict[str, str] = field(default_factory=dict)

    def note(self, headers: Message) -> None:
        """Keep the marks of one answer; the first server's count."""
        for name in ("X-Linked-ETag", "X-Repo-Commit"):
            if headers[name] and name not in self.headers:
                self.headers[name] = headers[name]

    def redirect_request(self, *arguments: Any) -> Request | None:
        """Follow, and keep the marks."""
        self.note(arguments[4])
        return super().redirect_request(*arguments)

    def answer(self, headers: Message) -> Answer:
        """What all of them said about the file."""
        self.note(headers)
        etag = self.headers.get("X-Linked-ETag") or headers["ETag"]
        return Answer(etag and etag.strip(), self.headers.get("X-Repo-Commit"))


class Downloader:
    """Downloads files, with a bar for each on a terminal.

    Args:
        pause: Seconds before a broken download is taken up again; doubled after each attempt
            without one new byte.
        show: Whether to draw bars; absent means on a terminal.
    """

    def __init__(self, pause: float = 1.0, show: bool | None = None) -> None:
        self.pause, self.show = pause, show

    def read_json(self, address: str) -> Any:
        """The contents of a small JSON document.

        Raises:
            UnreachableError: Or of a document that is not JSON.
        """
        try:
            with self._open(address, {}, _Visit()) as response:
                return json.load(response)
        except (OSError, HTTPException, ValueError) as error:
            raise UnreachableError(_describe(error)) from error

    def download(self, address: str, part: Path) -> Answer:
        """Put all of a file at `part`; what lies there of the same file is gone on with.

        Args:
            address: http or https.
            part: The unfinished file; a note on its version lies beside it.

        Raises:
            UnreachableError: The server refuses or keeps breaking off; what came stays for later.
        """
        failures = 0
        while True:
            before = _size(part)
            try:
                return self._attempt(address, part)
            except (OSError, HTTPException) as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures >= TRIES or _is_final(error):
                    raise UnreachableError(_describe(error)) from error
            time.sleep(self.pause * 2 ** (failures - 1))

    def discard(self, part: Path) -> None:
        """Remove an unfinished file and its note."""
        part.unlink(missing_ok=True)
        _note(part).unlink(missing_ok=True)

    def _open(self, address: str, headers: dict[str, str], visit: _Visit) -> Any:
        plain = {"Accept-Encoding": "identity", "User-Agent": "cotgen-pl"}
        return build_opener(visit).open(Request(address, headers=plain | headers), timeout=TIMEOUT)

    def _attempt(self, address: str, part: Path) -> Answer:
        start, known = _size(part), _read_note(part)
        if not known:
            start = 0  # of which version it is cannot be told
        wanted = {"Range": f"bytes={start}-"} if start else {}
        visit = _Visit()
        try:
            response = self._open(address, wanted, visit)
        except HTTPError as error:
            if error.code == RANGE_NOT_SATISFIABLE:
                if _is_whole(error.headers, start, known, visit):
                    return visit.answer(error.headers)
                self.discard(part)
            raise
        with response:
            answer = visit.answer(response.headers)
            if not _goes_on(response, start, answer, known):
                if response.status == PARTIAL_CONTENT:
                    self.discard(part)
                    raise ConnectionError("the file changed between two parts of a download")
                start = 0
                _note(part).write_text(answer.etag or "", encoding="utf-8")
            self._receive(response, part, start)
        return answer

    def _receive(self, response: Any, part: Path, start: int) -> None:
        """Append the body of an answer to the `start` bytes that are there."""
        rest = response.headers["Content-Length"]
        total = start + int(rest) if rest is not None else None
        name = part.name.removeprefix(".").removesuffix(".part")
        hidden = None if self.show is None else not self.show
        with (
            part.open("r+b" if start else "wb") as file,
            tqdm(
                total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=hidden
            ) as bar,
        ):
            file.seek(start)
            file.truncate()
            while chunk := response.read(CHUNK):
                _write(file, chunk)
                bar.update(len(chunk))
        if total is not None and _size(part) != total:
            raise ConnectionError(f"the server broke off after {_size(part)} of {total} bytes")


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise ValueError(
            f"expected room for {file.name}, got: {error}; free some and run the command again"
        ) from error


def _goes_on(response: Any, start: int, answer: Answer, known: str) -> bool:
    """Whether an answer begins where the file at hand ends, and is of the same version."""
    if response.status != PARTIAL_CONTENT or answer.etag != known:
        return False
    return str(response.headers["Content-Range"]).startswith(f"bytes {start}-")


def _is_whole(headers: Message, start: int, known: str, visit: _Visit) -> bool:
    """Whether a server has no more to give because all of the file is there."""
    same = visit.answer(headers).etag == known
    return same and str(headers["Content-Range"]).endswith(f"*/{start}")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _read_note(part: Path) -> str:
    note = _note(part)
    return note.read_text(encoding="utf-8") if note.exists() else ""


def _is_final(error: Exception) -> bool:
    """Whether trying again is of no use."""
    return isinstance(error, HTTPError) and error.code < 500 and error.code not in PASSING


def _describe(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return str(error) or type(error).__name__
