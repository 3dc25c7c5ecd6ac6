"""The recipe: cuts, kept features, one loop, fine-tuning, the search on two processes."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from tiny import run

from deeptumornet.dicom import window
from deeptumornet.features import Kept, cut, fingerprint, forward, memory, slice_dataset
from deeptumornet.groups import split
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import prepare
from deeptumornet.study import Study, StudyError, load_params, project_root, read_json, write_csv, write_json
from deeptumornet.training import (
    Learner,
    add_head,
    all_features,
    augment,
    build_body,
    fine_tuner,
    jobs,
    load_backbone,
    load_model,
    load_network,
    settings_of,
    shuffled,
    train,
    trained_body,
    training_labels,
)
from deeptumornet.tuning import score, search, tune

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
    other = replace(study, workspace=folder, settings=deepcopy(study.settings) | {"seed": seed})
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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study of the tiny network, trained, tuned and fine-tuned without a disturbance."""
    study = made_study(tmp_path_factory.mktemp("tiny"), ["normal", "adenocarcinoma"])
    study = replace(study, settings=study.settings | {"networks": {"tiny": "tiny"}, "tune_on": "tiny"})
    smoke = study.settings["smoke"]
    smoke["train"] |= {"published_repeats": 1, "seeds": 1}
    smoke["tune"] |= {"searches": ["random"], "trials": 4, "depths": [0, 1]}
    smoke["finetune"] |= {"networks": ["tiny"], "epochs": 4}
    run(study)
    return study


def results(study) -> dict[str, pd.DataFrame]:
    """Every table that the tiny network's stages wrote, less the seconds, and less what the published protocol says of the hold-out."""
    tables = {str(file.relative_to(study.reports)): pd.read_csv(file) for file in sorted(study.reports.rglob("*.csv"))}
    tables = {name: table[table["protocol"] != "published"] if "protocol" in table else table for name, table in tables.items()}
    return {name: table.drop(columns=["seconds", "label"], errors="ignore") for name, table in tables.items()}


def test_the_hold_outs_labels_change_nothing(tiny, tmp_path):
    other = changed(tiny, tmp_path, manifest=flipped)
    run(other)
    assert {"networks/tiny/predictions.csv", "tuning/trials.csv", "finetuned/tiny/curve.csv"} <= set(results(other))
    for name, table in results(tiny).items():
        pd.testing.assert_frame_equal(results(other)[name], table)


def test_another_seed_is_another_training_search_and_fine_tuning(tiny, tmp_path):
    other = changed(tiny, tmp_path, seed=1)
    run(other)
    for name, column in (("networks/tiny/curve.csv", "val_loss"), ("tuning/trials.csv", "val_loss"), ("finetuned/tiny/curve.csv", "loss")):
        assert not np.isclose(results(other)[name][column][:2], results(tiny)[name][column][:2]).any(), name
    values = ["optimizer", "rate", "dropout", "units", "weight_decay", "depth"]
    assert not results(other)["tuning/trials.csv"][values].equals(results(tiny)["tuning/trials.csv"][values])


def test_neighbouring_seeds_share_no_partition(tiny, tmp_path):
    manifest, parts = pd.read_csv(tiny.manifest, dtype=str, keep_default_na=False), []
    for seed in (0, 1):
        other = changed(tiny, tmp_path / str(seed), seed)
        other.settings["smoke"]["train"]["repeats"] = 3
        parts += [test.tobytes() for _, test, _ in jobs(manifest, other)]
    assert len(parts) == 14 and len(set(parts)) == 14


def killed(study, stage: str, sign: bytes) -> None:
    """Run `stage` on the tiny network in a process of its own, and kill it as soon as `sign` stands on its stderr."""
    write_json(study.workspace / "params.json", study.settings)
    process = subprocess.Popen([sys.executable, ROOT / "tests/tiny.py", study.workspace, stage], stderr=subprocess.PIPE)
    said = b""
    while not re.search(sign, said):
        heard = os.read(process.stderr.fileno(), 4096)
        assert heard, said.decode()[-2000:]
        said += heard
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"


