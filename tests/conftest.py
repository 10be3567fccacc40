"""Shared fixtures: tiny models made on the spot, and the real files where UNA_REAL_DATA names them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
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
def vllm_server(tiny_model, tmp_path_factory):
    """The address and the key of an OpenAI-compatible vLLM server with the tiny model as `tiny`; a minute to start."""
    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, log = "sk-of-the-test-server", tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", "--enforce-eager"]
    # a random model would write blanks for ever where JSON allows them
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": key}
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1", key
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # it has processes of its own
        server.wait(30)


def _wait_for(url, server, log, seconds=400):
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-3000:]
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


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


def write_jsonl(path: Path, records) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path
