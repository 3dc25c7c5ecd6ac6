"The metrics against scikit-learn and against their definitions, on drawn inputs"

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from deeptumornet import metrics
from deeptumornet.study import StudyError


@st.composite
def scored(draw, both=True):
    "Labels, tied and untied probabilities, integer weights that leave at least one slice of each class"
    n = draw(st.integers(4, 40))
    y = draw(arrays(int, n, elements=st.integers(0, 1)))
    if both:
        y[:2] = 0, 1
    grid = draw(st.sampled_from([2, 10, 1000]))
    p = draw(arrays(int, n, elements=st.integers(0, grid))) / grid
    w = draw(arrays(int, n, elements=st.integers(0, 4)))
    w[:2] = np.maximum(w[:2], 1)
    return y, p, w


@given(scored())
@settings(max_examples=200, deadline=None)
def test_every_metric_equals_scikit_learn(case):
    y, p, w = case
    ours = {k: v[0] for k, v in metrics.metric_values(y, p, 0.5, w).items()}
    called, options = p >= 0.5, {"sample_weight": w}
    assert ours["auc"] == pytest.approx(sk.roc_auc_score(y, p, **options))
    assert metrics.weighted_auc(y, p, w[None])[0] == ours["auc"]
    assert ours["average_precision"] == pytest.approx(sk.average_precision_score(y, p, **options))
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(y, called, **options))
    assert ours["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, called, **options))
    assert ours["sensitivity"] == pytest.approx(sk.recall_score(y, called, **options))
    assert ours["specificity"] == pytest.approx(sk.recall_score(1 - y, ~called, **options))
    if w[called].sum():
        assert ours["precision"] == pytest.approx(sk.precision_score(y, called, **options))
    else:
        assert np.isnan(ours["precision"])
    if w[~called].sum():
        assert ours["npv"] == pytest.approx(sk.precision_score(1 - y, ~called, **options))
    else:
        assert np.isnan(ours["npv"])
    if w[called].sum() and w[~called].sum():
        assert ours["mcc"] == pytest.approx(sk.matthews_corrcoef(y, called, **options), abs=1e-9)
    else:
        assert np.isnan(ours["mcc"])
    assert ours["f1"] == pytest.approx(sk.f1_score(y, called, zero_division=0, **options))
    assert ours["brier"] == pytest.approx(sk.brier_score_loss(y, p, **options))
    cut = np.clip(p, 1e-7, 1 - 1e-7)
    assert ours["log_loss"] == pytest.approx(sk.log_loss(y, np.c_[1 - cut, cut], labels=[0, 1], **options))


@given(scored())
@settings(max_examples=50, deadline=None)
def test_a_weight_is_the_slice_repeated(case):
    y, p, w = case
    repeated = metrics.metric_values(np.repeat(y, w), np.repeat(p, w), 0.4)
    weighted = metrics.metric_values(y, p, 0.4, w)
    for name in metrics.METRICS:
        np.testing.assert_allclose(weighted[name], repeated[name])


@given(scored())
@settings(max_examples=50, deadline=None)
def test_auc_is_mirrored_by_reversed_scores(case):
    y, p, w = case
    assert metrics.weighted_auc(y, -p, w)[0] == pytest.approx(1 - metrics.weighted_auc(y, p, w)[0])
    assert metrics.weighted_auc(1 - y, p, w)[0] == pytest.approx(1 - metrics.weighted_auc(y, p, w)[0])


@pytest.mark.parametrize("k, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_gives_newcombes_table(k, n, low, high):
    "R. Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998) 857, table I, method 3"
    assert metrics.wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    assert metrics.wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_metrics_give_what_scikit_learns_documentation_prints():
    got = {k: v[0] for k, v in metrics.metric_values([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.5).items()}
    assert (round(got["auc"], 2), round(got["average_precision"], 2)) == (0.75, 0.83)
    assert metrics.metric_values([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.3], 0.5)["brier"][0] == pytest.approx(0.0375)
    assert metrics.metric_values([1, 1, 1, 0], [1, 0, 1, 1], 0.5)["mcc"][0] == pytest.approx(-0.33, abs=0.005)


@given(st.lists(st.integers(1, 6), min_size=3, max_size=12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_effective_size_is_that_of_single_slices_and_never_more_than_n(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    right = np.random.default_rng(seed).random(len(groups)) < 0.6
    assert metrics.effective_size(right, np.arange(len(groups))) == len(groups)
    size = metrics.effective_size(right, groups)
    assert 0 < size <= len(groups)
    if not 0 < right.mean() < 1:
        assert size == len(sizes)


def test_copies_of_slices_do_not_narrow_a_share():
    y, p = np.arange(60) % 2, np.random.default_rng(3).random(60)
    once = metrics.summarise(y, p, np.arange(60), 0.5, 20, 0)["accuracy"]
    copied = metrics.summarise(np.repeat(y, 5), np.repeat(p, 5), np.repeat(np.arange(60), 5), 0.5, 20, 0)["accuracy"]
    assert copied["value"] == once["value"] and copied["high"] - copied["low"] == pytest.approx(once["high"] - once["low"], rel=0.05)
    assert "300 slices in 60 groups, worth" in copied["interval"]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=12), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_groups_are_drawn_whole_and_within_their_class(sizes, seed, mixed):
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    y = np.repeat(np.arange(len(sizes)) % 2, sizes)
    if mixed:
        y[0] = 1 - y[0]
    weights = metrics.group_weights(groups, 30, seed, y)
    assert weights.shape == (30, len(y)) and weights.dtype == np.int32
    first = {g: np.flatnonzero(groups == g)[0] for g in np.unique(groups)}
    for g, at in first.items():
        assert (weights[:, groups == g] == weights[:, [at]]).all()
    by_group = weights[:, list(first.values())]
    assert (by_group.sum(1) == len(sizes)).all()
    if not mixed:
        kind = y[list(first.values())]
        for c in (0, 1):
            assert (by_group[:, kind == c].sum(1) == (kind == c).sum()).all()
    assert (weights == metrics.group_weights(groups, 30, seed, y)).all()


def test_two_thousand_draws_of_four_hundred_rows_take_under_a_second():
    y = np.arange(400) % 2
    start = time.perf_counter()
    metrics.group_weights(np.arange(400), 2000, 0, y)
    assert time.perf_counter() - start < 1


def test_two_thousand_draws_of_two_thousand_slices_take_under_five_seconds():
    rng = np.random.default_rng(0)
    y = np.arange(2000) % 2
    start = time.perf_counter()
    metrics.summarise(y, rng.random(2000), np.arange(2000) // 4, 0.5, 2000, 0)
    assert time.perf_counter() - start < 5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        y, groups = np.repeat(np.arange(60) % 2, 5), np.repeat(np.arange(60), 5)
        scores = 1.2 * y + np.repeat(rng.normal(0, 0.8, 60), 5) + rng.normal(0, 0.6, 300)
        auc = metrics.summarise(y, 1 / (1 + np.exp(-scores)), groups, 0.5, 300, trial)["auc"]
        covered += auc["low"] <= 0.8019 <= auc["high"]  # Phi(1.2 / sqrt(2 * (0.64 + 0.36)))
    assert 0.88 <= covered / 200 <= 0.99


def test_a_share_of_clustered_slices_is_covered_where_the_bootstrap_is_too_narrow():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        right, groups = rng.random((12, 5)) < rng.beta(1.8, 0.2, (12, 1)), np.repeat(np.arange(12), 5)
        share = metrics.summarise(np.ones(60, int), right.ravel().astype(float), groups, 0.5, 0, 0)["sensitivity"]
        covered += share["low"] <= 0.9 <= share["high"]
    assert covered / 300 >= 0.92


def test_a_constant_prediction_has_a_chance_auc_and_says_so():
    got = metrics.summarise([0, 0, 1, 1], [0.5] * 4, list("aabb"), 0.5, 50, 0)
    assert [got[m]["value"] for m in ("auc", "sensitivity", "specificity")] == [0.5, 1, 0]
    assert "every draw gives this value" in got["auc"]["why"]
    low = metrics.summarise([0, 1], [0.1, 0.1], list("ab"), 0.5, 50, 0)
    assert low["precision"]["why"] == "no slice was called positive"


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_gives_null_with_the_reason(label):
    got = metrics.summarise([label] * 3, [0.2, 0.6, 0.9], list("abc"), 0.5, 50, 0)
    assert got["auc"]["value"] is None and got["auc"]["why"] == "one class has no slices"
    assert got["balanced_accuracy"]["value"] is None and got["accuracy"]["value"] is not None
    assert all(got[name]["value"] is not None or got[name]["why"] for name in metrics.METRICS)


def test_wilson_where_the_bootstrap_says_nothing():
    y, p = np.repeat([0, 1], 10), np.repeat([0.1, 0.9], 10)
    many = metrics.summarise(y, p, np.arange(20) // 5, 0.5, 50, 0)["accuracy"]
    assert many["value"] == 1 and (many["low"], many["high"]) == metrics.wilson(4, 4)
    single = metrics.summarise(y, p, np.arange(20), 0.5, 50, 0)["accuracy"]
    assert (single["low"], single["high"]) == metrics.wilson(20, 20)


@pytest.mark.parametrize("p, groups, part", [
    ([0.1, np.nan, 0.3], list("abc"), "1 of 3 probabilities are not numbers"),
    ([0.1, 0.2], list("abc"), "one length"),
    ([0.1, 0.2, 0.3], ["a", None, "b"], "no group"),
    ([0.1, 0.2, 0.3], ["a", "b"], "3 slices have 2 groups"),
])
def test_bad_input_is_a_sentence(p, groups, part):
    with pytest.raises(StudyError, match=part):
        metrics.summarise([0, 1, 1], p, groups, 0.5, 10, 0)


@given(scored(), st.floats(0.05, 20))
@settings(max_examples=60, deadline=None)
def test_calibration_keeps_rows_and_ranks(case, temperature):
    _, p, _ = case
    table = np.c_[1 - p, p]
    got = metrics.calibrate(table, temperature)
    np.testing.assert_allclose(got.sum(1), 1)
    order = np.argsort(p, kind="stable")
    assert (np.diff(got[order, 1]) >= -1e-12).all()
    np.testing.assert_allclose(metrics.calibrate(table, 1), table, atol=2e-7)


@given(st.floats(0.3, 5), st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_the_temperature_that_was_applied_is_found(temperature, seed):
    rng = np.random.default_rng(seed)
    truth = 1 / (1 + np.exp(-rng.normal(0, 1.5, 4000)))
    y = (rng.random(4000) < truth).astype(int)
    given_p = metrics.calibrate(np.c_[1 - truth, truth], 1 / temperature)
    assert metrics.fit_temperature(given_p, y) == pytest.approx(temperature, rel=0.15)


@given(scored(), st.floats(0.05, 1))
@settings(max_examples=100, deadline=None)
def test_the_operating_point_is_the_highest_that_reaches_the_sensitivity(case, wanted):
    y, p, _ = case
    threshold = metrics.operating_point(y, p, wanted)
    assert (p[y == 1] >= threshold).mean() >= wanted - 1e-9
    higher = p[p > threshold]
    if len(higher):
        assert (p[y == 1] >= higher.min()).mean() < wanted


def test_the_temperature_without_an_error_stays_near_one_and_a_hopeless_one_ends_at_the_bound():
    sure = np.c_[np.full(49, 0.01), np.full(49, 0.99)]
    assert 0.5 < metrics.fit_temperature(sure, [1] * 49) < 1
    assert metrics.fit_temperature(np.full((40, 2), 0.5), [0, 1] * 20) == pytest.approx(1)
    assert metrics.fit_temperature(sure, [0] * 49) == pytest.approx(metrics.TEMPERATURES[1], rel=0.01)


def test_repeats():
    got = metrics.repeated(np.linspace(0.9, 1, 21))
    assert got["value"] == pytest.approx(0.95) and got["low"] == pytest.approx(0.9025)
    assert "share slices" in got["interval"]
    assert metrics.repeated([np.nan, 0.5])["why"].startswith("undefined in 1 of 2")
    pooled = metrics.pool_repeats(pd.DataFrame({"image_id": list("aab"), "p_x": [0, 1, 0.3], "label": list("xxy")}))
    assert pooled.p_x.tolist() == [0.5, 0.3] and pooled.label.tolist() == ["x", "y"]
