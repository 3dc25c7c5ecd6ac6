"""The service against its engine, a plain Flask app and `mlflow models serve`; ten thousand requests with a killed process; cold start.

With names of networks after the script's name it is measured with these; the first stands for all where the network does not matter."""

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
from benchmark import save, seconds
from flask import Flask, jsonify, request
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.export import Engine, export_champion
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import read_slice

PREDICT, READY = "/api/v1/predict", "/v2/health/ready"
SIZE, NETWORKS, NORMALISE, ROUNDS, REFERENCE = 224, ("nasnetmobile", "resnet50"), "scaling", 5, 64
REQUESTS = int(os.environ.get("BENCH_REQUESTS", 10_000))
BIN = Path(sys.executable).parent
HOW = f"512×512 PNG; as profile paper serves its champion, at {SIZE} pixels, prepared by {NORMALISE}: "


def plain_app() -> Flask:
    """The app that a tutorial writes: gunicorn runs it with one worker of 8 threads."""
    from deeptumornet.lungs import see
    from deeptumornet.training import load_model

    model, app = load_model(Path(os.environ["BENCH_MODEL"])), Flask(__name__)

    @app.post("/")
    def predict():
        pixels = np.asarray(Image.open(BytesIO(request.get_data())).convert("L"))
        return jsonify(model.predict(see(pixels, SIZE, NORMALISE)[0][None, ..., None].astype("float32"), verbose=0).tolist())

    @app.get("/")
    def ready():
        return ""

    return app


def pngs(count: int) -> list[bytes]:
    """So many slices of 512×512, normal and with a mass in turn."""
    files = []
    for k in range(count):
        buffer = BytesIO()
        slice_ = Image.fromarray(window(slice_hu(draw_patient(k, bool(k % 2), 0), 0.1)[0]))
        slice_.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def make_champion(folder: Path, name: str) -> Path:
    """An untrained backbone with a head fitted to phantoms, whose answers lie between 0 and 1; the export chooses among all engines."""
    import keras
    import mlflow
    from sklearn.linear_model import LogisticRegression

    from deeptumornet.lungs import see
    from deeptumornet.training import add_head, build_body, load_backbone, load_network, save_model

    keras.utils.set_random_seed(0)
    network = load_network(name)
    body = build_body(load_backbone(network, SIZE, "none", Path(".")), network, SIZE)
    model = add_head(body, 2, {"units": 0, "dropout": 0.0}, 0)
    slices = np.stack([see(read_slice(data, "a.png").pixels, SIZE, NORMALISE)[0] for data in pngs(REFERENCE)])
    pictures = slices[..., None].astype("float32")
    features = keras.Model(model.input, model.get_layer("features").output).predict(pictures, verbose=0)
    centred = features - features.mean(0)
    weight = LogisticRegression().fit(centred / centred.std(), np.arange(REFERENCE) % 2).coef_[0]
    weight *= 2 / (centred @ weight).std()  # log odds that spread as a trained network's do
    bias = -features.mean(0) @ weight
    model.get_layer("probabilities").set_weights([np.stack([0 * weight, weight], 1), np.array([0.0, bias])])
    positive = model.predict(pictures, verbose=0)[:, 1]
    save_model(model, folder / "model.keras")
    mlflow.tensorflow.save_model(model, folder / "mlflow")
    threshold = float(np.quantile(positive[1::2], 0.05, method="lower"))
    card = {"network": name, "classes": ["normal", "adenocarcinoma"], "positive": "adenocarcinoma", "temperature": 1.0,
            "input": {"size": SIZE, "normalise": NORMALISE}, "threshold": {"value": threshold}}
    card = export_champion(folder, folder / "champion", card, slices)
    print(card["engine_why"], card["engines"], f"answers {positive.min():.3f} to {positive.max():.3f}", sep="\n")
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


