"""Shared fixtures: tiny models made on the spot, and the real files where UNA_REAL_DATA names them."""

import json
import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "examples"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama with the demo's byte-level tokenizer and chat template."""
    import demo

    return Path(demo.tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def vllm_engine(tiny_model):
    """The one vLLM engine of a test session: it takes a minute to start."""
    pytest.importorskip("vllm")
    from pipelines import engines

    return engines.load("vllm", str(tiny_model), dtype="float32", batch_tokens=2048, max_length=1024)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real feedback files; skips where there is none."""
    where = os.environ.get("UNA_REAL_DATA")
    if not where or not Path(where).is_dir():
        pytest.skip("UNA_REAL_DATA does not name a directory of real files")
    return Path(where)


@pytest.fixture
def una():
    """Run the command line in a process of its own; the result has .returncode, .stdout, .stderr and .json."""

    def call(*args, **kwargs):
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=kwargs.pop("cwd", REPO),
            **kwargs,
        )
        lines = done.stdout.strip().splitlines()
        done.json = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
        return done

    return call


@pytest.fixture
def una_here(capsys):
    """Run the command line in this process, which is quicker: returns (exit code, stdout, stderr)."""
    from pipelines.cli import main

    def call(*args):
        capsys.readouterr()
        try:
            code = main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@contextmanager
def served(argv: list[str], **env: str) -> Iterator[str]:
    """Start a server in a process of its own; the address that it says it listens on."""
    server = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    try:
        assert server.stderr
        said = next((line for line in server.stderr if "http://" in line), "")
        found = re.search(r"http://127[.]0[.]0[.]1:[0-9]+", said)
        assert found, said
        threading.Thread(target=server.stderr.read, daemon=True).start()  # so that it never waits for a reader
        yield found.group()
    finally:
        server.kill()
        server.wait()


MOTO = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3, and keeps its objects in memory."""
    pytest.importorskip("moto")
    with served(MOTO) as address:
        yield address


class Bucket:
    """An S3 bucket as its user sees it."""

    def __init__(self, address: str):
        import boto3

        self.client = boto3.client("s3", endpoint_url=address)
        self.name = f"b-{uuid.uuid4().hex}"
        self.url = f"s3://{self.name}"
        self.client.create_bucket(Bucket=self.name)

    def put(self, key: str, data: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)
        return f"{self.url}/{key}"

    def put_all(self, directory: Path, under: str) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{under}/{path.relative_to(directory)}", path.read_bytes())

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def keys(self, under: str = "") -> list[str]:
        listed = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=under)
        return [item["Key"] for page in listed for item in page.get("Contents", [])]


@pytest.fixture
def bucket(s3_server, monkeypatch) -> Bucket:
    """A new bucket, which the environment lets everybody use."""
    for name, value in (("ENDPOINT_URL", s3_server), ("ACCESS_KEY_ID", "me"), ("SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return Bucket(s3_server)


def write_jsonl(path: Path, records) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path
