"""An answer of the service with the prediction log by one without it, for SQLite and for PostgreSQL."""

import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from bench_serving import HOW, NETWORKS, make_champion, pngs
from benchmark import save, seconds
from tqdm import tqdm

from deeptumornet.log import STATISTICS, PredictionLog, read_log
from deeptumornet.serving import create_app

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import running_postgres  # noqa: E402

PAIRS, FLUSHES = 1000, 30


def measure(name: str, database: str, address: str | Path, spool: Path, champion: Path, png: bytes) -> None:
    """The thread that moves rows to the database would slow both answers of a pair: it is measured by itself, in CPU time, with as many
    rows as a second of answers leaves, and each answer is charged its part. Both answers come from one engine: two differ by more than the
    log costs."""
    app, log, taken, moved = create_app(champion), PredictionLog(address, spool, pause=1e6), [], []
    client = app.test_client()

    def ask(kept: PredictionLog | None) -> None:
        app.config["PREDICTION_LOG"] = kept
        assert client.post("/api/v1/predict", data=png).status_code == 200
    for k in tqdm(range(PAIRS), database, leave=False):
        way = 1 if k % 2 else -1
        taken.append([seconds(lambda kept=kept: ask(kept)) for kept in (None, log)[::way]][::way])
    taken = 1000 * np.array(taken)
    log.flush()
    said, statistics = {"normal": 0.25, "adenocarcinoma": 0.75}, dict.fromkeys(STATISTICS, 1 / 3)
    for _ in range(FLUSHES):
        for _ in range(int(1000 / np.median(taken[:, 0]))):
            log.record("v", "i" * 64, said, statistics, np.ones(4))
        start = time.thread_time()
        log.flush()
        moved.append(time.thread_time() - start)
    log.close()
    rows = len(read_log(address, client.get("/api/v1/model").json["version"], "normal"))
    assert rows == PAIRS, rows
    draws = np.random.default_rng(0).integers(PAIRS, size=(2000, PAIRS))
    def ratio(plain, logged): return 1 + np.median(logged - plain, -1) / np.median(plain, -1) + np.median(moved)  # noqa: E704
    low, high = np.quantile(ratio(taken[draws, 0], taken[draws, 1]), [0.025, 0.975])
    save(name, [ratio(*taken.T)], "at most 1.02",
         f"median difference of {PAIRS} pairs of answers, with the log ({database}) and without, in turn, by the median without, and "
         f"the CPU seconds a second that the rows' way to the database takes; 95 % interval by bootstrap over pairs; {HOW}{NETWORKS[0]}",
         low=low, high=high, pairs=PAIRS, milliseconds=np.median(taken, 0).tolist(), moving_cpu=float(np.median(moved)), rows=rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder, png = Path(name), pngs(2)[1]
        champion = make_champion(folder, NETWORKS[0])
        measure("log_cost", "SQLite", folder / "log.sqlite", folder / "sqlite.spool", champion, png)
        try:
            with contextmanager(running_postgres)() as address:
                measure("log_cost_postgres", "PostgreSQL on the same machine", address, folder / "postgres.spool", champion, png)
        except pytest.skip.Exception as reason:
            print(f"not measured: {reason}")
