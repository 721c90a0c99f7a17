"""Servers on loopback for tests of what asks over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on loopback that a handler answers for, and its address."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


@contextmanager
def server(*replies: tuple[Any, ...]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives the replies in turn, the last one for ever, and keeps what it was asked.

    A reply is (status, content) or (status, content, headers); content is bytes, a JSON value, or a function of the request's
    body. Status 0 keeps the caller waiting for `content` seconds and hangs up.
    """
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append(
                    {"body": body, "key": self.headers.get("Authorization"), "path": self.path, "at": time.monotonic()}
                )
                code, content, *headers = replies[min(len(asked), len(replies)) - 1]
            if code == 0:
                time.sleep(content)
                return
            content = content(body) if callable(content) else content
            self.send_response(code)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with answering(Handler) as address:
        yield f"{address}/score", asked
