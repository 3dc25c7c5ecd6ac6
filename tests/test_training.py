"""The recipe: cuts, kept features, one loop, fine-tuning, the search on two processes."""

import hashlib
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.features import Kept, cut, forward, slice_dataset
from deeptumornet.groups import split
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import prepare
from deeptumornet.study import Study, StudyError, load_params, project_root, write_csv
from deeptumornet.training import (
    Learner,
    add_head,
    augment,
    build_body,
    fine_tune,
    load_backbone,
    load_network,
    settings_of,
    shuffled,
    train,
)

ROOT = project_root(Path(__file__).parent)
SIZE = 80
RECIPE = {"optimizer": "adam", "rate": 0.05, "weight_decay": 0.0, "schedule": "constant", "epochs": 25, "patience": 0, "batch": 16,
          "label_smoothing": 0.0, "class_weight": "none"}


def made_study(folder: Path, classes: list[str], patients: int = 24):
    """A study of prepared phantom slices, two a patient, in `folder`."""
    params = load_params(ROOT) | {"profile": "smoke", "classes": classes, "tune_on": "resnet50"}
    params["smoke"]["train"]["published_repeats"] = 0
    study = Study("smoke", ROOT, folder, params)
    study.slices.mkdir(parents=True)
    rows = []
    for patient in range(patients):
        drawn = draw_patient(patient, bool(patient % 2))
        for level in (0.0, 0.1):
            pixels = window(slice_hu(drawn, level)[0])
            name = hashlib.sha256(pixels.tobytes()).hexdigest()
            Image.fromarray(prepare(pixels, SIZE, "lungs")).save(study.slices / f"{name}.png")
            rows.append({"path": f"{patient}-{level}.png", "image_id": name, "label": classes[patient % len(classes)], "status": "kept",
                         "group": f"g{patient}", "patient_id": f"p{patient}", "reason": "", "width": 512, "height": 512, "file_bytes": 1,
                         "border": 0.0, "sharpness": 0.0})
    write_csv(study.manifest, split(pd.DataFrame(rows), 0.25, 0.25, 2, 0))
    return study


def changed(study, folder: Path, seed: int = 0, manifest=lambda table: table):
    """A copy of `study` in `folder` with another seed or manifest; it shares the slices."""
    other = replace(study, workspace=folder, settings=study.settings | {"seed": seed})
    other.slices.parent.mkdir(parents=True)
    other.slices.symlink_to(study.slices)
    write_csv(other.manifest, manifest(pd.read_csv(study.manifest, dtype=str, keep_default_na=False)))
    return other


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return made_study(tmp_path_factory.mktemp("study"), ["normal", "adenocarcinoma"])


@pytest.fixture(scope="module")
def trained(study):
    return train(study, "resnet50")


def flipped(table: pd.DataFrame) -> pd.DataFrame:
    other = table["label"].map({"normal": "adenocarcinoma", "adenocarcinoma": "normal"})
    return table.assign(label=table["label"].where(table["split"] != "test", other))


def test_the_hold_outs_labels_change_nothing(study, trained, tmp_path):
    _, curve, predictions = train(changed(study, tmp_path, manifest=flipped), "resnet50")
    pd.testing.assert_frame_equal(predictions, trained[2])
    pd.testing.assert_frame_equal(curve, trained[1])


def test_another_seed_is_another_training(study, trained, tmp_path):
    _, _, predictions = train(changed(study, tmp_path, seed=1), "resnet50")
    assert not np.allclose(predictions["p_normal"][:4], trained[2]["p_normal"][:4])


def test_four_classes(tmp_path):
    classes = ["normal", "adenocarcinoma", "large cell", "squamous"]
    model, _, predictions = train(made_study(tmp_path / "four", classes, 32), "resnet50")
    p = predictions[[f"p_{name}" for name in classes]].to_numpy()
    assert model.output_shape[-1] == 4 and set(predictions["label"]) == set(classes)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("resnet50", 32), ("inceptionv3", 75), ("nasnetmobile", 32), ("vgg16", 32)])
def test_a_network_cut_in_two_predicts_the_same(name, size):
    network = load_network(name)
    model = add_head(build_body(load_backbone(network, size, "none", ROOT), network, SIZE), 2, {"units": 0, "dropout": 0.0}, 0)
    slices = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 1)).astype("float32")
    whole = model.predict_on_batch(slices)
    for layer in network.cuts:
        lower, upper = cut(model, layer)
        np.testing.assert_allclose(upper.predict_on_batch(lower.predict_on_batch(slices)), whole, atol=1e-6)
        assert 0 < len(upper.trainable_variables) < len(model.trainable_variables)


