"""An answer of the service with the prediction log by one without it."""

import tempfile
from pathlib import Path

import numpy as np
from bench_serving import HOW, make_champion, pngs
from benchmark import save, seconds
from tqdm import tqdm

from deeptumornet.log import PredictionLog, read_log
from deeptumornet.serving import create_app

ROUNDS, PAIRS = 7, 100

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        files = pngs()
        champion, png = make_champion(Path(name), files), files[1]
        without, with_log = create_app(champion), create_app(champion)
        log = with_log.config["PREDICTION_LOG"] = PredictionLog(Path(name) / "log.sqlite")
        clients, ratios, milliseconds = [app.test_client() for app in (without, with_log)], [], []
        for _ in tqdm(range(ROUNDS), "rounds", leave=False):
            taken = []
            for way in (1, -1) * (PAIRS // 2):
                taken.append([seconds(lambda c=c: c.post("/api/v1/predict", data=png)) for c in clients[::way]][::way])
            plain, logged = 1000 * np.median(taken, axis=0)
            ratios.append(logged / plain)
            milliseconds.append([plain, logged])
        log.close()
        rows = len(read_log(log.address, with_log.test_client().get("/api/v1/model").json["version"], "normal"))
        assert rows == ROUNDS * PAIRS, rows
    save("log_cost", ratios, "at most 1.02",
         f"median of {PAIRS} answers with the prediction log (SQLite) by that without, asked in turn; {HOW}",
         milliseconds=milliseconds, rows=rows)
