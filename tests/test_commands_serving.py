"""`deeptumornet predict` and `deeptumornet serve`, as someone at a shell meets them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from pathlib import Path

import psutil
import pytest
import requests
from conftest import free_port

from deeptumornet.serving import MOST_LARGE, create_app
from deeptumornet.study import atomic, read_json, write_json

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
    port = free_port()
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


@pytest.fixture(scope="module")
def always_on(champion):
    with running([COMMAND, "serve", "--workers", "1", "--port", "PORT", "--champion", champion]) as (_, address):
        yield address


@pytest.fixture
def service(champion):
    with running([COMMAND, "serve", "--port", "PORT", "--champion", champion]) as found:
        yield found


@pytest.mark.parametrize(("sent", "status"), [
    (b"nonsense\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nA b: c\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nA: " + b"b" * 10_000 + b"\r\n\r\n", 431),
])
def test_what_is_no_http_is_refused_with_a_problem_document(always_on, sent, status):
    with socket.create_connection(("127.0.0.1", int(always_on.rsplit(":", 1)[1])), timeout=60) as client:
        client.sendall(sent)
        answer = HTTPResponse(client)
        answer.begin()
        assert answer.status == status and answer.getheader("Content-Type") == "application/problem+json"
        said = json.load(answer)
    assert said["status"] == status and "check its first line and its headers" in said["detail"]


def test_slow_clients_keep_nobody_waiting(champion, slice_png):
    words = ["serve", "--workers", "1", "--port", "PORT", "--champion", str(champion)]
    code = f"from deeptumornet import commands\ncommands.SLOWEST = 4.0\ncommands.main({words})"
    head = f"POST /api/v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(slice_png)}\r\n"
    with running([sys.executable, "-c", code]) as (_, address), ExitStack() as open_:
        place = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        slow = [open_.enter_context(socket.create_connection(place, timeout=60)) for _ in range(300)]
        for k, client in enumerate(slow):
            client.sendall(head.encode() + (b"\r\n" + slice_png[:100] if k % 2 else b""))
        start = time.monotonic()
        assert requests.post(f"{address}/api/v1/predict", data=slice_png, timeout=60).status_code == 200
        assert requests.get(f"{address}/v2/health/ready", timeout=60).status_code == 200
        assert time.monotonic() - start < 2.5, "three hundred slow clients are no reason to wait, and none of them has a slot"
        large = b"x" * 3_000_000
        for _ in range(MOST_LARGE):
            client = open_.enter_context(socket.create_connection(place, timeout=60))
            client.sendall(head.replace(str(len(slice_png)), str(len(large))).encode() + b"\r\n" + large[:100])
        time.sleep(0.5)
        refused = requests.post(f"{address}/api/v1/predict", data=large, timeout=60)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1", "of large bodies few lie in memory at once"
        said = [b"".join(iter(lambda c=client: c.recv(65536), b"")) for client in slow]
        assert all(answer.startswith(b"HTTP/1.1 400") and b"send it again" in answer for answer in said[1::2])
        assert not any(b"200 OK" in answer for answer in said)


def test_a_killed_worker_costs_no_answer_and_a_stop_finishes(service, slice_png):
    process, address = service
    def ask(_=0):
        return answered(address, slice_png)
    expected = ask()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            first = [pool.submit(ask) for _ in range(40)]
            time.sleep(0.05)
            worker = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
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


def answered(address: str, data: bytes) -> float:
    """The probability, asked for again where the service refuses with 503. A connection that breaks fails the test."""
    for _ in range(50):
        answer = requests.post(f"{address}/api/v1/predict", data=data, timeout=60)
        if answer.status_code == 200:
            return answer.json()["probability"]
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1", answer.text
        assert answer.headers["Content-Type"] == "application/problem+json" and answer.json()["status"] == 503
        time.sleep(0.1)
    raise AssertionError("never answered")


def test_a_worker_that_dies_over_a_request_refuses_it(champion, slice_png):
    words = ["serve", "--workers", "1", "--port", "PORT", "--champion", str(champion)]
    code = ("import time\nfrom deeptumornet import commands, export\n"
            "run = export.Engine.predict\n"
            "export.Engine.predict = lambda self, slices, *beside: slices.any() and time.sleep(3) or run(self, slices, *beside)\n"
            f"commands.main({words})")
    with running([sys.executable, "-c", code]) as (process, address), ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(requests.post, f"{address}/api/v1/predict", data=slice_png, timeout=60) for _ in range(8)]
        time.sleep(1.5)
        os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]), signal.SIGKILL)
        said = [task.result() for task in asked]
        assert [one.status_code for one in said] == [503] * 8 and all("send it again" in one.json()["detail"] for one in said)
        assert requests.post(f"{address}/api/v1/predict", data=slice_png, timeout=60).status_code == 200


def test_the_champion_changes_twice_within_a_second_under_load(champion, slice_png, tmp_path):
    served = tmp_path / "champion"
    shutil.copytree(champion, served)

    def crown(version: str) -> None:
        with atomic(served) as folder:
            shutil.copytree(champion, folder)
            write_json(folder / "card.json", {**read_json(folder / "card.json"), "version": version})

    with running([COMMAND, "serve", "--port", "PORT", "--champion", served]) as (process, address), ThreadPoolExecutor(8) as pool:
        expected, changed = answered(address, slice_png), threading.Event()
        def ask(_):
            said = set()
            while not changed.is_set():
                said.add(answered(address, slice_png))
            return said
        asked = [pool.submit(ask, k) for k in range(8)]
        for version in ("second", "third"):
            time.sleep(0.6)
            crown(version)
        while requests.get(f"{address}/api/v1/model", timeout=60).json()["version"] != "third" and not any(task.done() for task in asked):
            time.sleep(0.1)
        changed.set()
        assert set().union(*[task.result() for task in asked]) == {expected}
        time.sleep(2)  # the other process of this champion has come up, too
        (served / "card.json").write_text("half")
        psutil.Process(process.pid).children()[0].kill()
        time.sleep(4)  # the new process cannot load it, and the other goes on
        assert process.poll() is None and answered(address, slice_png) == expected, "a champion that is not whole is not taken up"


def test_idle_connections_keep_no_stop_waiting(service):
    process, address = service
    with requests.Session() as kept, socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))):
        assert kept.get(f"{address}/v2/health/live", timeout=60).status_code == 200
        start = time.monotonic()
        process.terminate()
        assert process.wait(60) == 0 and time.monotonic() - start < 20, "as browsers keep them: one asked before, one asked nothing yet"
