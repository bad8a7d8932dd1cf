"""moto's S3 over HTTP in a process of its own, with failures on request: python s3_server.py, which prints its port.

A POST of JSON to /_faults sets any of these, and returns the observations since the last one:

- latency: seconds before each answer
- refused, cut, ignored: how many requests for ranges get 503, half of the body, or all of the object
- forbidden: a part of the paths that get 403
- changed: [path, number], the number of range requests after which an object has other bytes
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

NONE: dict[str, Any] = {"latency": 0.0, "refused": 0, "cut": 0, "ignored": 0, "forbidden": "\0", "changed": None}


class Faults:
    """Passes requests on to an application, but for what was asked for."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.lock = threading.Lock()
        self.now = 0
        self.set({})

    def set(self, faults: dict[str, Any]) -> dict[str, Any]:
        seen = dict(getattr(self, "seen", {}))
        self.faults = {**NONE, **faults}
        self.seen = {"requests": 0, "ranges": [], "at_once": self.now}
        return seen

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == "/_faults":
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.set(json.loads(body))).encode()]
        with self.lock:
            self.now += 1
            self.seen["requests"] += 1
            self.seen["at_once"] = max(self.seen["at_once"], self.now)
        try:
            time.sleep(self.faults["latency"])
            return self.answer(path, method, environ, start_response)
        finally:
            with self.lock:
                self.now -= 1

    def answer(self, path: str, method: str, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.faults["forbidden"] in path:
            start_response("403 Forbidden", [("Content-Length", "0")])
            return []
        if method == "GET" and path.endswith("/") and path.count("/") > 2 and not environ["QUERY_STRING"]:
            return self.page(path, start_response)
        fault = None
        if method == "GET" and "HTTP_RANGE" in environ:
            fault = self.fault(path, environ["HTTP_RANGE"])
        if fault == "refused":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        # Servers that compress what they send do so, too.
        if fault == "ignored" or "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
            environ.pop("HTTP_RANGE", None)
        answered: list[Any] = []
        body = b"".join(self.application(environ, lambda *given: answered.extend(given)))
        start_response(*answered[:2])
        return [body[: len(body) // 2]] if fault == "cut" else [body]

    def fault(self, path: str, asked: str) -> str | None:
        with self.lock:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            self.seen["ranges"].append(last + 1 - first)
            changed = self.faults["changed"]
            if changed is not None and path == changed[0]:
                changed[1] -= 1
                if changed[1] < 0:
                    self.faults["changed"] = None
                    bucket, key = path[1:].split("/", 1)
                    backend = s3_backends["123456789012"]["aws"]
                    content = backend.get_object(bucket, key).value
                    backend.put_object(bucket, key, content[::-1])
            for fault in ("refused", "cut", "ignored"):
                if self.faults[fault] > 0:
                    self.faults[fault] -= 1
                    return fault
        return None

    def page(self, path: str, start_response: Any) -> Iterable[bytes]:
        """What a plain server of files shows of a folder."""
        bucket, prefix = path[1:].split("/", 1)
        names = s3_backends["123456789012"]["aws"].get_bucket(bucket).keys.keys()
        below = {name.removeprefix(prefix).partition("/")[0:2] for name in names if name.startswith(prefix)}
        links = "".join(f'<a href="{"".join(parts)}">{parts[0]}</a>' for parts in sorted(below))
        start_response("200 OK", [("Content-Type", "text/html")])
        return [f'<html><a href="?C=N;O=D">by name</a>{links}</html>'.encode()]


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    application = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    print(server.port, flush=True)
    server.serve_forever()
