"""`moedist report --serve`: the page from a small server on this machine, which follows runs while they go on."""

from __future__ import annotations

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Sequence

from moedist.errors import MoedistError
from moedist.report.page import content, render
from moedist.report.read import read_run


def make_server(paths: Sequence[str], host: str, port: int, refresh_s: float) -> ThreadingHTTPServer:
    """A server of two pages, `/` and `/content.json`, both made anew from the run folders at every request.

    Raises:
        MoedistError: the port is taken.
    """
    def page() -> tuple[str, bytes]:
        return "text/html; charset=utf-8", render([read_run(path) for path in paths], refresh_s).encode()

    def newest() -> tuple[str, bytes]:
        return "application/json", json.dumps(content([read_run(path) for path in paths]), allow_nan=False).encode()

    pages: dict[str, Callable[[], tuple[str, bytes]]] = {"/": page, "/content.json": newest}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            make = pages.get(self.path.partition("?")[0])
            if make is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                kind, data = make()
            except MoedistError as error:  # such as a run folder that has gone
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error)[:200])
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Says nothing: there is a request every few seconds."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise MoedistError(f"cannot serve on {host}:{port} ({error.strerror}); choose another port with --port, or 0 for any "
                           "that is free") from error


def serve(paths: Sequence[str], host: str, port: int, refresh_s: float, say: Callable[[str], None] = print) -> None:
    """Serve until interrupted."""
    for path in paths:
        read_run(path)  # what is no run is told at once
    with make_server(paths, host, port, refresh_s) as server:
        say(f"report on http://{host}:{server.server_address[1]}/ (new content every {refresh_s:g} s; end with Ctrl-C); from "
            f"another machine: ssh -L {server.server_address[1]}:localhost:{server.server_address[1]} HOST")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
