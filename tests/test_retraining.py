"""A challenger becomes champion only whole and not inferior; the way back gives the same bytes."""

import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import requests
from filelock import FileLock
from mlflow import MlflowClient
from PIL import Image

from deeptumornet import retraining
from deeptumornet.collection import collect
from deeptumornet.dicom import window
from deeptumornet.export import Engine
from deeptumornet.log import PredictionLog, image_statistics
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import load_manifest, preprocess, read_slice
from deeptumornet.retraining import WORKSPACE, crown, not_inferior, promote, reference, retrain, rollback
from deeptumornet.study import StudyError, open_study, read_json, sha256, write_json


@pytest.fixture
def rivals(champion, tmp_path):
    shutil.copytree(champion, tmp_path / "champion")
    shutil.copytree(champion, tmp_path / "challenger")
    card = read_json(tmp_path / "challenger" / "card.json")
    write_json(tmp_path / "challenger" / "card.json", card | {"version": "challeng"})
    return tmp_path / "champion", tmp_path / "challenger"


def good(champion: Path) -> dict:
    return {"passes": True, "why": "not inferior", "against": Engine(champion).card["version"]}


def predictions(seed: int, strength: float, n: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return pd.DataFrame({"image_id": [f"{i:04d}" for i in range(n)], "group": np.arange(n) // 2 * 2 + y, "label": np.where(y, "t", "n"),
                         "p_t": 1 / (1 + np.exp(-strength * y - rng.normal(size=n)))})


def test_a_worse_challenger_seldom_passes_and_an_equal_one_is_let_through():
    worse = sum(not_inferior(predictions(2 * k, 2), predictions(2 * k + 1, 1.5), "t", draws=200)["passes"] for k in range(40))
    assert worse <= 4, "0.07 under the champion's AUC of 0.92 lies past the margin: at most 2.5 % in the long run"
    assert not_inferior(predictions(0, 2), predictions(0, 2), "t", draws=200)["passes"]


def test_promotion_and_the_way_back(rivals):
    champion, challenger = rivals
    first = Engine(champion).card["version"]
    before = {p.name: sha256(p) for p in champion.iterdir()}
    assert promote(champion, challenger, good(champion)) == "challeng" == Engine(champion).card["version"]
    assert rollback(champion) == first and {p.name: sha256(p) for p in champion.iterdir()} == before
    history = read_json(champion.parent / "champions" / "history.json")
    assert [(s["from"], s["to"]) for s in history] == [(first, "challeng"), ("challeng", first)]
    with pytest.raises(StudyError, match="nothing to go back to"):
        rollback(champion)


def test_what_is_never_promoted(rivals):
    champion, challenger = rivals
    before = sha256(champion / "card.json")
    with pytest.raises(StudyError, match="it may be worse.*the champion stays"):
        promote(champion, challenger, {"passes": False, "why": "it may be worse"})
    with pytest.raises(StudyError, match="compared with another, and the champion is .* now"):
        promote(champion, challenger, good(champion) | {"against": "another"})
    with FileLock(champion.parent / ".champion.lock"), pytest.raises(StudyError, match="another promotion or rollback is at work"):
        promote(champion, challenger, good(champion))
    write_json(challenger / "card.json", read_json(challenger / "card.json") | {"positive": "normal"})
    with pytest.raises(StudyError, match="positive normal are not the champion's"):
        promote(champion, challenger, good(champion))
    (challenger / "engine.tflite").unlink()
    with pytest.raises(StudyError, match="is missing or is not the file that card.json names"):
        promote(champion, challenger, good(champion))
    assert sha256(champion / "card.json") == before


def test_a_kept_champion_whose_file_is_gone(rivals):
    champion, challenger = rivals
    first = Engine(champion).card["version"]
    promote(champion, challenger, good(champion))
    (champion.parent / "champions" / first / "engine.tflite").unlink()
    with pytest.raises(StudyError, match="is missing or is not the file"):
        rollback(champion)
    assert Engine(champion).card["version"] == "challeng", "the running champion is untouched"


def test_the_service_takes_up_a_new_champion_and_drops_no_request(rivals, slice_png):
    champion, challenger = rivals
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = [Path(sys.executable).with_name("deeptumornet"), "serve", "--port", address.rsplit(":", 1)[1], "--champion", champion]
    service, start, versions = subprocess.Popen(words, stderr=subprocess.DEVNULL), time.monotonic(), []

    def ask():
        while versions[-20:].count("challeng") < 20:
            assert service.poll() is None and time.monotonic() - start < 100
            answer = requests.post(f"{address}/api/v1/predict", data=slice_png, timeout=60)
            assert answer.status_code == 200
            versions.append(answer.json()["model"]["version"])

    try:
        while True:
            try:
                requests.get(address, timeout=60)
                break
            except requests.ConnectionError:
                assert service.poll() is None and time.monotonic() - start < 100
                time.sleep(0.1)
        with ThreadPoolExecutor(4) as pool:
            tasks = [pool.submit(ask) for _ in range(4)]
            while len(versions) < 10 and not any(task.done() for task in tasks):
                time.sleep(0.01)
            promote(champion, challenger, good(champion))
            for task in tasks:
                task.result()
        assert len(set(versions)) == 2
    finally:
        service.terminate()
        service.wait(60)


@pytest.fixture(scope="module")
def site(tmp_path_factory, champion):
    """A study's data, a log with feedback, and the folder of kept slices: five new ones, of which one was labelled wrongly first, a copy
    of a hold-out slice, one without feedback, and a note."""
    study = open_study("smoke", tmp_path_factory.mktemp("site"))
    collect(study)
    preprocess(study)
    shutil.copytree(champion, study.champion)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=study.workspace, check=True)
    kept = study.workspace / "kept"
    kept.mkdir()
    for k in range(6):
        Image.fromarray(window(slice_hu(draw_patient(900 + k, bool(k % 2), 5), 0.0)[0])).save(kept / f"{k}.png")
    manifest = load_manifest(study.manifest)
    held = manifest[(manifest["split"] == "test") & (manifest["status"] == "kept") & manifest["path"].str.endswith(".png")].iloc[0]
    shutil.copyfile(study.workspace / held["path"], kept / "held.png")
    (kept / "note.txt").write_text("no slice")
    log = PredictionLog(study.workspace / "log.sqlite", pause=60)
    flat = image_statistics(np.zeros((8, 8), np.uint8))
    for name, label in [*((f"{k}.png", study.classes[k % 2]) for k in range(5)), ("held.png", held["label"])]:
        one = log.record("v", read_slice(kept / name, name).image_id, {c: 0.5 for c in study.classes}, flat)
        if name == "0.png":
            log.feedback(one, study.classes[1], "A", study.classes)
        log.feedback(one, label, "B", study.classes)
    log.close()
    return study, kept


