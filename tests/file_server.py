"""A local HTTP server whose files break off, change, forget ranges or are not there."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file: what it is, and how badly it is served."""

    content: bytes
    etag: str | None = '"one"'
    breaks: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off, in their order."""
    ranges: bool = True
    status: list[int] = field(default_factory=list)
    """Of the next answers, before it is served."""
    redirect: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FileServer:
    """Where it listens, what it serves, and what it was asked for: (path, Range)."""

    address: str
    files: dict[str, Served]
    asked: list[tuple[str, str | None]]

    def serve_repository(self, name: str, files: dict[str, bytes], commit: str = "c0ffee") -> None:
        """Serve files as the Hugging Face hub does, large ones from a storage of its own."""
        listing = {"sha": commit, "siblings": [{"rfilename": file} for file in files]}
        content = json.dumps(listing).encode()
        self.files[f"/api/models/{name}/revision/main"] = Served(content)
        for file, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            self.files[f"/storage/{digest}"] = Served(content, '"of-the-storage"')
            marks = {"X-Repo-Commit": commit, "X-Linked-ETag": f'"{digest}"'}
            for revision in ("main", commit):
                self.files[f"/{name}/resolve/{revision}/{file}"] = Served(
                    b"", redirect=f"/storage/{digest}", headers=marks
                )


class Handler(BaseHTTPRequestHandler):
    """Answers for the `state` of its server."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state: FileServer = self.server.state
        wanted = self.headers["Range"]
        state.asked.append((self.path, wanted))
        served = state.files.get(self.path)
        status = served.status.pop(0) if served and served.status else 200
        if served is None or status != 200:
            self.send_error(status if served else 404)
        elif served.redirect:
            self.answer(302, {"Location": served.redirect, **served.headers}, b"")
        else:
            self.give(served, wanted)

    def give(self, served: Served, wanted: str | None) -> None:
        start = int(wanted[6:].split("-")[0]) if wanted and served.ranges else 0
        total = len(served.content)
        headers = dict(served.headers)
        if served.etag:
            headers["ETag"] = served.etag
        if start and start >= total:
            self.answer(416, headers | {"Content-Range": f"bytes */{total}"}, b"")
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        headers["Content-Length"] = str(total - start)
        end = start + served.breaks.pop(0) if served.breaks else total
        self.answer(206 if start else 200, headers, served.content[start:end])

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running() -> Iterator[FileServer]:
    """A server on a free port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.state = FileServer(f"http://127.0.0.1:{server.server_address[1]}", {}, [])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.state
        server.shutdown()