def test_fine_tuning_changes_what_comes_after_the_cut_and_nothing_before(study, trained):
    model = trained[0]
    before = {v.path: v.numpy() for v in model.variables}
    manifest = pd.read_csv(study.manifest, dtype=str, keep_default_na=False)
    told = settings_of(study, "resnet50") | {"epochs": 2, "patience": 0}
    parts = [manifest[manifest["split"] == part] for part in ("train", "validation")]
    first = fine_tune(model, 1, *parts, told, study)
    after = {path: v.numpy() for path, v in ((v.path, v) for v in model.variables)}
    touched = {path for path in before if (before[path] != after[path]).any()}
    assert touched and all("conv5_block3" in path or "probabilities" in path for path in touched)
    assert not any("moving" in path for path in touched)
    for v in model.variables:
        v.assign(before[v.path])
    pd.testing.assert_frame_equal(fine_tune(model, 1, *parts, told, study), first)


KEEP = """
import sys, keras
from pathlib import Path
from deeptumornet import features
from keras import layers
features.BLOCK = 4
keras.utils.set_random_seed(0)
slices = keras.Input((80, 80, 1))
model = keras.Model(slices, [layers.Conv2D(16, 9, strides=2)(slices)], name="one")
kept = features.Kept(model, Path(sys.argv[1]))
print("ready", flush=True)
kept(sorted(Path(sys.argv[2]).glob("*.png")))
"""


def test_killed_and_doubled_caching_ends_in_the_same_bits(study, tmp_path):
    def start(cache: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", KEEP, str(tmp_path / cache), str(study.slices)], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True)

    quiet, one, two = start("quiet"), start("busy"), start("busy")
    assert one.stdout.readline() == "ready\n"
    while not list(tmp_path.glob("busy/*/*.npy")) and one.poll() is None:
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    assert quiet.wait() == two.wait() == 0 and one.wait() in (0, -signal.SIGKILL)
    for folder in tmp_path.glob("busy/*"):
        (folder / f".half.npy.x.{one.pid}~").mkdir()  # what a kill in a write leaves
    again = start("busy")
    assert again.wait() == 0
    found = [sorted(p.name for p in tmp_path.glob(f"{cache}/*/*")) for cache in ("quiet", "busy")]
    assert found[0] == found[1] and len(found[0]) == 12


def test_the_same_slice_has_the_same_features_whatever_stands_beside_it(study, trained, tmp_path):
    lower, _ = cut(trained[0], "features")
    files = sorted(study.slices.glob("*.png"))
    alone, together = Kept(lower, tmp_path / "alone")(files[7:8])[0], Kept(lower, tmp_path / "together")(files)[0]
    assert (alone[0] == together[7]).all()
    batch = next(iter(slice_dataset(files)))
    assert (forward(lower, 1)(batch).numpy() == forward(lower, 10**6)(batch).numpy()).all(), "traced or not"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.floats(0, 0.1), st.floats(0, 10), st.floats(0, 0.1), st.floats(0, 0.2), st.floats(0, 10), st.floats(0, 1),
       st.booleans())
def test_an_augmented_slice_is_a_plausible_slice(key, shift, rotate, scale, intensity, noise, blur, flip):
    slice_ = np.zeros((SIZE, SIZE, 1), np.float32)
    slice_[20:60, 15:65] = 120
    slice_[30:40, 25:30] = 240
    told = {"shift": shift, "rotate": rotate, "scale": scale, "intensity": intensity, "noise": noise, "blur": blur, "flip": flip}
    one, two = (augment(slice_, np.array([0, key]), told).numpy() for _ in range(2))
    assert (one == two).all() and one.shape == slice_.shape and one.min() >= 0 and one.max() <= 255
    assert 0.6 < one.sum() / slice_.sum() < 1.5


def toy(optimizer: str = "adam", **more):
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    model = keras.Model([inputs], keras.layers.Dense(2, activation="softmax")(inputs), name="toy")
    return Learner(model, RECIPE | {"optimizer": optimizer, **more})


POINTS = np.random.default_rng(0).normal(size=(120, 6)).astype("float32")
TRUTH = (POINTS[:, 0] + POINTS[:, 1] > 0).astype(int)


