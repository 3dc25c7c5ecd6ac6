"""Drift that is there is found, and drift that is not there is not."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from conftest import SIZE
from prometheus_client.parser import text_string_to_metric_families
from scipy.ndimage import gaussian_filter
from scipy.stats import ks_2samp

from deeptumornet.commands import main
from deeptumornet.dicom import window
from deeptumornet.log import PREDICTIONS, REQUEST, PredictionLog, connect
from deeptumornet.metrics import wilson
from deeptumornet.monitoring import (
    alarms,
    decide,
    drift_table,
    image_statistics,
    in_words,
    monitor,
    one_of_each,
    performance,
    stability,
    statistics_table,
)
from deeptumornet.preprocessing import prepare
from deeptumornet.serving import create_app
from deeptumornet.study import StudyError, read_json, write_csv, write_json


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
    pool = np.round(common + rng.normal(size=(150, 3)), 1)
    found = alarms(lambda rng: pool[rng.permutation(150)], 60, (0.05, 0.2), windows=500, permutations=99, seed=1)
    assert (found["n"] == 500).all() and (found["low"] <= found["alpha"]).all() and (found["alpha"] <= found["high"]).all(), found
    assert (found[["window", "reference"]] == (60, 90)).all(axis=None)
    window = np.arange(150)[:, None] >= 90
    shifted = alarms(lambda rng: rng.normal(size=(150, 3)) + window, 60, (0.05,), windows=50, permutations=99, seed=1)
    assert shifted["rate"][0] > 0.9, "the window is what stands under its reference"


def test_one_of_each_prefers_no_place():
    rows = pd.DataFrame({"group": ["a", "a", "b", "a", "b"], "image_id": ["5", "1", "9", "3", "7"]}, index=[4, 5, 6, 7, 8])
    assert one_of_each(rows, "group").index.tolist() == [5, 8]


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


def test_a_rate_that_makes_no_test_stops_nothing():
    for expected in (None, 0.1, 0.0):
        found = performance([True, False], expected)
        assert found["evidence"] is None and not found["fallen"] and "not tested" in in_words(found)
    perfect = performance([True] * 30, 1.0)
    assert perfect["evidence"] == 1 and not perfect["fallen"] and performance([False] * 400, 1.0)["fallen"], "no number overflows"
    assert "no fall is shown (evidence 1 of 20)" in in_words(perfect)


@pytest.fixture
def watch(tmp_path):
    """A champion's card with its reference, 100 slices, and how to log some: `record(slices, probability)`, ids."""
    card, rng = {"version": "c0ffee00", "classes": ["normal", "adenocarcinoma"], "positive": "adenocarcinoma", "threshold": {"value": 0.3},
                 "metrics": {"accuracy": {"value": 0.85}}}, np.random.default_rng(0)
    slices = rng.integers(0, 255, (130, 8, 8)).astype(np.uint8)
    reference = statistics_table(slices[:30], rng.random(30) / 10, rng.random((30, 4))).assign(version=card["version"])
    for folder in ("champion", "references"):
        (tmp_path / folder).mkdir()
    write_json(tmp_path / "champion" / "card.json", card)
    write_csv(tmp_path / "references" / f"{card['version']}.csv", reference)
    log = PredictionLog(tmp_path / "log.sqlite", pause=60)

    def record(images, probability=None, request=""):
        REQUEST.set(request)
        ids = []
        for image in images:
            p = rng.random() / 10 if probability is None else probability
            ids.append(log.record(card["version"], image.tobytes().hex()[:60], {"adenocarcinoma": p, "normal": 1 - p},
                                  image_statistics(image), rng.random(4)))
        log.flush()
        return ids

    def look():
        reference = tmp_path / "references" / f"{card['version']}.csv"
        return monitor(tmp_path / "champion", reference, log.address, tmp_path / "out", 0.05)
    yield SimpleNamespace(folder=tmp_path, card=card, log=log, slices=slices[30:], record=record, look=look)
    REQUEST.set("")
    log.close()


def test_monitor_reads_the_log_and_writes_report_and_gauges(watch):
    for one in watch.record(watch.slices[:30], 0.9)[:20]:
        watch.log.feedback(one, "normal", "A", watch.card["classes"])
    said = watch.look()
    assert said["retrain"] and "probability rose" in said["why"]
    assert "of 20 verified slices 0.00 [0.00, 0.16] were right" in said["why"] and "the accuracy fell" in said["why"]
    text = (watch.folder / "out" / "drift.prom").read_text()
    found = {(s.name, s.labels.get("quantity") or s.labels.get("end")): s.value
             for family in text_string_to_metric_families(text) for s in family.samples}
    assert found["deeptumornet_drift_alarm", None] == 1 and found["deeptumornet_accuracy", None] == 0
    assert found["deeptumornet_accuracy_bound", "high"] == pytest.approx(wilson(0, 20)[1], rel=1e-4)
    assert found["deeptumornet_accuracy_evidence", None] > 20 and found["deeptumornet_verified_slices", None] == 20
    assert found["deeptumornet_drift_p", "probability"] < 0.05 < found["deeptumornet_drift_p", "dark"]
    assert found["deeptumornet_drift_stability_index", "probability"] > 1
    page = (watch.folder / "out" / "drift.html").read_text()
    assert "probability" in page and "evidence" in page and not re.search(r"(src|href)=.?https?:", page)
    with pytest.raises(StudyError, match="is missing: run `dvc repro`"):
        monitor(watch.folder, watch.folder / "reference.csv", watch.log.address, watch.folder / "out", 0.05)