def best_batch(engine: Engine, prepared: np.ndarray) -> tuple[float, int]:
    """The slices a second that `engine` does at its best batch, and that batch."""
    rates = []
    for batch in (1, 2, 4, 8, 16, 32):
        start = time.perf_counter()
        for _ in range(64 // batch):
            engine.predict(np.resize(prepared, (batch, *prepared.shape[1:])))
        rates.append((64 // batch * batch / (time.perf_counter() - start), batch))
    return max(rates)


def against_others(champion: Path, files: list[bytes], port: int, plain: int, mlflow: int, network: str) -> None:
    whole, single = Engine(champion, threads=os.cpu_count()), Engine(champion, threads=max(1, os.cpu_count() // 2))
    def alone(engine: Engine, data: bytes) -> np.ndarray:
        return engine.predict(engine.prepare(read_slice(data, "a.png").pixels)[0][None])[0]
    right = [alone(whole, data)[0, 1] for data in files]
    prepared = np.stack([whole.prepare(read_slice(data, "a.png").pixels)[0] for data in files])
    rows = [json.dumps({"inputs": p[None, ..., None].astype(float).tolist()}).encode() for p in prepared]
    wrong = []
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
        spent = []
        for _ in range(max(1, count // 100)):  # whoever comes after the other finds cold caches
            for one in (ours, lambda k: alone(single, files[k % 4])):
                spent.append([seconds(lambda k=k, one=one: one(k)) for k in range(25)])
        said["one"] = float(np.median(spent[::2]) / np.median(spent[1::2]))
        said["alone"], said["batch"] = best_batch(whole, prepared)
        said["engine_and_reading"] = load(len(engines), count // 2, lambda k: alone(engines[k % len(engines)], files[k % 4]))[0]
        said["ours"], ours_spent = load(32, count, ours)
        said["plain"], plain_spent = load(32, count // 4, tutorial)
        said["mlflow"], mlflow_spent = load(32, 32, scored)
        said["p99"] = [float(np.percentile(spent, 99)) for spent in (ours_spent, plain_spent, mlflow_spent)]
        if turn:  # the first warms all of them up
            rounds.append(said)
    assert not wrong, wrong[:3]
    each = {name: [r[name] for r in rounds] for name in rounds[0]}
    measured, each["alone"] = each["alone"], [max(each["alone"])] * len(rounds)  # OpenVINO in two threads has slow spells, of many seconds
    ratios = {name: np.divide(each["ours"], each[name]).tolist() for name in ("alone", "engine_and_reading", "plain", "mlflow")}
    how = f"{HOW}{network}; engine {whole.card['precision']}"
    save(f"serving_one_client_{network}", each["one"], "at most 1.15",
         "median seconds of a request by those of the engine, in as many threads as a process has, with reading and preparation, 25 and 25 "
         f"in turn; {how}")
    save(f"serving_by_engine_{network}", ratios["alone"], "at least 0.9",
         "requests a second of 32 clients on the same cores by slices a second of the engine alone, at the best batch of its best round; "
         f"{how}",
         per_second=each["ours"], alone_per_second=measured, best_batch=each["batch"],
         by_an_engine_a_core_that_reads_and_prepares=ratios["engine_and_reading"], wrong_answers=len(wrong),
         reading_and_preparing_engines_by_engine_alone=np.divide(each["engine_and_reading"], each["alone"]).tolist(),
         engine_alone_by_plain_flask=np.divide(each["alone"], each["plain"]).tolist())
    save(f"serving_by_plain_flask_{network}", ratios["plain"], "at least 5, with a lower p99",
         f"requests a second of 32 clients by those of a Flask app that calls model.predict, one worker of 8 threads; {how}",
         p99_seconds=each["p99"])
    save(f"serving_by_mlflow_{network}", ratios["mlflow"], "at least 20, with a lower p99",
         f"requests a second of 32 clients by those of `mlflow models serve`, which takes prepared slices as JSON; {how}",
         p99_seconds=each["p99"])


def endurance(port: int, master: psutil.Process, files: list[bytes], network: str) -> None:
    """REQUESTS requests of 64 clients; in the middle a process is killed. What was refused with 503 is sent again, as clients do, and so is
    what was not answered at all, which is counted."""
    right = [json.loads(ask(port, "POST", PREDICT, data)[1])["probability"] for data in files]
    met, memory, lock, (killed, survivor) = Counter(), [], threading.Lock(), master.children()
    def one(k: int) -> None:
        if k == REQUESTS // 2:
            killed.send_signal(signal.SIGKILL)
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
            memory.append((k, survivor.memory_info().rss))
    load(64, REQUESTS // 20, lambda k: ask(port, "POST", PREDICT, files[k % 4]))
    load(64, REQUESTS, one)
    first, last = (np.mean([m for k, m in memory if low <= k / REQUESTS < high]) for low, high in ((0, 0.1), (0.9, 1)))
    save("serving_memory", [float(last / first)], "at most 1.05, with every request right or refused with 503",
         f"resident memory in the last tenth of {REQUESTS} requests of 64 clients by that in the first, after a warm-up, of the "
         f"process that is left of two when one is killed in the middle; {HOW}{network}",
         met=dict(met), mb=[float(first) / 1e6, float(last) / 1e6])


def measure(network: str, first: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        files = pngs(4)
        champion = make_champion(Path(name), network)
        serve = [BIN / "deeptumornet", "serve", "--port", "PORT", "--champion", champion]
        tutorial = [BIN / "gunicorn", "--chdir", Path(__file__).parent, "--threads", 8, "-b", "127.0.0.1:PORT", "bench_serving:plain_app()"]
        scored = [BIN / "mlflow", "models", "serve", "-m", Path(name) / "mlflow", "--env-manager", "local", "-p", "PORT"]
        with running(serve, READY) as (port, _, _), running(scored, "/ping") as (mlflow, _, _), \
                running(tutorial, "/", BENCH_MODEL=f"{name}/model.keras") as (plain, _, _):
            against_others(champion, files, port, plain, mlflow, network)
        if not first:
            return
        starts = []
        for _ in range(ROUNDS):
            with running(serve, READY) as (_, _, spent):
                starts.append(spent)
        save("serving_cold_start", starts, "at most 5", f"seconds from the command to ready; {HOW}{network}")
        with running(serve, READY) as (port, master, _):
            endurance(port, master, files, network)


if __name__ == "__main__":
    for k, network in enumerate(sys.argv[1:] or NETWORKS):
        measure(network, not k)
