"""Bad input ends in one sentence that names the thing and the remedy; nothing half-written counts as done."""

import errno
import os
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deeptumornet.collection import catalogue, collect
from deeptumornet.commands import main
from deeptumornet.cost import measure_alone
from deeptumornet.dicom import window, write_dicom
from deeptumornet.groups import assert_no_leak, group_folds, split
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import load_manifest, preprocess, read_slice
from deeptumornet.study import Study, StudyError, atomic, load_params, open_study, read_json, write_json
from deeptumornet.training import load_backbone, load_network

ROOT = Path(__file__).resolve().parents[1]


def picture(number: int, cancer: bool) -> Image.Image:
    hu, _ = slice_hu(draw_patient(number, cancer), 0.0)
    return Image.fromarray(window(hu))


def study_on(folder: Path, workspace: Path, **preprocess_settings) -> Study:
    parameters = load_params(ROOT)
    parameters["profile"] = "smoke"
    parameters["smoke"]["collect"] = {"source": str(folder), "folders": {}}
    parameters["smoke"]["preprocess"] |= preprocess_settings
    return Study("smoke", ROOT, workspace, parameters)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for label, cancer in (("normal", False), ("adenocarcinoma", True)):
        (folder / label).mkdir(parents=True)
        for number in range(6):
            picture(number, cancer).save(folder / label / f"{number}.png")
    return folder


def test_an_empty_source_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StudyError, match=r"class 'normal' has no file in .*empty.*put slices there"):
        collect(study_on(tmp_path / "empty", tmp_path / "w"))
    assert not (tmp_path / "w/data/raw").exists()


def test_a_class_with_no_slice(source, tmp_path):
    shutil.rmtree(source / "adenocarcinoma")
    with pytest.raises(StudyError, match=r"class 'adenocarcinoma' has no file .* there are normal\)"):
        collect(study_on(source, tmp_path / "w"))
    (source / "adenocarcinoma").mkdir()
    (source / "adenocarcinoma/a.png").write_bytes(b"nothing")
    study = study_on(source, tmp_path / "w")
    collect(study)
    with pytest.raises(StudyError, match=r"class 'adenocarcinoma' has no readable slice left \(.*a.png is not a PNG"):
        preprocess(study)
    assert not study.manifest.exists()


def test_one_patient_only(source, tmp_path):
    shutil.rmtree(source / "adenocarcinoma")
    for index in range(4):
        hu, _ = slice_hu(draw_patient(1, True), index / 10)
        (source / "adenocarcinoma").mkdir(exist_ok=True)
        Image.fromarray(window(hu)).save(source / "adenocarcinoma" / f"{index}.png")
    labels = [{"path": f"adenocarcinoma/{i}.png", "patient_id": "one", "series_id": "", "slice_index": i, "planted": ""} for i in range(4)]
    study = study_on(source, tmp_path / "w")
    collect(study)
    pd.DataFrame(labels).to_csv(study.raw / "labels.csv", index=False)
    catalogue(study.raw, study.classes, "folder").to_csv(study.catalogue, index=False)
    with pytest.raises(StudyError, match=r"class 'adenocarcinoma' has 1 patient or group, and a split into 4 parts needs 4: add patients"):
        preprocess(study)


