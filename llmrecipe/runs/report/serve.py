"""A run's report on this machine's loopback address, made again whenever the run has written something."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from llmrecipe.core.errors import UserError
from llmrecipe.core.listening import LOOPBACK, cannot_serve
from llmrecipe.runs.events import FILE
from llmrecipe.runs.report.page import run_page
from llmrecipe.runs.report.render import policy
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.runs.verified import VERIFIED

READ = (FILE, "status.json", "report.json", "recipe.yaml", "final/metrics.json", VERIFIED)
"""Files of a run whose change makes another page."""


class ReportServer(ThreadingHTTPServer):
    """Serves one page, to this machine alone.

    Requests have to name the loopback address as their host: a page of the web whose name is pointed here reads nothing.

    Args:
        run: the run directory.
        port: 0 takes a free one.

    Raises:
        RunError: there is no run, one of its files is damaged, or the port is in use.
    """

    daemon_threads = True

    def __init__(self, run: Path, port: int = 0):
        self.run = run
        self._making = threading.Lock()
        self._made = ("", b"")
        self.current()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise cannot_serve(LOOPBACK, port, error) from error

    @property
    def address(self) -> str:
        """Return the address of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def current(self) -> tuple[str, bytes]:
        """Return the page's version and its content, made again if the run has changed since the last time.

        Raises:
            RunError: the run's folder cannot be read.
        """
        with self._making:
            version = self._version()
            if version != self._made[0]:
                self._made = (version, run_page(self.run, live=True).encode())
            return self._made

    def _version(self) -> str:
        """Return a text that changes with the run; a killed one changes nothing but its lock."""
        parts = [str(RunDir.open(self.run, write=False).locked())]
        for name in READ:
            try:
                facts = (self.run / name).stat()
            except OSError:
                continue
            parts.append(f"{name}:{facts.st_size}:{facts.st_mtime_ns}")
        return f'"{" ".join(parts)}"'


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        """Answer with the page, or with nothing where the reader has it."""
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            self._reply(HTTPStatus.MISDIRECTED_REQUEST, b"This page is for this machine alone.\n")
        elif self.path != "/":
            self._reply(HTTPStatus.NOT_FOUND, b"There is one page: /\n")
        else:
            try:
                version, content = self.server.current()
            except UserError as error:
                self._reply(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
                return
            if self.headers.get("If-None-Match") == version:
                self._reply(HTTPStatus.NOT_MODIFIED, b"", version)
            else:
                self._reply(HTTPStatus.OK, content, version, "text/html; charset=utf-8")

    do_HEAD = do_GET

    def _reply(self, status: HTTPStatus, content: bytes, version: str = "", kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"{policy(live=True)}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            **({"ETag": version} if version else {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""
