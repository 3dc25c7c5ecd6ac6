"""An archive is scored by Spark as the service would: each file once, an unreadable one with its sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded

from deeptumornet.commands import main
from deeptumornet.dicom import window
from deeptumornet.serving import answer, open_engine


def test_every_file_is_scored_once_as_the_service_would(champion, phantoms, tmp_path, capsys):
    pytest.importorskip("pyspark", reason="pyspark is not installed: pip install 'deeptumornet[spark]'")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17, and there is none")
    import pandas as pd

    archive, engine = tmp_path / "archive", open_engine(champion)
    (archive / "below").mkdir(parents=True)
    for k, hu in enumerate(phantoms):
        (archive / "below" / f"{k}.png").write_bytes(encoded(window(hu)))
    (archive / "note.txt").write_text("no slice")
    words = ["score", str(archive), "--to", str(tmp_path / "scores"), "--master", "local[2]", "--champion", str(champion)]
    assert main(words) == 0 and "4 of 5 files scored, 1 refused" in capsys.readouterr().out
    said = pd.read_parquet(tmp_path / "scores").set_index("path")
    assert len(said) == said.index.nunique() == 5
    for path, row in said.iterrows():
        file = archive / path.split("/archive/")[1]
        if row["why"]:
            assert file.name == "note.txt" and "not a PNG, JPEG or DICOM" in row["why"]
        else:
            assert row["probability"] == pytest.approx(answer(engine, file.read_bytes())["probability"], abs=1e-4)
    assert main(words) == 1 and "a target that is not" in capsys.readouterr().err


MIRRORED = """
import sys
import numpy as np
import tensorflow as tf
import keras
from keras import layers
from deeptumornet.training import Learner, add_head, deterministic, devices, shuffled

count, target = int(sys.argv[1]), sys.argv[2]
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * count)
deterministic(0)
assert devices().num_replicas_in_sync == count and isinstance(devices(), tf.distribute.MirroredStrategy) == (count > 1)
with devices().scope():
    slices = keras.Input((16, 16, 1))
    maps = layers.Conv2D(4, 3, activation="relu")(slices)
    body = keras.Model(slices, layers.GlobalAveragePooling2D(name="features")(maps), name="tiny")
settings = {"optimizer": "adamw", "rate": 0.05, "weight_decay": 0.004, "label_smoothing": 0.1, "schedule": "cosine", "epochs": 20,
            "class_weight": "balanced", "patience": 0, "units": 8, "dropout": 0.0}
x = np.random.default_rng(0).random((45, 16, 16, 1), np.float32) * np.linspace(0.5, 1, 45, dtype=np.float32)[:, None, None, None]
labels = (np.arange(45) > 30).astype(int)
model = add_head(body, 2, settings, 0)
batches, steps = shuffled(lambda rows: [x[rows]], labels, 7, 0)
curve = Learner(model, settings).fit(batches, labels, steps)
np.savez(target, p=np.asarray(model(x)), auc=curve["auc"])
"""


def test_two_devices_train_as_one_does(tmp_path):
    found = []
    for count in (1, 2):
        subprocess.run([sys.executable, "-c", MIRRORED, str(count), tmp_path / f"{count}.npz"], check=True, cwd=Path(__file__).parents[1])
        found.append(np.load(tmp_path / f"{count}.npz"))
    one, two = found
    assert np.abs(one["p"] - two["p"]).max() <= 1e-5 and np.ptp(one["p"]) > 0.2, "batches of 7 and 3 on two devices"
    assert one["auc"] == pytest.approx(two["auc"], abs=1e-6) and one["auc"][-1] > 0.9