def test_broken_files_stay_in_the_manifest_with_a_reason(source, tmp_path):
    whole = (source / "normal/0.png").read_bytes()
    (source / "normal/cut.png").write_bytes(whole[:len(whole) // 2])
    (source / "normal/note.png").write_text("a note")
    Image.new("L", (1, 1)).save(source / "normal/dot.png")
    Image.new("1", (20000, 20000)).save(source / "normal/huge.png")
    Image.new("L", (256, 256), 9).save(source / "normal/blank.png")
    study = study_on(source, tmp_path / "w")
    collect(study)
    manifest, _ = preprocess(study)
    reasons = manifest.set_index(manifest["path"].map(lambda p: Path(p).name))["reason"]
    assert len(manifest) == 17
    for name, words in {"cut.png": "damaged or cut short", "note.png": "not a PNG", "dot.png": "1×1 pixels",
                        "huge.png": "too", "blank.png": "blank"}.items():
        assert words in reasons[name] and name in reasons[name]
    assert (manifest["status"] == "excluded").sum() == 5
    assert load_manifest(study.manifest)["split"].isin(["train", "validation", "test", ""]).all()


@pytest.mark.parametrize(("change", "sentence"), [
    ({"profile": "papre"}, "profile 'papre' is unknown; choose demo, paper, smoke"),
    ({"networks": {"resnet99": "04_resnet99"}}, "network 'resnet99' is unknown; choose inceptionv3, nasnetmobile, resnet50"),
    ({"positive": "cancer"}, "positive class 'cancer' is unknown; choose normal, adenocarcinoma"),
    ({"tune_on": "vgg"}, "network in tune_on 'vgg' is unknown"),
])
def test_unknown_words_in_params_yaml(tmp_path, change, sentence):
    for name in ("nbs", "deeptumornet"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path / name)
    content = yaml.safe_load((ROOT / "params.yaml").read_text()) | change
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    subprocess.run(["dvc", "init", "-q", "--no-scm"], cwd=tmp_path, env=env, check=True)
    for words in (["deeptumornet", "check"], ["dvc", "repro"]):
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode != 0 and sentence in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)


def test_a_file_that_is_no_model_cannot_be_measured(tmp_path):
    (tmp_path / "model.keras").write_text("a note")
    with pytest.raises(StudyError, match="model.keras cannot be measured .*train this network again"):
        measure_alone(tmp_path / "model.keras", 0.1)


def test_weights_that_are_missing_or_of_another_network(tmp_path):
    with pytest.raises(StudyError, match=r"none.h5 of train.weights.resnet50 is missing: put it there"):
        load_backbone(load_network("resnet50"), 32, str(tmp_path / "none.h5"), ROOT)
    load_backbone(load_network("nasnetmobile"), 32, "none", ROOT).save_weights(tmp_path / "mobile.weights.h5")
    with pytest.raises(StudyError, match=r"mobile.weights.h5 does not belong to ResNet50"):
        load_backbone(load_network("resnet50"), 32, str(tmp_path / "mobile.weights.h5"), ROOT)
    load_backbone(load_network("nasnetmobile"), 32, str(tmp_path / "mobile.weights.h5"), ROOT)


def test_a_full_disk(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(StudyError, match=r"the disk is full while writing .*a.json: free some space"):
        with atomic(tmp_path / "a.json") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("half")
    assert read_json(tmp_path / "a.json") == 1 and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(OSError, match="other"), atomic(tmp_path / "a.json"):
        raise OSError(errno.EIO, "other")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2), st.integers(0, 2000))
def test_any_bytes_give_a_slice_or_a_sentence(noise, kind, at):
    whole = [b"", PNG, DICOM][kind]
    data = whole[:at] + noise + whole[at + len(noise):]
    try:
        assert read_slice(data, "noise").pixels.dtype == np.uint8
    except StudyError as error:
        assert "noise" in str(error)


def _png() -> bytes:
    buffer = BytesIO()
    picture(0, True).save(buffer, "PNG")
    return buffer.getvalue()


def _dicom() -> bytes:
    buffer = BytesIO()
    hu, _ = slice_hu(draw_patient(1, True), 0.0)
    write_dicom(buffer, hu, "p", 0.0, 1.4, "s")
    return buffer.getvalue()


PNG, DICOM = _png(), _dicom()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=80, max_size=200), st.integers(0, 99))
def test_a_group_never_straddles(slices, seed):
    table = pd.DataFrame([{"group": f"{g}{c}", "label": str(c), "status": "kept", "image_id": k} for k, (g, c) in enumerate(slices)])
    try:
        done = split(table, 0.25, 0.25, 2, seed)
    except StudyError as error:
        assert "needs" in str(error) or "large groups" in str(error)
        return
    assert_no_leak(done)
    assert (done.groupby("split")["label"].nunique() == 2).all() and set(done["split"]) == {"train", "validation", "test"}
    assert len(set(group_folds(table, 2, seed))) == 2


def test_unreadable_notebook_name_is_one_sentence(capsys):
    assert main(["run", "99_none", "--profile", "smoke"]) == 1
    assert capsys.readouterr().err.startswith("deeptumornet: there is no notebook")
    assert open_study("smoke").profile == "smoke"
