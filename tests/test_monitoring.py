"""Drift that is there is found, and drift that is not there is not."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import SIZE
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp

from deeptumornet.dicom import window
from deeptumornet.log import PredictionLog
from deeptumornet.metrics import wilson
from deeptumornet.monitoring import (
    decide,
    drift_table,
    false_alarms,
    image_statistics,
    monitor,
    performance,
    stability,
    statistics_table,
)
from deeptumornet.preprocessing import prepare
from deeptumornet.study import StudyError, read_json, write_json


def table(seed: int, n: int = 60, **shifts: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({c: rng.normal(size=n) + shifts.get(c, 0) for c in ("mean", "std", "sharpness")})


def test_statistics_of_known_pictures():
    flat = image_statistics(np.full((8, 8), 7, np.uint8))
    assert flat == {"mean": 7.0, "std": 0.0, "sharpness": 0.0, "dark": 1.0}
    board = np.indices((8, 8)).sum(0) % 2 * 255
    sharp = image_statistics(board.astype(np.uint8))
    assert sharp["mean"] == sharp["std"] == 127.5 and sharp["dark"] == 0.5 and sharp["sharpness"] > 500


def test_what_each_change_does_to_the_statistics(phantoms):
    slice_ = prepare(window(phantoms[1]), SIZE, "lungs")
    plain, blurred = image_statistics(slice_), image_statistics(gaussian_filter(slice_, 1))
    brighter = image_statistics(np.minimum(slice_.astype(int) + 17, 255).astype(np.uint8))
    assert blurred["sharpness"] < plain["sharpness"] and abs(blurred["mean"] - plain["mean"]) < 2
    assert brighter["mean"] > plain["mean"] + 10 and brighter["dark"] == 0


def test_a_shift_is_found_in_its_column_alone():
    found = drift_table(table(0), table(1, sharpness=2.0)).set_index("quantity")
    assert list(found.index[found["drifted"]]) == ["sharpness", "all together"] and found["alarm"].all()
    assert ((0 <= found["p"]) & (found["p"] <= 1)).all() and (found[["n_reference", "n_current"]] == 60).all(axis=None)
    decision = decide(found.reset_index())
    assert decision["retrain"] and "sharpness rose from a median of" in decision["why"] and "mean" not in decision["why"]


def test_a_wider_spread_is_drift_too():
    wide = table(1, n=400)
    wide["std"] *= 4
    found = drift_table(table(0, n=400), wide).set_index("quantity")["drifted"]
    assert found[["mean", "std", "sharpness"]].to_dict() == {"mean": False, "std": True, "sharpness": False}


def test_false_alarms_are_as_rare_as_promised():
    """Columns that depend on each other, ties, and skewed values: the permutations suppose none of it away."""
    rng = np.random.default_rng(3)
    common = rng.exponential(size=(150, 1))
    pool = pd.DataFrame(np.round(common + rng.normal(size=(150, 3)), 1))
    found = false_alarms(pool, 60, (0.05, 0.2), windows=500, permutations=99, seed=1)
    assert (found["n"] == 500).all() and (found["low"] <= found["alpha"]).all() and (found["alpha"] <= found["high"]).all(), found


def test_the_permutation_statistic_is_scipys():
    a, b = table(0).round(1), table(1, n=35, std=1).round(1)
    found = drift_table(a, b).set_index("quantity")["statistic"]
    for column in a:
        assert found[column] == pytest.approx(ks_2samp(a[column], b[column]).statistic, abs=1e-12)


def test_dependence_that_changed_is_found_only_together():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 150))
    now = pd.DataFrame({"a": x, "b": x + 0.1 * y})
    before = pd.DataFrame(rng.normal(size=(150, 2)), columns=["a", "b"])
    found = drift_table(before, now).set_index("quantity")
    assert found["drifted"].to_dict() == {"a": False, "b": False, "all together": True}
    assert "none by itself" in decide(found.reset_index())["why"]


def test_stability_of_the_customary_example():
    same, moved = np.arange(1000.0), np.arange(1000.0) + 500
    assert stability(same, same) == 0 and stability(same, moved) > 0.25


def test_the_sequential_test_keeps_its_level_while_watched():
    rng = np.random.default_rng(0)
    quiet = sum(performance(rng.random(400) < 0.8, 0.8)["fallen"] for _ in range(500))
    assert wilson(quiet, 500)[0] <= 0.05, "in 500 runs, each looked at 400 times"
    assert performance([False] * 20, 0.8)["fallen"] and performance([], 0.8)["accuracy"] is None


def test_monitor_reads_the_log_and_writes_report_and_gauges(champion, tmp_path):
    card = read_json(champion / "card.json")
    rng = np.random.default_rng(0)
    slices = rng.integers(0, 255, (60, 8, 8)).astype(np.uint8)
    reference = statistics_table(slices[:30], rng.random(30) / 10, rng.random((30, 4)))
    reference.to_csv(tmp_path / "reference.csv", index=False)
    log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    ids = [log.record(card["version"], "i", {"adenocarcinoma": 0.9, "normal": 0.1}, s, rng.random(4)) for s in slices[30:]]
    for one in ids[:20]:
        log.feedback(one, "normal", "A", card["classes"])
    log.close()
    card["metrics"]["accuracy"] = {"value": 0.85}
    (tmp_path / "champion").mkdir()
    write_json(tmp_path / "champion" / "card.json", card)
    said = monitor(tmp_path / "champion", tmp_path / "reference.csv", tmp_path / "log.sqlite", tmp_path / "out", 0.05)
    assert said["retrain"] and "probability rose" in said["why"] and "accuracy fell to 0.00" in said["why"]
    lines = (tmp_path / "out" / "drift.prom").read_text().splitlines()
    assert f'deeptumornet_drift_alarm{{version="{card["version"]}"}} 1' in lines
    page = (tmp_path / "out" / "drift.html").read_text()
    assert "probability" in page and not re.search(r"(src|href)=.?https?:", page)
    with pytest.raises(StudyError, match="is missing: run `dvc repro`"):
        monitor(tmp_path, tmp_path / "reference.csv", tmp_path / "log.sqlite", tmp_path / "out", 0.05)


def test_what_is_no_window():
    with pytest.raises(StudyError, match="the current window has 19 slices, too few to tell drift: wait for 20"):
        drift_table(table(0), table(1, n=19))
    with pytest.raises(StudyError, match="no number in column 'std'"):
        drift_table(table(0), table(1).drop(columns="std"))
    with pytest.raises(StudyError, match="no number in column 'mean'"):
        drift_table(table(0), table(1).assign(mean=np.nan))
    assert not drift_table(table(0), table(1, n=19), least=19)["drifted"].any()
