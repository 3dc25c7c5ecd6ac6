"""`deeptumornet predict` and `deeptumornet serve`, as someone at a shell meets them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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


@pytest.fixture
def service(champion):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([COMMAND, "serve", "--port", str(port), "--champion", champion], stderr=subprocess.PIPE, text=True)
    address, start = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
        assert process.poll() is None and time.monotonic() - start < 120, process.stderr.read()
        try:
            assert requests.get(f"{address}/v2/health/ready", timeout=60).status_code == 200
            break
        except requests.ConnectionError:
            time.sleep(0.05)
    yield process, address
    process.terminate()
    process.wait(60)


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
    master = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    worker = int(Path(f"/proc/{master}/task/{master}/children").read_text().split()[0])
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