def arrive(champion, passes: bool):
    "In place of the networks' hours: the tiny champion comes out of the export as the challenger, with a baseline that it beats or not"
    def run_notebook(name, profile, workspace, root):
        if name == "10_export":
            target = workspace / "models" / "champion"
            shutil.copytree(champion, target, dirs_exist_ok=True)
            card = read_json(target / "card.json")
            card["metrics"]["auc"] = {"value": 0.8 if passes else 0.6}
            write_json(target / "card.json", card | {"version": "passes" if passes else "fails"})
    return run_notebook


def test_verified_slices_join_and_the_hold_out_stays_locked(site, champion, monkeypatch):
    study, kept = site
    monkeypatch.setattr(retraining, "run_notebook", arrive(champion, passes=False))
    before = load_manifest(study.manifest)
    found = retrain(study, study.champion, study.workspace / "log.sqlite", kept)
    assert (found["joined"], found["used"], found["passes"]) == (6, 5, False) and "is not over the baseline thumbnail's" in found["why"]
    after = load_manifest(study.workspace / WORKSPACE / "data" / "manifest.csv")
    pd.testing.assert_frame_equal(after.iloc[:len(before)], before)
    new = after.iloc[len(before):]
    used = new[new["status"] == "kept"]
    assert set(used["split"]) == {"train"} and (new["source"] == "feedback").all() and not set(used["group"]) & set(before["group"])
    assert used["label"].value_counts().to_dict() == {study.classes[0]: 3, study.classes[1]: 2}, "the later word counts"
    assert new.loc[new["status"] == "excluded", "reason"].str.contains("exact copy of data/raw/").all()
    for name in used["image_id"]:
        assert (study.workspace / WORKSPACE / "data" / "slices" / f"{name}.png").is_file()
    assert Engine(study.champion).card["version"] == Engine(champion).card["version"], "the champion stays"
    assert "nfiles: 6" in (study.workspace / "feedback.dvc").read_text()
    said = (study.workspace / WORKSPACE / "retraining.html").read_text()
    assert "The champion stays" in said and "not over the baseline" in said and "copy of another slice" in said


def test_a_challenger_that_is_not_inferior_is_registered_and_promoted(site, champion, monkeypatch):
    study, kept = site
    monkeypatch.setattr(retraining, "run_notebook", arrive(champion, passes=True))
    assert retrain(study, study.champion, study.workspace / "log.sqlite", kept)["passes"]
    assert Engine(study.champion).card["version"] == "passes"
    client = MlflowClient(f"sqlite:///{study.workspace / 'mlflow.db'}")
    entry = client.get_model_version_by_alias("deeptumornet", "champion")
    assert entry.tags["version"] == "passes" and entry.tags["passes"] == "True" and "not inferior" in entry.tags["why"]
    assert len(pd.read_csv(reference(study, study.champion))) == 6, "monitoring has a reference of the new champion"
    assert rollback(study.champion) == Engine(champion).card["version"]
    crown(study, Engine(champion).card["version"])
    assert client.get_model_version_by_alias("deeptumornet", "champion").tags["version"] == Engine(champion).card["version"]


def test_a_retraining_that_cannot_be(site, champion, tmp_path, monkeypatch):
    study, kept = site

    def fails(*_):
        with ThreadPoolExecutor(1) as pool, pytest.raises(StudyError, match="another retraining is at work"):
            pool.submit(retrain, study, study.champion, study.workspace / "log.sqlite", kept).result()
        raise StudyError("notebook 04_resnet50 was killed")

    monkeypatch.setattr(retraining, "run_notebook", fails)
    before = sha256(study.champion / "card.json")
    with pytest.raises(StudyError, match="was killed"):
        retrain(study, study.champion, study.workspace / "log.sqlite", kept)
    assert sha256(study.champion / "card.json") == before
    with pytest.raises(StudyError, match="no slice in .* has feedback in the log"):
        retraining.gather(study.workspace / "log.sqlite", tmp_path, tmp_path / "feedback", study.classes)
