"""An S3 server on this machine, for tests: started once a process, with failures on request."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import fresh_python
import pytest

pytest.importorskip("moto", reason="moto is not installed: pip install 'pdl_ext[test]'")
pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'pdl_ext[test]'")

import boto3

__all__ = ["S3", "started"]

BUCKET = "bucket"
SECRET = "hush-hush"


class S3:
    """The server, as its users see it: `url` of a key for s3fs, `http` for any program."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Ours are what is tested.
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        os.environ.update(self.environment)
        self.client = boto3.client("s3")
        self.client.create_bucket(Bucket=BUCKET)

    def url(self, key: str) -> str:
        return f"s3://{BUCKET}/{key}"

    def http(self, key: str) -> str:
        return f"http://{self.address}/{BUCKET}/{key}"

    def put(self, key: str, content: bytes) -> str:
        """Puts an object that all may read."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content, ACL="public-read")
        return self.url(key)

    def put_folder(self, key: str, folder: Path) -> str:
        """Puts all files of a folder."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder)}", file.read_bytes())
        return self.url(f"{key}/")

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [entry["Key"].removeprefix(prefix) for entry in found]

    def faults(self, **faults: Any) -> dict[str, Any]:
        """Sets the failures to come, none if none is given; returns what was seen since the last time."""
        body = json.dumps(faults).encode()
        with urllib.request.urlopen(f"http://{self.address}/_faults", body) as answer:
            return json.load(answer)


@functools.lru_cache(maxsize=1)
def started() -> S3:
    """The server of this process, without failures to come."""
    process = fresh_python.popen(Path(__file__).with_name("s3_server.py"), stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    assert process.stdout is not None
    return S3(int(process.stdout.readline()))
