"""Slices a second and core from file to prepared slice, and memory at ten times as many slices."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from benchmark import peak, peak_of, save, seconds
from PIL import Image
from tqdm import tqdm

from deeptumornet.dicom import window
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import complete, examine

ROOT = Path(__file__).resolve().parents[2]
LIMITS = yaml.safe_load((ROOT / "params.yaml").read_text())["quality"]
SETTINGS = {"size": 224, "normalise": "lungs", "hash_bits": 4, "correlation": 0.97}
CORES = os.cpu_count()


def write_slices(folder: Path, count: int, side: int) -> None:
    """`count` different PNG files of `side` pixels a side: twenty phantoms, shifted, in noise."""
    drawn = [np.asarray(Image.fromarray(window(slice_hu(draw_patient(k, bool(k % 2)), 0.0)[0])).resize((side, side))) for k in range(20)]
    noise = np.random.default_rng(0)
    for k in tqdm(range(count), "phantoms", leave=False):
        shifted = np.roll(drawn[k % 20], noise.integers(-12, 13, 2), (0, 1)).astype(int)
        noisy = np.clip(shifted + noise.integers(-4, 5, shifted.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{k}.png", compress_level=1)


def catalogue(folder: Path, count: int) -> pd.DataFrame:
    return pd.DataFrame({"path": [f"{k}.png" for k in range(count)], "label": [("normal", "adenocarcinoma")[k % 2] for k in range(count)],
                         "patient_id": "", "status": "kept", "reason": ""})


def prepare_all(folder: Path, count: int) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as prepared:
        manifest, _, fields = examine(catalogue(folder, count), folder, SETTINGS, LIMITS, Path(prepared))
    return complete(manifest, fields, SETTINGS)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        assert (prepare_all(Path(sys.argv[1]), int(sys.argv[2]))["status"] == "kept").mean() > 0.9
        print(peak(CORES))
        sys.exit()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slices(folder, 240, 512)
        rates = [240 / seconds(lambda: prepare_all(folder, 240)) / CORES for _ in range(5)]
    save("slices_per_second_and_core", [rate / 25 for rate in rates], "at least 1",
         "240 PNG slices of 512×512 read, checked, hashed, lungs found, standardised, written and grouped, on all cores; "
         "slices a second and core by 25", slices_per_second_and_core=float(np.median(rates)), cores=CORES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slices(folder, 20_000, 256)
        few, many = (peak_of(__file__, name, count) for count in (2_000, 20_000))
    save("preprocessing_memory", [many / few], "at most 1.2 for ten times the slices",
         "peak resident memory of the process and its workers with 20,000 slices by that with 2,000", mb=[few, many])
