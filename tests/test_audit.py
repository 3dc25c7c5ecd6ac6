"""The audit finds what was put there, says so in words, and gives a sentence where a number cannot be had."""

import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from deeptumornet import audit as a
from deeptumornet.dicom import write_dicom
from deeptumornet.groups import field, group, hashes, mark_copies
from deeptumornet.lungs import standardise
from deeptumornet.preprocessing import read_slice
from deeptumornet.study import StudyError

SHARED = Path(__file__).resolve().parents[1].parent / "shared/data/chest_ct_kaggle/Data/train"
KEYS = ["n_files", "n_distinct", "classes", "label_conflicts", "near_conflicts", "baselines", "leakage", "excluded", "verdict"]


def made(n: int, classes=("x", "y"), per_group: int = 3, seed: int = 0, **columns) -> tuple[pd.DataFrame, np.ndarray]:
    """A manifest of `n` different slices of random numbers, `per_group` of each patient, and their thumbnails."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({
        "path": [f"{k}.png" for k in range(n)], "label": [classes[k // per_group % len(classes)] for k in range(n)],
        "image_id": [f"{k:064x}" for k in range(n)], "group": [f"g{k // per_group}" for k in range(n)], "patient_id": "",
        "source": "folder", "width": 512, "height": 512, "mode": "L", "format": "PNG", "file_bytes": 9000, "border": 0.0,
        "sharpness": rng.random(n), "status": "kept", "reason": "", "flags": "", **columns})
    return table, rng.integers(0, 256, (n, 16, 16), np.uint8)


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 200)
    p = rng.dirichlet(np.ones(3), 200).round(2)
    p /= p.sum(1, keepdims=True)
    found = a.scores(labels, p, np.arange(200) // 4, seed=0)
    assert found["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, np.array(["a", "b", "c"])[p.argmax(1)]))
    assert found["auc"]["value"] == pytest.approx(roc_auc_score(labels, p, multi_class="ovr", average="macro"))
    assert (found["n"], found["n_groups"]) == (200, 50)
    assert all(found[m]["low"] < found[m]["value"] < found[m]["high"] for m in ("auc", "balanced_accuracy"))


def test_the_interval_counts_groups_and_not_slices():
    rng = np.random.default_rng(0)
    patient = np.arange(400) // 20
    labels = np.array(["x", "y"])[patient % 2]
    p = np.repeat(rng.random(20) + 0.5 * (np.arange(20) % 2), 20) / 1.5
    p = np.column_stack([1 - p, p])
    width = [s["auc"]["high"] - s["auc"]["low"] for s in (a.scores(labels, p, patient, 0), a.scores(labels, p, np.arange(400), 0))]
    assert width[0] > 2.5 * width[1]


def test_what_is_put_there_is_found():
    table, thumbnails = made(120)
    assert a.audit(table, thumbnails, 0)["leakage"]["same_pixels"] == 0
    table["file_bytes"] = np.where(table["label"] == "x", 9000, 5000)
    report = a.audit(table, thumbnails, 0)
    assert report["baselines"]["metadata"]["grouped"]["auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert report["baselines"]["border"]["grouped"]["auc"]["value"] == 0.5
    assert "L2, illegitimate features" in report["verdict"] and "file metadata (AUC 1.00" in report["verdict"]
    assert "L1.4" not in report["verdict"] and "L3.2" in report["verdict"]


def test_a_group_that_is_known_by_heart_helps_in_random_folds_alone():
    table, thumbnails = made(240, per_group=6)
    scene = np.random.default_rng(1).integers(0, 256, (40, 16, 16), np.uint8)
    thumbnails = (0.9 * scene[np.arange(240) // 6] + 0.1 * thumbnails).astype(np.uint8)
    found = a.baselines(table, thumbnails, 0)["thumbnails"]
    assert found["random"]["auc"]["value"] > 0.95
    assert found["grouped"]["auc"]["low"] < 0.5 < found["grouped"]["auc"]["high"] + 0.1


def test_copies_leak_as_chance_has_it():
    table, thumbnails = made(300, per_group=1)
    double = pd.concat([table, table], ignore_index=True)
    leak = a.leaked_share(double, double["group"], seed=0)
    assert leak["same_pixels"] == leak["same_group"] == pytest.approx(0.7, abs=0.02)
    report = a.audit(mark_copies(double), np.concatenate([thumbnails, thumbnails]), 0)
    assert (report["n_files"], report["n_distinct"], report["excluded"]) == (600, 300, {"exact copy": 300})
    assert f"{report['leakage']['same_pixels']:.0%} of the test files have exactly their pixels" in report["verdict"]


def test_a_clean_data_set_is_called_clean():
    table, thumbnails = made(200, per_group=1, sharpness=1.0)
    report = a.audit(table, 0 * thumbnails, 0)
    assert report["verdict"] == "200 files show 200 distinct slices. None of the leaks that this audit looks for was found."
    assert "none found" in a.text(report)


@pytest.mark.parametrize(("n", "classes", "sentence"), [
    (9, ("x",), "1 class has slices, and a baseline needs two"),
    (5, ("x", "y"), "class 'x' has 1 patient or group, and a baseline needs 2"),
])
def test_too_few_say_so(n, classes, sentence):
    table, thumbnails = made(n, classes)
    report = a.audit(table, thumbnails, 0)
    assert all(sentence in kinds["grouped"]["why"] for kinds in report["baselines"].values())
    assert sentence in report["verdict"] and "too few" in a.text(report)
    a.baseline_figure(report).canvas.draw()


def test_nothing_readable_is_one_sentence():
    table, thumbnails = made(4, image_id="", status="excluded", reason="a.png is damaged", group="")
    with pytest.raises(StudyError, match="none of the 4 files shows a slice: give a folder"):
        a.audit(table, thumbnails, 0)


OTHER = "another kind of picture"


@pytest.mark.parametrize(("kind", "tags"), [
    (OTHER, {"Modality": "MR"}), (OTHER, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}), (OTHER, {"RescaleType": "Z_EFF"}),
    (OTHER, {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}), (OTHER, {"BurnedInAnnotation": "YES"}),
    (OTHER, {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}), (OTHER, {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
    ("unreadable", {"Rows": None}), ("quality", None),
])
def test_each_reason_is_counted_as_what_it_is(kind, tags, tmp_path):
    write_dicom(tmp_path / "a.dcm", np.zeros((16, 16), np.float32), "p", 0.0, 1.0, "s")
    if tags is not None:
        data = pydicom.dcmread(tmp_path / "a.dcm")
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(tmp_path / "a.dcm")
    with pytest.raises(StudyError) as refused:
        read_slice(tmp_path / "a.dcm", "a.dcm")
    table, thumbnails = made(60)
    table.loc[0, ["status", "reason"]] = "excluded", str(refused.value)
    assert a.audit(table, thumbnails, 0)["excluded"] == {kind: 1}, refused.value


STATES = ["kept", "kept", "kept", "blurred", "unreadable"]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.sampled_from(STATES)),
                min_size=1, max_size=40), st.integers(0, 9))
def test_any_folder_gives_a_report_or_a_sentence(files, seed):
    table, thumbnails = made(len(files), seed=seed)
    table["label"] = [label for _, label, _ in files]
    table["image_id"] = ["" if what == "unreadable" else f"{picture:064x}" for picture, _, what in files]
    table["group"] = ["" if what == "unreadable" else f"g{picture // 2}" for picture, _, what in files]
    table["status"] = ["kept" if what == "kept" else "excluded" for _, _, what in files]
    table["reason"] = ["" if what == "kept" else f"1.png is {what}" for _, _, what in files]
    table = mark_copies(table)
    try:
        report = a.audit(table, thumbnails, seed)
    except StudyError as error:
        assert "none of the" in str(error) and (table["image_id"] == "").all()
        return
    assert list(report) == KEYS and json.loads(json.dumps(report, allow_nan=False)) == report
    assert sum(report["excluded"].values()) == (table["status"] == "excluded").sum()
    steps = a.steps(table).to_numpy()
    assert (np.diff(steps, axis=0) <= 0).all() and steps[0].sum() == len(files) and steps[4].sum() == (table["status"] == "kept").sum()
    assert len(report["verdict"]) > 30 and a.text(report) and "## Uses" in a.datasheet(table, report, "")
    for figure in (a.flow_figure(table), a.baseline_figure(report)):
        figure.canvas.draw()


# -- the published slices, where they are at hand -----------------------------------------------------------------------


def _read(path: Path) -> dict:
    row = {"path": f"{path.parent.name}/{path.name}", "label": path.parent.name, "file_bytes": path.stat().st_size, "patient_id": ""}
    found = read_slice(path, path.name)
    picture = Image.fromarray(found.pixels)
    pixels = found.pixels.astype(float)
    row |= {"image_id": found.image_id, "width": found.width, "height": found.height, "mode": found.mode, "format": found.format,
            "border": np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(),
            "sharpness": np.abs(np.diff(pixels, n=2, axis=0)).mean(), "status": "kept", "reason": "", "flags": "", "source": "kaggle",
            **dict(zip(("phash", "dhash"), hashes(found.pixels), strict=True)),
            "thumbnail": np.asarray(picture.resize((16, 16), Image.Resampling.BOX))}
    try:
        return row | {"field": field(standardise(found.pixels, 80)[0])}
    except StudyError:
        return row | {"field": np.full(576, np.nan, np.float32)}


@pytest.fixture(scope="module")
def published():
    files = sorted(SHARED.glob("*/*"))
    if not files:
        pytest.skip(f"{SHARED} is not here: it holds the published slices that this audits")
    with ProcessPoolExecutor(2) as pool:
        return pd.DataFrame(pool.map(_read, files, chunksize=16))


def _audited(table: pd.DataFrame) -> tuple[dict, float]:
    table = table.reset_index(drop=True)
    start = time.perf_counter()
    manifest = mark_copies(table)
    manifest["group"] = group(table, 4, np.stack(table["field"]), 0.75)
    return a.audit(manifest, np.stack(table["thumbnail"]), 0), time.perf_counter() - start


def test_the_published_slices(published):
    report, _ = _audited(published[published["label"].str.contains("normal|adenocarcinoma")])
    assert (report["n_files"], report["n_distinct"]) == (343, 249)
    assert report["classes"]["normal"]["n_distinct"] == 55 and report["classes"]["normal"]["n_groups"] <= 24
    thumbnails = {kind: s["balanced_accuracy"]["value"] for kind, s in report["baselines"]["thumbnails"].items()}
    assert thumbnails["random"] > 0.95 and thumbnails["grouped"] < 0.85
    assert report["baselines"]["metadata"]["random"]["balanced_accuracy"]["value"] > 0.85
    assert report["leakage"]["same_pixels"] > 0.3 and all(kind in report["verdict"] for kind in ("L1.4", "L2", "L3.2"))


def test_all_four_classes_in_time(published):
    report, seconds = _audited(published)
    print(a.text(report), f"\n{seconds:.1f} s")
    assert [sorted(Path(f).name for f in conflict["files"]) for conflict in report["label_conflicts"]] == [["l4.png", "sq2.png"]]
    assert seconds < 20
    assert len(a.text(report).splitlines()) <= 15 and max(map(len, a.text(report).splitlines())) <= 115
