"""Ten thousand files on Spark in two executors, one killed in the middle: none lost or doubled, the service's numbers; the rate."""

import os
import platform
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
from bench_serving import NETWORKS, SIZE, make_champion
from benchmark import save
from PIL import Image
from scipy import stats

from deeptumornet.dicom import window
from deeptumornet.growing import score
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.serving import answer, open_engine
from deeptumornet.study import sha256

FILES, DRAWN, ASKED, SIDE, CORES, BLOCKS = int(os.environ.get("BENCH_FILES", 10_000)), 200, 500, 512, 2, 10


def write_archive(folder: Path) -> None:
    """FILES different files in folders of 200: DRAWN phantoms, each with noise of its own in every file."""
    slices = (window(slice_hu(draw_patient(k, bool(k % 2)), 0.0)[0]) for k in range(DRAWN))
    drawn = [np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE)), float) for pixels in slices]
    for k in range(FILES):
        file = path_of(folder, k)
        file.parent.mkdir(exist_ok=True)
        noisy = drawn[k % DRAWN] + np.random.default_rng(k).normal(0, 4, (SIDE, SIDE))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, compress_level=1)


def path_of(folder: Path, k: int) -> Path:
    return folder / f"{k // 200:03}" / f"{k:05}.png"


def rates(target: Path) -> np.ndarray:
    """Slices per core-hour in BLOCKS equal parts of the run, from the moments at which Spark had written its files."""
    written = sorted((file.stat().st_mtime, pq.read_metadata(file).num_rows) for file in target.glob("*.parquet"))
    ends = np.linspace(0, len(written) - 1, BLOCKS + 1).astype(int)
    return np.array([sum(rows for _, rows in written[a + 1:b + 1]) / (written[b][0] - written[a][0]) / CORES * 3600
                     for a, b in pairwise(ends)])


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def kill_an_executor(target: Path, killed: list[int]) -> None:
    """Kill -9 an executor of this process when a third of the tasks (of some thirty files) have written their rows."""
    while len(list(target.glob("_temporary/*/task_*/*.parquet"))) < FILES // 100:
        time.sleep(0.2)
    executor = next(p for p in psutil.process_iter(["cmdline"]) if psutil.Process() in p.parents()
                    and "org.apache.spark.executor.CoarseGrainedExecutorBackend" in (p.info["cmdline"] or []))
    killed.append(executor.pid)
    executor.kill()


if __name__ == "__main__":
    if not find_spec("pyspark"):
        sys.exit(print("not measured: pyspark is not installed (pip install 'deeptumornet[spark]')"))
    with tempfile.TemporaryDirectory() as name:
        champion = make_champion(Path(name), NETWORKS[0])
        engine = open_engine(champion)
        archive, target, killed = Path(name) / "archive", Path(name) / "scores", []
        archive.mkdir()
        write_archive(archive)
        threading.Thread(target=kill_an_executor, args=(target, killed), daemon=True).start()
        start = time.perf_counter()
        told = score(champion, str(archive), str(target), f"local-cluster[{CORES},1,2048]")
        taken = time.perf_counter() - start
        said = pd.read_parquet(target)
        said["file"] = said["path"].str.extract(r"(\d{5})\.png", expand=False).astype(int)
        speed = rates(target)
        distinct = len({sha256(file) for file in archive.glob("*/*.png")})
        asked = range(0, FILES, max(1, FILES // ASKED))
        truth = pd.Series({k: answer(engine, path_of(archive, k).read_bytes())["probability"] for k in asked})
    difference = float((said.set_index("file")["probability"].loc[truth.index] - truth).abs().max())
    lost, doubled = FILES - said["file"].nunique(), int(said["file"].duplicated().sum())
    assert np.ptp(truth) > 0.01, "slices that all look alike to the network would hide one that got another's number"
    assert killed and told["scored"] == FILES and lost == doubled == 0 and difference <= 1e-4, (killed, lost, doubled, difference, told)
    assert distinct == FILES, distinct
    margin = stats.t.ppf(0.975, BLOCKS - 1) * speed.std(ddof=1) / np.sqrt(BLOCKS)
    rate = {"value": float(speed.mean()), "low": float(speed.mean() - margin), "high": float(speed.mean() + margin),
            "interval": f"95 %, t over {BLOCKS} equal parts of one run"}
    save("spark_scoring", [lost + doubled], "0, with one of two executors killed in the middle and at most 1e-4 from the service",
         "files lost and doubled", files=FILES, pixels=f"{SIDE}×{SIDE}", network=NETWORKS[0], size=SIZE,
         distinct=distinct, compared=len(truth), machine=f"{cpu()}, {os.cpu_count()} cores", seconds=taken, cores=CORES,
         killed=len(killed), lost=lost, doubled=doubled, largest_difference=difference,
         rate=rate, slices_per_core_hour=rate["value"], load=os.getloadavg()[2])
