"""Drift that is there is found, and drift that is not there is not."""

import numpy as np
import pandas as pd
import pytest
from conftest import SIZE
from scipy.ndimage import gaussian_filter

from deeptumornet.dicom import window
from deeptumornet.monitoring import decide, drift_table, image_statistics
from deeptumornet.preprocessing import prepare
from deeptumornet.study import StudyError


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
    assert list(found.index[found["drifted"]]) == ["sharpness"]
    assert ((0 <= found["p"]) & (found["p"] <= 1)).all() and (found[["n_reference", "n_current"]] == 60).all(axis=None)
    decision = decide(found.reset_index())
    assert decision["retrain"] and "sharpness rose from a median of" in decision["why"] and "mean" not in decision["why"]


def test_a_wider_spread_is_drift_too():
    wide = table(1, n=400)
    wide["std"] *= 4
    assert drift_table(table(0, n=400), wide).set_index("quantity")["drifted"].to_dict() == {"mean": False, "std": True, "sharpness": False}


def test_false_alarms_are_as_rare_as_promised():
    alarms = sum(decide(drift_table(table(2 * k), table(2 * k + 1), alpha=0.05))["retrain"] for k in range(200))
    assert alarms <= 20, "under Benjamini and Hochberg at most 5 % of quiet windows, with room for chance"


def test_what_is_no_window():
    with pytest.raises(StudyError, match="the current window has 19 slices, too few to tell drift: wait for 20"):
        drift_table(table(0), table(1, n=19))
    with pytest.raises(StudyError, match="no number in column 'std'"):
        drift_table(table(0), table(1).drop(columns="std"))
    with pytest.raises(StudyError, match="no number in column 'mean'"):
        drift_table(table(0), table(1).assign(mean=np.nan))
    assert not drift_table(table(0), table(1, n=19), least=19)["drifted"].any()
