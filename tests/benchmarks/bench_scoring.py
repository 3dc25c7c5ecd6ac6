"""Ten thousand files on Spark in two executors, one killed in the middle: none lost or doubled, the service's numbers; the rate."""

import os
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from bench_serving import NETWORK, SIZE, make_champion
from benchmark import save
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.growing import score
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.serving import answer, open_engine

FILES, DISTINCT, SIDE, CORES = int(os.environ.get("BENCH_FILES", 10_000)), 200, 512, 2


def write_archive(folder: Path) -> None:
    """FILES files in folders of 200, DISTINCT of them different: the others are links to these."""
    for k in range(FILES):
        file = folder / f"{k // 200:03}" / f"{k:05}.png"
        file.parent.mkdir(exist_ok=True)
        if k < DISTINCT:
            Image.fromarray(window(slice_hu(draw_patient(k, bool(k % 2)), 0.0)[0])).resize((SIDE, SIDE)).save(file, compress_level=1)
        else:
            os.link(folder / f"{(k % DISTINCT) // 200:03}" / f"{k % DISTINCT:05}.png", file)


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
        champion = make_champion(Path(name))
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
        truth = [answer(engine, (archive / f"{k // 200:03}" / f"{k:05}.png").read_bytes())["probability"] for k in range(DISTINCT)]
    difference = float(np.abs(said["probability"] - np.array(truth)[said["file"] % DISTINCT]).max())
    lost, doubled = FILES - said["file"].nunique(), int(said["file"].duplicated().sum())
    assert np.ptp(truth) > 0.01, "slices that all look alike to the network would hide one that got another's number"
    assert killed and told["scored"] == FILES and lost == doubled == 0 and difference <= 1e-4, (killed, lost, doubled, difference, told)
    rate = FILES / taken / CORES * 3600
    save("spark_scoring", [lost + doubled], "0, with one of two executors killed in the middle and at most 1e-4 from the service",
         "files lost and doubled", files=FILES, pixels=f"{SIDE}×{SIDE}", network=NETWORK, size=SIZE,
         seconds=taken, cores=CORES, killed=len(killed), lost=lost, doubled=doubled, largest_difference=difference,
         slices_per_core_hour=rate, load=os.getloadavg()[2])
