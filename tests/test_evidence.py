"The evidence against published worked examples (each named where it stands), against scipy and scikit-learn, and at its edges"

import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2, norm, ttest_1samp
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score

from deeptumornet import evidence
from deeptumornet.study import StudyError

# Albumin, total protein and K-G score of 43 women with ovarian cancer, and whether surgery helped: DeLong, DeLong, Clarke-Pearson,
# Biometrics 44 (1988) 837, as printed in SAS/STAT's User's Guide, LOGISTIC, example "Comparing Receiver Operating Characteristic Curves".
OVARIAN = np.array("""
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1 3.7 6.7 6 1 3.2 5.4 4 1 3.8
6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0 4.0 6.6 6 0 3.5 5.8 6 1 3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4
5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1 4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1 3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1
4.2 7.7 6 1 3.5 6.2 5 1 2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1 3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
""".split(), float).reshape(-1, 4)

# The first sixty of R's rnorm after set.seed(123), from which the vignette of the R package correctR (Henderson, 2022) makes its example.
RNORM = np.array("""
-0.56047565 -0.23017749 1.55870831 0.07050839 0.12928774 1.71506499 0.46091621 -1.26506123 -0.68685285 -0.44566197 1.22408180 0.35981383
0.40077145 0.11068272 -0.55584113 1.78691314 0.49785048 -1.96661716 0.70135590 -0.47279141 -1.06782371 -0.21797491 -1.02600445
-0.72889123 -0.62503927 -1.68669331 0.83778704 0.15337312 -1.13813694 1.25381492 0.42646422 -0.29507148 0.89512566 0.87813349 0.82158108
0.68864025 0.55391765 -0.06191171 -0.30596266 -0.38047100 -0.69470698 -0.20791728 -1.26539635 2.16895597 1.20796200 -1.12310858
-0.40288484 -0.46665535 0.77996512 -0.08336907 0.25331851 -0.02854676 -0.04287046 1.36860228 -0.22577099 1.51647060 -1.54875280
0.58461375 0.12385424 0.21594157""".split(), float)


def test_delong_on_the_data_of_the_paper_gives_the_published_contrast():
    "SAS prints, for both tests against the K-G score together: chi-square 2.5340, 2 degrees of freedom, p 0.2817"
    albumin, protein, score, helped = OVARIAN.T
    pairs = {"ak": (albumin, -score), "pk": (protein, -score), "ap": (albumin, protein)}
    got = {name: evidence.delong(helped, *two, range(43)) for name, two in pairs.items()}
    variance = {name: ((g["high"] - g["low"]) / 2 / norm.ppf(0.975)) ** 2 for name, g in got.items()}
    shared = (variance["ak"] + variance["pk"] - variance["ap"]) / 2
    both = np.array([got["ak"]["difference"], got["pk"]["difference"]])
    statistic = both @ np.linalg.solve([[variance["ak"], shared], [shared, variance["pk"]]], both)
    assert (round(statistic, 4), round(chi2.sf(statistic, 2), 4)) == (2.5340, 0.2817)


def test_delong_by_hand():
    "R. Draelos, Comparing AUCs of Machine Learning Models with DeLong's Test (2020): areas 1 and 2/3, variances 0 and 1/9, so z = 1"
    got = evidence.delong([0, 0, 1, 1, 1], [0.1, 0.2, 0.6, 0.7, 0.8], [0.3, 0.6, 0.2, 0.7, 0.9], range(5))
    assert got["difference"] == pytest.approx(1 / 3) and got["p"] == pytest.approx(2 * norm.sf(1))


def test_corrected_t_gives_the_published_statistic():
    "correctR's vignette: resampled_ttest of 30 repeats with 80 slices to train and 20 to test prints 2.407318 and, of one side, 0.01132991"
    differences = (0.6 + 0.1 * RNORM[:30]) - (0.4 + 0.1 * RNORM[30:])
    got = evidence.corrected_t(differences, 20 / 80)
    assert got["p"] / 2 == pytest.approx(0.01132991, abs=1e-7)
    half = (got["high"] - got["low"]) / 2
    assert got["difference"] / half * student.ppf(0.975, 29) == pytest.approx(2.407318, abs=1e-5)


def test_calibration_error_of_nine_samples():
    "M. Pavlovic, Expected Calibration Error: a step-by-step visual explanation (2023): three bins, 0.23778"
    p, truth = [0.22, 0.64, 0.92, 0.42, 0.51, 0.15, 0.70, 0.37, 0.83], np.array([0, 1, 0, 0, 0, 1, 1, 0, 1])
    right = (np.array(p) > 0.5) == truth
    assert evidence.calibration(right, p, range(9), 10, 0, bins=3)["ece"] == pytest.approx(0.23778, abs=1e-5)


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


@pytest.mark.parametrize("got", [
    lambda: evidence.corrected_t([0.1, 0.1, 0.1], 0.25),
    lambda: evidence.delong([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1], range(4)),
])
def test_a_difference_without_spread_has_no_p(got):
    "Two splits that agree, or two slices, prove nothing: p = 0 would be the strongest claim there is"
    got = got()
    assert got["difference"] > 0 and np.isnan([got["p"], got["low"], got["high"]]).all() and "cannot be estimated" in got["why"]


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


FOUR = ["normal", "adenocarcinoma", "large cell", "squamous"]


def test_four_classes_have_every_metric_beside_the_baselines_and_say_what_is_undefined():
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.ones(4), 200)
    label = [FOUR[rng.choice(4, p=row)] for row in p]
    table = pd.DataFrame(p, columns=[f"p_{c}" for c in FOUR]).assign(label=label, group=np.arange(200) // 2)
    got = evidence.per_class(table, FOUR, 100, 0).set_index("class")
    assert list(got.index) == [*FOUR, "macro", "cancer against normal"]
    for m in evidence.metrics.METRICS:
        assert (got[f"{m}_low"] <= got[m]).all() and (got[m] <= got[f"{m}_high"]).all()
    order = sorted(FOUR)
    y, score = pd.get_dummies(table["label"])[order].to_numpy(int), table[[f"p_{c}" for c in order]].to_numpy()
    assert got.at["macro", "auc"] == pytest.approx(roc_auc_score(y, score, average="macro"))
    assert got.at["macro", "average_precision"] == pytest.approx(average_precision_score(y, score, average="macro"))
    top = np.array(FOUR)[p.argmax(1)]
    assert got.at["macro", "f1"] == pytest.approx(f1_score(table["label"], top, average="macro"))
    assert got.at["cancer against normal", "mcc"] == pytest.approx(matthews_corrcoef(table["label"] != "normal", top != "normal"))
    lone = evidence.per_class(table[table["label"] != "squamous"], FOUR, 20, 0).set_index("class")
    assert "sensitivity: the positive class has no slices" in lone.at["squamous", "why"]
    assert np.isnan(lone.at["macro", "auc"]) and lone.at["macro", "why"].endswith("undefined for a class")


def test_constant_output_is_told_by_every_part_of_the_evidence():
    y, groups = np.arange(40) % 2, np.arange(40) // 2
    got = evidence.calibration(y, np.full(40, 0.5), groups, 50, 0)
    assert got["why"] == "no slope: p is constant" and got["ece"] == 0
    bins = {"n": evidence.reliability(y, np.full(40, 0.5), groups)}
    found = pd.DataFrame([{"name": "n", "temperature": 1.0, **got}])
    figure = evidence.reliability_figure(bins, {"n": "N"}, found)
    assert "No slope can be fitted" in figure.get_suptitle().replace("\n", " ")
