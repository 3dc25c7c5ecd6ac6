"""The two commands for people who never run the study, on real slices where they are given, as a stranger calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
KAGGLE, OTHER = SHARED / "data/chest_ct_kaggle/Data/train", SHARED / "data/iqothnccd_part"
WEIGHTS = SHARED / "weights/inceptionv3_notop.weights.h5"
real = pytest.mark.skipif(not (KAGGLE.is_dir() and OTHER.is_dir() and WEIGHTS.is_file()),
                          reason="../shared, with real slices and weights, is not here")


def deeptumornet(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.executable).with_name("deeptumornet"), *map(str, words)], capture_output=True, text=True)


@real
def test_audit_of_the_published_data():
    report = json.loads(deeptumornet("audit", KAGGLE, "--json").stdout)
    of = {name.split("_")[0]: counts for name, counts in report["classes"].items()}
    two = of["adenocarcinoma"], of["normal"]
    assert sum(c["n_files"] for c in two) == 343 and sum(c["n_distinct"] for c in two) == 249
    assert of["normal"]["n_groups"] <= 24
    conflicts = [{Path(f).name for f in conflict["files"]} for conflict in report["label_conflicts"]]
    assert {"l4.png", "sq2.png"} in conflicts
    assert "L1.4" in report["verdict"] and "L3.2" in report["verdict"]
    for baseline in report["baselines"].values():
        assert baseline["random"]["n"] >= 600 and baseline["grouped"]["auc"]["low"] <= baseline["grouped"]["auc"]["value"]


@real
def test_external_on_another_hospital():
    done = deeptumornet("external", "--train", KAGGLE, "--test", OTHER, "--positive", "adenocarcinoma,Malignant cases",
                        "--negative", "normal,Normal cases", "--weights", WEIGHTS, "--json")
    report = json.loads(done.stdout)
    assert report["auc"] >= 0.85 and report["low"] < report["auc"] < report["high"]
    assert report["n"] + report["n_excluded"] >= 230 and report["n_groups"] > 20
    best = max(other["auc"]["value"] for other in report["baselines"].values())
    assert ("does not prove" in report["verdict"]) == (0.5 < report["low"] <= best), "the baselines stand beside the score"


@pytest.mark.parametrize(("words", "said"), [
    (["audit", "nowhere"], "nowhere is not a folder"),
    (["external", "--train", "nowhere", "--test", ".", "--positive", "a", "--negative", "b", "--weights", "none.h5"], "none.h5 is missing"),
])
def test_bad_input_is_one_sentence(words, said):
    done = deeptumornet(*words)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("deeptumornet: ")]) == 1


def test_an_empty_folder(tmp_path):
    done = deeptumornet("audit", tmp_path)
    assert done.returncode == 1 and "has no sub-folder with files" in done.stderr