def taught(learner: Learner, labels: np.ndarray = TRUTH) -> pd.DataFrame:
    batches, steps = shuffled(lambda part: [POINTS[part]], labels, learner.settings["batch"], 0)
    return learner.fit(batches, labels, steps)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_every_optimizer_and_schedule_learns(optimizer, schedule):
    curve = taught(toy(optimizer, schedule=schedule, weight_decay=0.001))
    assert curve["auc"].iloc[-1] > 0.95 and curve["loss"].iloc[-1] < curve["loss"].iloc[0]


@pytest.mark.parametrize("steps", [1, 3, 400])
def test_one_epoch_has_a_schedule_too(steps):
    rates = toy(epochs=1, schedule="cosine", rate=0.1).rates(steps)
    assert len(rates) == steps and max(rates) <= 0.1 + 1e-6 and rates[-1] <= max(rates)


def test_the_loss_is_the_smoothed_and_weighted_one():
    learner = toy(epochs=1, rate=1e-12, label_smoothing=0.1, class_weight="balanced", batch=120)
    labels = (np.arange(120) % 4 == 0).astype(int)
    p = learner.predict([POINTS])
    wanted = np.eye(2)[labels] * 0.9 + 0.05
    weights = np.where(labels == 1, 2.0, 2 / 3)
    assert taught(learner, labels)["loss"][0] == pytest.approx(float((weights * -(wanted * np.log(p)).sum(1)).mean()), rel=1e-5)


def test_memory_that_does_not_suffice_is_one_sentence():
    import keras

    inputs = keras.Input((1, 1))
    wide = keras.layers.GlobalAveragePooling1D()(keras.layers.UpSampling1D(10**13)(inputs))
    learner = Learner(keras.Model([inputs], keras.layers.Dense(2, activation="softmax")(wide), name="wide"), RECIPE)
    with pytest.raises(StudyError, match="memory is not enough to train wide on batches of 8: lower train.batch"):
        learner.fit(iter([([np.zeros((8, 1, 1), np.float32)], np.arange(8) % 2)] * 99), np.arange(8) % 2, 1)


def test_chief_and_workers_of_keras_tuner_share_the_trials(study, trained, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("data", "models", "reports"):
        (tmp_path / name).symlink_to(study.workspace / name)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    params = study.settings
    params["smoke"]["tune"] |= {"searches": ["random", "bayesian"], "trials": 5, "chief": f"127.0.0.1:{port}"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def runs(named: str) -> list:
        found = client.search_runs([e.experiment_id for e in client.search_experiments()])
        return [run for run in found if run.info.run_name.startswith(named)]

    def deeptumornet(*words: str) -> subprocess.Popen:
        return subprocess.Popen([Path(sys.executable).parent / "deeptumornet", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    assert not runs("tune"), "the database is made before three processes want it"
    processes = [deeptumornet("worker"), deeptumornet("worker")]
    waited = time.monotonic()
    while len(runs("tune ")) < 2 and time.monotonic() - waited < 120:  # the chief comes last, or a quick worker does all of the work
        time.sleep(0.5)
    processes.append(deeptumornet("run", "07_tuning"))
    try:
        said = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], [text[-1500:] for text in said]
    trials = pd.read_csv(study.report("tuning", "trials.csv"))
    assert trials.groupby("search").size().to_dict() == {"random": 5, "bayesian": 5}
    parents = [run.data.tags.get("mlflow.parentRunId") for run in runs("trial")]
    assert len(set(parents)) == 2, "both workers took part"


def test_a_fourth_network_is_one_line(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    assert "  # vgg16: 06a_vgg16" in text
    for name in ("nbs", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for profile in ("demo", "paper", "smoke"):
        chosen = text.replace("  # vgg16: 06a_vgg16", "  vgg16: 06a_vgg16").replace("profile: demo", f"profile: {profile}")
        (tmp_path / "params.yaml").write_text(chosen)
        study = Study(profile, tmp_path, tmp_path, load_params(tmp_path))
        assert study.networks["vgg16"] == "06a_vgg16" and settings_of(study, "vgg16")["size"] in (80, 224, 32)
    dvc = Path(sys.executable).parent / "dvc"
    subprocess.run([dvc, "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    listed = subprocess.run([dvc, "stage", "list", "--name-only"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "train@vgg16" in listed.split()
