"""The speed and the memory of a count from a store, beside the same file on disk.

    python benchmarks/remote.py [--mebibytes 2048]        needs `pip install s3fs`

The store is a server on this machine with the part of S3 that reading needs. It waits for the latency before each
answer, and limits the bytes a second of each connection. Server and count share the processors.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VOCAB_SIZE = 50257
PACE_BYTES = 2**18
# Latency in seconds, bytes a second and connection (0: unlimited), threads.
CASES = ((0, 0, 2), (0, 0, 4), (0.05, 0, 2), (0.05, 0, 4), (0.05, 1e8, 1), (0.05, 1e8, 2), (0.05, 1e8, 4))
COUNT = """
import json, re, sys, time
from pathlib import Path
from pdl_ext.corpus import count_corpus
begin, processor = time.perf_counter(), time.process_time()
count_corpus([sys.argv[1]], int(sys.argv[2]), dtype="uint16", threads=int(sys.argv[3]))
seconds = time.perf_counter() - begin
status = dict(re.findall(r"(VmHWM|RssFile):\\s*(\\d+) kB", Path("/proc/self/status").read_text()))
print(json.dumps([seconds, time.process_time() - processor, (int(status["VmHWM"]) - int(status["RssFile"])) / 1024]))
"""


def serve(file: Path, latency: float, rate: float) -> None:
    """Serves one file as the object of a bucket; prints the port."""
    size = file.stat().st_size

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(0, size, body=False)

        def do_GET(self) -> None:
            if "list-type" in self.path:
                self.list()
                return
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or f"bytes=0-{size - 1}")
            assert asked is not None
            self.answer(int(asked[1]), int(asked[2]) + 1, body=True)

        def list(self) -> None:
            time.sleep(latency)
            entry = f'<Key>{file.name}</Key><Size>{size}</Size><ETag>"1"</ETag>'
            date = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            body = f"<ListBucketResult><Contents>{entry}{date}</Contents></ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, start: int, stop: int, body: bool) -> None:
            time.sleep(latency)
            if not self.path.endswith(f"/{file.name}"):
                self.send_error(404)
                return
            self.send_response(200 if stop - start == size else 206)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("ETag", '"1"')
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if not body:
                return
            self.wfile.flush()
            begin, sent = time.perf_counter(), 0
            with open(file, "rb") as source:
                while start + sent < stop:
                    piece = min(PACE_BYTES, stop - start - sent) if rate else stop - start - sent
                    sent += os.sendfile(self.connection.fileno(), source.fileno(), start + sent, piece)
                    if rate:
                        time.sleep(max(0.0, begin + sent / rate - time.perf_counter()))

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def measured(name: str, threads: int, port: int | None = None) -> list[float]:
    """Seconds, processor seconds and mebibytes of a count in a process of its own."""
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    environment |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
    command = [sys.executable, "-c", COUNT, name, str(VOCAB_SIZE), str(threads)]
    found: list[float] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a count from a store beside one from disk.")
    parser.add_argument("--mebibytes", type=int, default=2048, help="of uint16 ids (default: %(default)s)")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        file, latency, rate = options.serve
        serve(Path(file), float(latency), float(rate))
        return
    print(
        "| from | latency | a connection | threads | MB/s | processor s/GB | peak MiB |\n|---|---|---|---|---|---|---|"
    )

    def row(name: str, latency: float, rate: float, threads: int, port: int | None) -> None:
        seconds, processor, peak = measured(name, threads, port)
        gigabytes = options.mebibytes * 2**20 / 1e9
        connection = f"{rate / 1e6:.0f} MB/s" if rate else "free"
        case = f"| {'s3' if port else 'disk, cached'} | {1000 * latency:.0f} ms | {connection} | {threads} "
        found = f"| {1000 * gigabytes / seconds:,.0f} | {processor / gigabytes:.2f} | {peak:,.0f} |"
        print(case + found, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ids.bin"
        block = np.random.default_rng(0).zipf(1.1, 2**19).astype(np.uint64) % VOCAB_SIZE
        with open(file, "wb") as written:
            for _ in range(options.mebibytes):
                written.write(block.astype("<u2").tobytes())
        row(str(file), 0, 0, 2, None)
        for latency, rate, threads in CASES:
            command = [sys.executable, __file__, "--serve", str(file), str(latency), str(rate)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                try:
                    row(f"s3://bucket/{file.name}", latency, rate, threads, int(server.stdout.readline()))
                finally:
                    server.kill()


if __name__ == "__main__":
    main()
