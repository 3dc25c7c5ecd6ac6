"""`deeptumornet predict` and `deeptumornet serve`, as someone at a shell meets them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests

from deeptumornet.serving import create_app

COMMAND = Path(sys.executable).with_name("deeptumornet")


def test_predict_says_what_the_service_says(champion, slice_png, tmp_path):
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    good.write_bytes(slice_png)
    bad.write_bytes(b"a note")
    words = [COMMAND, "predict", good, bad, tmp_path / "c.png", "--champion", champion]
    done = subprocess.run([*words, "--json"], capture_output=True, text=True)
    said = json.loads(done.stdout)
    expected = create_app(champion).test_client().post("/api/v1/predict", data=slice_png).json
    assert said[0] == {"file": str(good), **expected} and done.returncode == 1
    assert "not a PNG, JPEG or DICOM" in said[1]["error"] and "cannot be read" in said[2]["error"]
    lines = subprocess.run([*words[:3], *words[-2:]], capture_output=True, text=True)
    assert lines.returncode == 0 and f"{expected['probability']:.4f} for adenocarcinoma" in lines.stdout


@contextmanager
def running(words: list):
    """A service that answers, as its process and address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([str(word).replace("PORT", str(port)) for word in words], stderr=subprocess.PIPE, text=True)
    address, start = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            assert process.poll() is None and time.monotonic() - start < 120, process.stderr.read()
            try:
                assert requests.get(f"{address}/v2/health/ready", timeout=60).status_code == 200
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        yield process, address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def service(champion):
    with running([COMMAND, "serve", "--port", "PORT", "--champion", champion]) as found:
        yield found


def test_slow_clients_keep_nobody_waiting(champion, slice_png):
    words = ["serve", "--workers", "1", "--port", "PORT", "--champion", str(champion)]
    code = f"from deeptumornet import commands\ncommands.SLOWEST = 3.0\ncommands.main({words})"
    head = f"POST /api/v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(slice_png)}\r\n"
    with running([sys.executable, "-c", code]) as (_, address), ExitStack() as open_:
        place = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        slow = [open_.enter_context(socket.create_connection(place, timeout=60)) for _ in range(50)]
        for k, client in enumerate(slow):
            client.sendall(head.encode() + (b"\r\n" + slice_png[:100] if k % 2 else b""))
        start = time.monotonic()
        assert requests.post(f"{address}/api/v1/predict", data=slice_png, timeout=60).status_code == 200
        assert time.monotonic() - start < 2.5, "fifty slow clients are no reason to wait, and none of them has a slot"
        said = [b"".join(iter(lambda c=client: c.recv(65536), b"")) for client in slow]
        assert all(answer.startswith(b"HTTP/1.1 400") and b"send it again" in answer for answer in said[1::2])
        assert not any(b"200 OK" in answer for answer in said)


def test_a_killed_worker_costs_no_answer_and_a_stop_finishes(service, slice_png):
    process, address = service
    def ask(_=0):
        for _ in range(20):  # a connection that died with its worker is opened again, as clients do
            try:
                answer = requests.post(f"{address}/api/v1/predict", data=slice_png, timeout=60)
            except requests.ConnectionError:
                continue
            if answer.status_code != 503:
                return answer.json()["probability"]
            assert answer.headers["Retry-After"] == "1"
        raise AssertionError("never answered")
    expected = ask()
    worker = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(ask) for _ in range(40)]
        os.kill(worker, signal.SIGKILL)
        assert {task.result() for task in [*first, *[pool.submit(ask) for _ in range(40)]]} == {expected}
        counted = requests.get(f"{address}/metrics", timeout=60).text
        assert 'deeptumornet_requests_total{address="/api/v1/predict",status="200"}' in counted
    port = int(address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as half:
        head = f"POST /api/v1/predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(slice_png)}\r\n\r\n"
        half.sendall(head.encode() + slice_png[:1000])
        time.sleep(1)
        process.terminate()
        time.sleep(0.5)
        half.sendall(slice_png[1000:])
        answer = b"".join(iter(lambda: half.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and str(expected).encode() in answer
    assert process.wait(60) == 0


def test_idle_connections_keep_no_stop_waiting(service):
    process, address = service
    with requests.Session() as kept, socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))):
        assert kept.get(f"{address}/v2/health/live", timeout=60).status_code == 200
        start = time.monotonic()
        process.terminate()
        assert process.wait(60) == 0 and time.monotonic() - start < 20, "as browsers keep them: one asked before, one asked nothing yet"
