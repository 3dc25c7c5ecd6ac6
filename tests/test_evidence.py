"The evidence against published worked examples, against scipy and scikit-learn, and at its edges"

import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from deeptumornet import evidence
from deeptumornet.study import StudyError


def delong_by_definition(y, a, b):
    "DeLong's variance from the kernel of every pair of slices, as in the paper, without ranks"
    kernels = [np.sign(np.subtract.outer(p[y == 1], p[y == 0])) / 2 + 0.5 for p in (a, b)]
    d = kernels[0] - kernels[1]
    return d.mean(), d.mean(1).var(ddof=1) / d.shape[0] + d.mean(0).var(ddof=1) / d.shape[1]


def test_delong_with_one_slice_a_group_is_delong_ties_too():
    rng = np.random.default_rng(1)
    y = np.arange(90) % 2
    a, b = np.round(y + rng.normal(0, 1, 90), 1), np.round(y + rng.normal(0, 2, 90), 1)
    difference, variance = delong_by_definition(y, a, b)
    ours = evidence.delong(y, a, b, range(90))
    assert ours["difference"] == pytest.approx(difference) == pytest.approx(roc_auc_score(y, a) - roc_auc_score(y, b))
    assert (ours["high"] - ours["low"]) / 2 / 1.959964 == pytest.approx(np.sqrt(variance))


def test_copies_of_slices_add_no_certainty():
    rng = np.random.default_rng(2)
    y = np.arange(60) % 2
    a, b = y + rng.normal(0, 1, 60), y + rng.normal(0, 2, 60)
    once = evidence.delong(y, a, b, range(60))
    copied = evidence.delong(*(np.repeat(v, 5) for v in (y, a, b, np.arange(60))))
    assert copied == pytest.approx(once)


def test_corrected_t_without_shared_slices_is_the_t_test():
    d = [0.02, 0.05, -0.01, 0.04, 0.03]
    assert evidence.corrected_t(d, 0)["p"] == pytest.approx(ttest_1samp(d, 0).pvalue)
    assert evidence.corrected_t([0.0, 0.0], 0.25)["p"] == 1


def test_calibration_slope_is_logistic_regression():
    rng = np.random.default_rng(3)
    p = rng.uniform(0.05, 0.95, 500)
    y = (rng.random(500) < p).astype(int)
    x = np.log(p / (1 - p))[:, None]
    model = LogisticRegression(C=1e9, tol=1e-10).fit(x, y)
    ours = evidence.calibration(y, p, np.arange(500), 100, 0)
    assert ours["slope"] == pytest.approx(model.coef_[0, 0], abs=1e-4)
    assert ours["intercept"] == pytest.approx(model.intercept_[0], abs=1e-4)


def test_nan_and_single_classes_are_sentences():
    with pytest.raises(StudyError, match="not numbers"):
        evidence.delong([0, 1], [0.1, np.nan], [0.1, 0.2], [1, 2])
    with pytest.raises(StudyError, match="not numbers"):
        evidence.reliability([0, 1], [0.1, np.nan], [1, 2])
    assert "why" in evidence.calibration([1, 1], [0.1, 0.2], [1, 2], 10, 0)


def test_a_fold_of_one_class_keeps_its_row_with_the_reason():
    rows = pd.DataFrame([{"image_id": f"{i}{f}", "path": "", "group": f"{i}{f}", "network": n, "protocol": "grouped", "repeat": 0,
                          "fold": f, "label": "a" if f == "0" or i else "b", "p_a": i / 4} for n in "xy" for f in "01" for i in range(4)])
    table = evidence.differences(rows, ["x", "y"], "a", {})
    assert table["p"].isna().all() and table["why"].str.contains("1 of 2 splits").all()


def test_constant_networks_are_no_better_than_each_other():
    rows = pd.DataFrame([{"image_id": str(i), "path": "", "group": str(i), "network": n, "protocol": "holdout", "repeat": 0, "fold": "0",
                          "label": "ab"[i % 2], "p_a": 0.5} for n in "xy" for i in range(20)])
    table = evidence.differences(rows, ["x", "y"], "a", {"x": 0.5, "y": 0.5})
    assert all(s.startswith("No network is better") for s in evidence.said(table, {"x": "X", "y": "Y"}))


def test_twenty_five_folds_of_four_networks_take_seconds():
    rng = np.random.default_rng(4)
    y = np.arange(300) % 2
    parts = [pd.DataFrame({"image_id": np.arange(300).astype(str), "path": "", "group": (np.arange(300) // 4).astype(str), "network": n,
                           "protocol": "grouped", "repeat": r, "fold": (np.arange(300) // 2 % 5).astype(str),
                           "label": np.array(["b", "a"])[y], "p_a": rng.random(300)}) for n in "wxyz" for r in range(5)]
    start = time.perf_counter()
    table = evidence.differences(pd.concat(parts), list("wxyz"), "a", {})
    [evidence.calibration(y, rng.random(300), np.arange(300) // 4, 2000, 0) for _ in range(4)]
    assert (table["n"] == 25).all() and time.perf_counter() - start < 20
