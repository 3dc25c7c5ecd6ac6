"""The service against its engine, a plain Flask app and `mlflow models serve`; ten thousand requests with a killed process; cold start."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
from benchmark import save
from flask import Flask, jsonify, request
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.export import Engine, export_champion
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import read_slice

PREDICT, READY = "/api/v1/predict", "/v2/health/ready"
SIZE, NETWORK, ROUNDS = 224, "nasnetmobile", 3
REQUESTS = int(os.environ.get("BENCH_REQUESTS", 10_000))
BIN = Path(sys.executable).parent
HOW = f"512×512 PNG, {NETWORK} at {SIZE} pixels"


def plain_app() -> Flask:
    """The app that a tutorial writes: gunicorn runs it with one worker of 8 threads."""
    from deeptumornet.lungs import see
    from deeptumornet.training import load_model

    model, app = load_model(Path(os.environ["BENCH_MODEL"])), Flask(__name__)

    @app.post("/")
    def predict():
        pixels = np.asarray(Image.open(BytesIO(request.get_data())).convert("L"))
        return jsonify(model.predict(see(pixels, SIZE, "lungs")[0][None, ..., None].astype("float32"), verbose=0).tolist())

    @app.get("/")
    def ready():
        return ""

    return app


def pngs() -> list[bytes]:
    """Four slices of 512×512, normal and with a mass in turn."""
    files = []
    for k in range(4):
        buffer = BytesIO()
        slice_ = Image.fromarray(window(slice_hu(draw_patient(k, bool(k % 2), 0), 0.1)[0]))
        slice_.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def make_champion(folder: Path, files: list[bytes]) -> Path:
    import keras
    import mlflow

    from deeptumornet.lungs import see
    from deeptumornet.training import add_head, build_body, load_backbone, load_network, save_model

    keras.utils.set_random_seed(0)
    network = load_network(NETWORK)
    model = add_head(build_body(load_backbone(network, SIZE, "none", Path(".")), network, SIZE), 2, {"units": 0, "dropout": 0.0}, 0)
    save_model(model, folder / "model.keras")
    mlflow.tensorflow.save_model(model, folder / "mlflow")
    reference = np.stack([see(read_slice(data, "a.png").pixels, SIZE, "lungs")[0] for data in files])
    card = {"network": NETWORK, "classes": ["normal", "adenocarcinoma"], "positive": "adenocarcinoma", "temperature": 1.0,
            "input": {"size": SIZE, "normalise": "lungs"}, "threshold": {"value": 0.3}}
    export_champion(folder, folder / "champion", card, reference, precisions=["float32", "float32_openvino"])
    return folder / "champion"


@contextmanager
def running(words: list, ready: str, **env: str) -> Iterator[tuple[int, psutil.Process, float]]:
    """A service on a free port, once `ready` answers 200: the port, its process, and the seconds until then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    words = [str(word).replace("PORT", str(port)) for word in words]
    process = subprocess.Popen(words, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while ask(port, "GET", ready)[0] != 200:
            if process.poll() is not None or time.perf_counter() - start > 300:
                raise RuntimeError(f"{words} did not start")
            time.sleep(0.02)
        yield port, psutil.Process(process.pid), time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(60)


def ask(port: int, method: str, path: str, data: bytes | None = None, kind: str = "image/png") -> tuple[int, bytes]:
    """Status and body of one request; status 0 where the connection failed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, data, {"Content-Type": kind} if data else {})
        response = connection.getresponse()
        return response.status, response.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def load(clients: int, count: int, one: Callable[[int], None]) -> tuple[float, np.ndarray]:
    """Requests a second and the seconds of each, of `count` calls of `one` by so many clients."""
    def timed(k: int) -> float:
        start = time.perf_counter()
        one(k)
        return time.perf_counter() - start
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        spent = np.array(list(pool.map(timed, range(count))))
    return count / (time.perf_counter() - start), spent


def against_others(champion: Path, files: list[bytes], port: int, plain: int, mlflow: int) -> None:
    whole, single = Engine(champion, threads=os.cpu_count()), Engine(champion, threads=max(1, os.cpu_count() // 2))
    def alone(engine: Engine, data: bytes) -> np.ndarray:
        return engine.predict(engine.prepare(read_slice(data, "a.png").pixels)[0][None])[0]
    right = [alone(whole, data)[0, 1] for data in files]
    prepared = [whole.prepare(read_slice(data, "a.png").pixels)[0] for data in files]
    rows = [json.dumps({"inputs": p[None, ..., None].astype(float).tolist()}).encode() for p in prepared]
    batch, wrong = np.stack(prepared * 8), []
    def ours(k: int) -> None:
        status, said = ask(port, "POST", PREDICT, files[k % 4])
        if status != 200 or abs(json.loads(said)["probability"] - right[k % 4]) > 1e-4:
            wrong.append((status, said))
    def tutorial(k: int) -> None:
        assert ask(plain, "POST", "/", files[k % 4])[0] == 200
    def scored(k: int) -> None:
        assert ask(mlflow, "POST", "/invocations", rows[k % 4], "application/json")[0] == 200
    engines = [single] + [Engine(champion, threads=1) for _ in range(os.cpu_count() - 1)]
    count = max(64, REQUESTS // 25)
    rounds = []
    for turn in range(ROUNDS + 1):
        said = {}
        said["one"] = np.median(load(1, count // 4, ours)[1]) / np.median(load(1, count // 4, lambda k: alone(single, files[k % 4]))[1])
        start = time.perf_counter()
        whole.predict(batch)
        said["best_batch"] = len(batch) / (time.perf_counter() - start)
        said["engine_and_reading"] = load(len(engines), count // 2, lambda k: alone(engines[k % len(engines)], files[k % 4]))[0]
        said["ours"], ours_spent = load(32, count, ours)
        said["plain"], plain_spent = load(32, count // 4, tutorial)
        said["mlflow"], mlflow_spent = load(32, 32, scored)
        said["p99"] = [float(np.percentile(spent, 99)) for spent in (ours_spent, plain_spent, mlflow_spent)]
        if turn:  # the first warms all of them up
            rounds.append(said)
    assert not wrong, wrong[:3]
    each = {name: [r[name] for r in rounds] for name in rounds[0]}
    ratios = {name: np.divide(each["ours"], each[name]).tolist() for name in ("best_batch", "engine_and_reading", "plain", "mlflow")}
    save("serving_one_client", each["one"], "at most 1.15",
         f"median seconds of a request by those of the engine, in as many threads as a process has, with reading and preparation; {HOW}")
    save("serving_by_engine", ratios["engine_and_reading"], "at least 0.9",
         f"requests a second of 32 clients by what as many engines as cores do with reading and preparation, and no HTTP; {HOW}",
         per_second=each["ours"], by_the_engine_alone_at_batch_32=ratios["best_batch"], wrong_answers=len(wrong))
    save("serving_by_plain_flask", ratios["plain"], "at least 5, with a lower p99",
         f"requests a second of 32 clients by those of a Flask app that calls model.predict, one worker of 8 threads; {HOW}",
         p99_seconds=each["p99"])
    save("serving_by_mlflow", ratios["mlflow"], "at least 20, with a lower p99",
         f"requests a second of 32 clients by those of `mlflow models serve`, which is sent prepared slices; {HOW}",
         p99_seconds=each["p99"])


def endurance(port: int, master: psutil.Process, files: list[bytes]) -> None:
    """REQUESTS requests of 64 clients; in the middle a process is killed. A request whose connection broke is sent again, as clients do."""
    right = [json.loads(ask(port, "POST", PREDICT, data)[1])["probability"] for data in files]
    met, memory, lock = Counter(), [], threading.Lock()
    def one(k: int) -> None:
        if k == REQUESTS // 2:
            master.children()[0].send_signal(signal.SIGKILL)
        while True:
            status, said = ask(port, "POST", PREDICT, files[k % 4])
            what = {0: "broken connection", 503: "refused with 503"}.get(status, f"status {status}")
            if status == 200:
                what = "right" if abs(json.loads(said)["probability"] - right[k % 4]) <= 1e-4 else "wrong"
            with lock:
                met[what] += 1
            if status not in (0, 503):
                break
            time.sleep(0.2)
        if k % max(1, REQUESTS // 200) == 0:
            memory.append((k, np.mean([child.memory_info().rss for child in master.children()])))
    load(64, REQUESTS // 20, lambda k: ask(port, "POST", PREDICT, files[k % 4]))
    load(64, REQUESTS, one)
    first, last = (np.mean([m for k, m in memory if low <= k / REQUESTS < high]) for low, high in ((0, 0.1), (0.9, 1)))
    save("serving_memory", [float(last / first)], "at most 1.05, with every request right or refused with 503",
         f"resident memory of a process in the last tenth of {REQUESTS} requests of 64 clients by that in the first; one of two "
         f"processes is killed in the middle; {HOW}", met=dict(met), mb=[float(first) / 1e6, float(last) / 1e6])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        files = pngs()
        champion = make_champion(Path(name), files)
        serve = [BIN / "deeptumornet", "serve", "--port", "PORT", "--champion", champion]
        starts = []
        for _ in range(ROUNDS):
            with running(serve, READY) as (_, _, spent):
                starts.append(spent)
        save("serving_cold_start", starts, "at most 5", f"seconds from the command to ready; {HOW}")
        tutorial = [BIN / "gunicorn", "--chdir", Path(__file__).parent, "--threads", 8, "-b", "127.0.0.1:PORT", "bench_serving:plain_app()"]
        scored = [BIN / "mlflow", "models", "serve", "-m", Path(name) / "mlflow", "--env-manager", "local", "-p", "PORT"]
        with running(serve, READY) as (port, _, _), running(scored, "/ping") as (mlflow, _, _), \
                running(tutorial, "/", BENCH_MODEL=f"{name}/model.keras") as (plain, _, _):
            against_others(champion, files, port, plain, mlflow)
        with running(serve, READY) as (port, master, _):
            endurance(port, master, files)