def test_performance_is_told_also_where_it_did_not_fall(watch):
    ids = watch.record(watch.slices[:60])
    assert "no prediction of this model was verified" in watch.look()["why"]
    assert "accuracy{" not in (watch.folder / "out" / "drift.prom").read_text()
    for one in ids[:10]:
        watch.log.feedback(one, "normal", "A", watch.card["classes"])
    said = watch.look()
    assert not said["retrain"] and "of 10 verified slices 1.00 [0.72, 1.00] were right" in said["why"] and "no fall is shown" in said["why"]
    assert 'accuracy_fallen{version="' in (watch.folder / "out" / "drift.prom").read_text()
    assert "no fall is shown" in (watch.folder / "out" / "drift.html").read_text()


def test_repeats_and_slices_of_one_request_count_once(watch):
    for _ in range(5):
        watch.record(watch.slices[:24])
    watch.record(watch.slices[24:84], 0.9, "a series of sixty slices")
    said = watch.look()
    assert said["n"] == 25 and not said["retrain"], "144 rows more would have given alarm"
    ids = watch.record(watch.slices[84:], 0.9, "another series")
    for one in ids:
        watch.log.feedback(one, "normal", "A", watch.card["classes"])
    assert watch.look()["performance"]["n"] == 1
    watch.record(255 - watch.slices)
    assert watch.look()["n"] == 30, "no more than the reference"


def test_all_labels_count_in_the_order_in_which_they_came(watch):
    """A fall that was found stays found, though the newest rows look well, and a later correction changes a label and not its place."""
    ids = watch.record(watch.slices)
    for one in [*ids[80:], *ids[:80]]:
        watch.log.feedback(one, "adenocarcinoma" if one in ids[80:] else "normal", "A", watch.card["classes"])
    seen = watch.look()["performance"]
    assert seen["n"] == 100 and seen["fallen"] and seen["accuracy"] == 0.8
    for one in ids[80:]:
        watch.log.feedback(one, "normal", "B", watch.card["classes"])
    seen = watch.look()["performance"]
    assert seen["n"] == 100 and not seen["fallen"] and seen["accuracy"] == 1


def test_the_reference_of_another_model_is_refused(watch):
    watch.record(watch.slices[:30])
    path = watch.folder / "references" / f"{watch.card['version']}.csv"
    write_csv(path, pd.read_csv(path).assign(version="another"))
    with pytest.raises(StudyError, match="holds what the model another says, and the champion is"):
        watch.look()


def test_the_command_opens_and_closes_a_candidate(watch, monkeypatch, capsys):
    monkeypatch.setenv("DEEPTUMORNET_CHAMPION", str(watch.folder / "champion"))
    words = ["monitor", "--log", str(watch.folder / "log.sqlite"), "--to", str(watch.folder / "out")]
    candidate = watch.folder / "out" / "candidate.json"
    assert main(words) == 1 and "too few to tell drift" in capsys.readouterr().err and not candidate.exists()
    watch.record(watch.slices[:25], 0.9)
    assert main(words) == 3 and capsys.readouterr().out.startswith("retrain: ")
    first = read_json(candidate)
    assert first["champion"] == watch.card["version"] and "probability rose" in first["why"] and first["data"]["slices"] == 25
    assert main(words) == 3 and read_json(candidate)["opened"] == first["opened"], "it is open since it was first asked for"
    with connect(watch.log.address) as database:
        database.execute(sa.delete(PREDICTIONS))
    watch.record(watch.slices[25:85])
    assert main(words) == 0 and capsys.readouterr().out.splitlines()[-1].startswith("keep: ") and not candidate.exists()


def test_the_service_tells_the_gauges(champion, watch, monkeypatch):
    client = create_app(champion).test_client()
    monkeypatch.setenv("DEEPTUMORNET_DRIFT", str(watch.folder / "out" / "drift.prom"))
    assert client.get("/metrics").status_code == 200
    watch.record(watch.slices[:25], 0.9)
    watch.look()
    found = {s.name: s.value for family in text_string_to_metric_families(client.get("/metrics").text) for s in family.samples}
    assert found["deeptumornet_drift_alarm"] == 1 and found["deeptumornet_requests_total"] == 1


def test_what_is_no_window():
    with pytest.raises(StudyError, match="the current window has 19 slices, too few to tell drift: wait for 20"):
        drift_table(table(0), table(1, n=19))
    with pytest.raises(StudyError, match="no number in column 'std'"):
        drift_table(table(0), table(1).drop(columns="std"))
    with pytest.raises(StudyError, match="no number in column 'mean'"):
        drift_table(table(0), table(1).assign(mean=np.nan))
    assert not drift_table(table(0), table(1, n=19), least=19)["drifted"].any()