def test_killed_in_a_fold_in_a_trial_and_in_fine_tuning_ends_as_undisturbed(tiny, tmp_path):
    study = changed(tiny, tmp_path)
    killed(study, "train", rb"repeat 0 fold 0: 1 of 3")
    assert not (study.models / "tiny").exists()
    run(study, "train")
    killed(study, "tune", rb"trial 1 of random: 1 of 4")
    assert len(list(study.workspace.glob(".cache/search-*/answers/*.json"))) < 4 and not (study.models / "tuned").exists()
    run(study, "tune")
    killed(study, "finetune", rb"fine-tuning tiny:[^\r]*val_loss=")
    assert not (study.models / "finetuned").exists()
    run(study, "finetune")
    assert list(results(study)) == list(results(tiny))
    for name, table in results(tiny).items():
        pd.testing.assert_frame_equal(results(study)[name], table)
    client = MlflowClient(f"sqlite:///{study.workspace / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], "status = 'FINISHED'")
    whole = next(run.info.run_id for run in runs if run.info.run_name.startswith("tune "))
    trials = {run.info.run_name: run.data.params["cached"] for run in runs if run.data.tags.get("mlflow.parentRunId") == whole}
    assert sorted(trials) == [f"trial {k} of random" for k in range(1, 5)]
    assert trials["trial 1 of random"] == "True", "it was answered before the kill"


def test_a_trial_with_the_last_layers_is_at_least_as_good_and_leaves_the_network_as_it_was(tiny):
    manifest = pd.read_csv(tiny.manifest, dtype=str, keep_default_na=False)
    body, told = trained_body(tiny, "tiny"), settings_of(tiny, "tiny") | {"epochs": 3}
    values = {"optimizer": "adam", "rate": 0.01, "dropout": 0.0, "units": 0, "weight_decay": 0.0}
    before, rows = body.get_weights(), manifest[manifest["split"].isin(["train", "validation"])]
    features = all_features(body, manifest, tiny)
    head, first, second = (score(body, features, rows, values | {"depth": depth}, told, tiny) for depth in (0, 1, 1))
    assert first == second and first["val_loss"] < head["val_loss"]
    assert all((old == new).all() for old, new in zip(before, body.get_weights(), strict=True))
    trials = pd.read_csv(tiny.report("tuning", "trials.csv"))
    assert set(trials["depth"]) == {0, 1} and (trials["weights"] == "none").all()


def test_fine_tuning_that_makes_it_worse_leaves_the_network_as_it_was(tiny):
    manifest = pd.read_csv(tiny.manifest, dtype=str, keep_default_na=False)
    model = load_model(tiny.models / "tiny" / "model.keras")
    before, told = model.get_weights(), settings_of(tiny, "tiny") | {"rate": 20, "epochs": 2, "patience": 0}
    curve = fine_tuner(model, 1, told, tiny)(*(manifest[manifest["split"] == part] for part in ("train", "validation")))
    assert (curve["val_loss"] > pd.read_csv(tiny.candidate("tiny") / "curve.csv")["val_loss"].min()).all()
    assert all((old == new).all() for old, new in zip(before, model.get_weights(), strict=True))


def test_features_are_kept_once_and_by_what_the_layers_are_told(tiny, tmp_path):
    kept = {file.name for file in (tiny.workspace / ".cache").iterdir()}
    network = load_network("tiny")
    assert len(kept) == 2, "features and the activations at one cut, whoever asks for them"
    assert fingerprint(trained_body(tiny, "tiny")) in kept
    backbone = load_backbone(network, 32, "none", ROOT)
    bodies = [build_body(backbone, replace(network, scaling=scaling), SIZE) for scaling in ("unit", "caffe")]
    assert len({fingerprint(body) for body in bodies}) == 2


def test_a_search_ends_in_the_sentence_of_its_trial(tiny, tmp_path):
    other = changed(tiny, tmp_path)
    (other.workspace / "models").symlink_to(tiny.models)
    other.settings["smoke"]["tune"]["folds"] = 40
    with pytest.raises(StudyError, match=r"trial 1 of the random search .*: class .* has .* groups?, and a split into 40 parts needs 40"):
        tune(other)


def test_a_part_without_a_class_is_told_by_its_name(tiny):
    manifest = pd.read_csv(tiny.manifest, dtype=str, keep_default_na=False)
    with pytest.raises(StudyError, match="a training part has no slice of class 'adenocarcinoma': ask for fewer folds"):
        training_labels(manifest[manifest["label"] == "normal"], tiny)


def test_a_card_names_the_weights_file_and_no_path(tiny, tmp_path):
    other = changed(tiny, tmp_path / "w")
    load_backbone(load_network("tiny"), 32, "none", ROOT).save_weights(tmp_path / "start.weights.h5")
    other.settings["smoke"]["train"]["weights"] = str(tmp_path / "start.weights.h5")
    train(other, "tiny")
    digest = hashlib.sha256((tmp_path / "start.weights.h5").read_bytes()).hexdigest()
    card = read_json(other.candidate("tiny") / "card.json")
    assert (card["weights"], card["weights_sha256"]) == (f"start.weights.h5 ({digest[:12]})", digest) and str(tmp_path) not in str(card)
    assert {read_json(tiny.candidate(name) / "card.json")["weights"] for name in ("tiny", "tuned", "finetuned/tiny")} == {"none"}


def test_four_classes(tmp_path):
    classes = ["normal", "adenocarcinoma", "large cell", "squamous"]
    study = made_study(tmp_path / "four", classes, 32)
    model, _, predictions = train(replace(study, settings=study.settings | {"networks": {"tiny": "tiny"}}), "tiny")
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


def test_fine_tuning_changes_what_comes_after_the_cut_and_nothing_before(tiny):
    model = load_model(tiny.models / "tiny" / "model.keras")
    before = {v.path: v.numpy() for v in model.variables}
    manifest = pd.read_csv(tiny.manifest, dtype=str, keep_default_na=False)
    told = settings_of(tiny, "tiny") | {"epochs": 2, "patience": 0}
    parts = [manifest[manifest["split"] == part] for part in ("train", "validation")]
    first = fine_tuner(model, 1, told, tiny)(*parts)
    after = {path: v.numpy() for path, v in ((v.path, v) for v in model.variables)}
    touched = {path for path in before if (before[path] != after[path]).any()}
    assert touched and all("_13" in path or "probabilities" in path for path in touched)
    assert not any("moving" in path for path in touched)
    for v in model.variables:
        v.assign(before[v.path])
    pd.testing.assert_frame_equal(fine_tuner(model, 1, told, tiny)(*parts), first)


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
        (folder / f".half.npy.x.{one.pid}@{socket.gethostname().replace('.', '-')}~").mkdir()  # what a kill in a write leaves
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


def test_memory_that_does_not_suffice_is_one_sentence(tmp_path):
    import keras

    inputs = keras.Input((1, 1))
    wide = keras.layers.GlobalAveragePooling1D()(keras.layers.UpSampling1D(10**13)(inputs))
    learner = Learner(keras.Model([inputs], keras.layers.Dense(2, activation="softmax")(wide), name="wide"), RECIPE)
    with pytest.raises(StudyError, match="memory is not enough to train wide on batches of 8: lower train.batch"):
        learner.fit(iter([([np.zeros((8, 1, 1), np.float32)], np.arange(8) % 2)] * 99), np.arange(8) % 2, 1)
    slices = keras.Input((1, 1, 1))
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(tmp_path / "a.png")
    wide = keras.layers.GlobalAveragePooling1D()(keras.layers.UpSampling1D(10**13)(keras.layers.Reshape((1, 1))(slices)))
    kept = Kept(keras.Model(slices, [wide]), tmp_path / "cache")
    with pytest.raises(StudyError, match="memory is not enough to compute the features: lower"):
        kept([tmp_path / "a.png"])
    with pytest.raises(StudyError, match="memory is not enough to hold: lower"), memory("hold"):
        np.empty(10**15)


def test_adamw_without_decay_decays_nothing():
    assert toy("adamw").optimizer.weight_decay == 0.0 and toy("adamw", weight_decay=0.1).optimizer.weight_decay == 0.1


def test_the_search_that_was_killed_arrives_at_the_same_trials_by_its_answers(tmp_path):
    asked = []

    def bowl(values: dict, epochs: int) -> dict:
        asked.append(values)
        return {"val_loss": values["rate"] + values["dropout"], "val_auc": 0.5}

    whole = search("grid", bowl, [0], 8, 4, 0, tmp_path)
    assert whole[["rate", "units", "dropout"]].drop_duplicates().shape[0] == len(whole) == len(asked) == 8, "the grid is searched whole"
    rows = []
    search("grid", bowl, [0], 8, 4, 0, tmp_path, rows.append)
    assert len(asked) == 8 and [row["trial"] for row in rows] == list(range(1, 9)) and all(row["cached"] for row in rows)


def test_chief_and_workers_of_keras_tuner_share_the_trials(study, trained, tmp_path):
    port = free_port()
    for name in ("data", "models", "reports"):
        (tmp_path / name).symlink_to(study.workspace / name)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    params = study.settings
    params["smoke"]["tune"] |= {"searches": ["random", "bayesian"], "trials": 5, "depths": [0], "chief": f"127.0.0.1:{port}"}
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


def test_a_trial_that_fails_at_a_worker_ends_its_chief_with_the_sentence(tmp_path):
    port = free_port()
    code = """
import sys
from pathlib import Path
from deeptumornet.study import StudyError
from deeptumornet.tuning import _chief, search

def trial(values, epochs):
    raise StudyError("the loss is no longer a number")

try:
    with _chief(sys.argv[1], 0, sys.argv[2] == "worker"):
        search("random", trial, [0], 5, 1, 0, Path(sys.argv[3]))
except StudyError as error:
    print(error)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, f"127.0.0.1:{port}", role, tmp_path], stdout=subprocess.PIPE, text=True)
                 for role in ("chief", "worker")]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(text.startswith("trial 1 of the random search") and text.endswith("the loss is no longer a number\n") for text in said), said


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
