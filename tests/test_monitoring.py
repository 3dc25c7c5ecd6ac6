"""Drift that is there is found, drift that is not there is not, and the prediction log keeps what monitoring needs and no more."""

import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import click
import numpy as np
import pandas as pd
import pytest
from conftest import SIZE, encoded
from scipy.ndimage import gaussian_filter

from deeptumornet.dicom import window
from deeptumornet.export import Engine
from deeptumornet.monitoring import decide, drift_table, image_statistics, read_log, statistics_table
from deeptumornet.preprocessing import prepare, read_slice
from deeptumornet.serving import create_app, open_log, record
from deeptumornet.study import StudyError

PREDICT = "/api/v1/predict"


def table(seed: int, n: int = 60, **shifts: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({c: rng.normal(size=n) + shifts.get(c, 0) for c in ("mean", "std", "sharpness")})


def rows(path) -> list[tuple]:
    with closing(sqlite3.connect(path)) as log:
        return log.execute("SELECT * FROM predictions").fetchall()


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


def test_the_service_logs_what_monitoring_reads(champion, phantoms, tmp_path, monkeypatch):
    path = tmp_path / "log.sqlite"
    monkeypatch.setenv("DEEPTUMORNET_PREDICTION_LOG", str(path))
    client, engine = create_app(champion).test_client(), Engine(champion)
    bodies = [encoded(window(hu)) for hu in phantoms]
    said = [client.post(PREDICT, data=body).json for body in bodies]
    assert client.post(PREDICT, data=b"a note").status_code == 415
    assert client.post(PREDICT, data=encoded(np.zeros((99, 99), np.uint8))).status_code == 422
    read = read_log(path, engine.card["version"], "adenocarcinoma")
    prepared = np.stack([engine.prepare(window(hu))[0] for hu in phantoms])
    pd.testing.assert_frame_equal(read, statistics_table(prepared, [answer["probability"] for answer in said]))
    assert [row[2] for row in rows(path)] == [read_slice(body, "a.png").image_id for body in bodies]
    assert read_log(path, "another", "adenocarcinoma").empty
    assert path.stat().st_size < 40_000, "no pixels"


def test_no_log_unless_asked(champion, slice_png, tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPTUMORNET_PREDICTION_LOG", raising=False)
    monkeypatch.setattr("deeptumornet.serving.record", lambda *_: 1 / 0)
    app = create_app(champion)
    assert app.config["PREDICTION_LOG"] is None
    assert app.test_client().post(PREDICT, data=slice_png).status_code == 200


def test_the_log_holds_nothing_of_a_patient(champion, phantoms, tmp_path):
    from deeptumornet.dicom import write_dicom

    app = create_app(champion)
    open_log(tmp_path / "log.sqlite")
    app.config["PREDICTION_LOG"] = tmp_path / "log.sqlite"
    write_dicom(tmp_path / "a.dcm", phantoms[1], "Doe^Jane", 0.0, 1.4, "series")
    data = {"file": ((tmp_path / "a.dcm").open("rb"), "Doe Jane.dcm")}
    assert app.test_client().post(PREDICT, data=data).status_code == 200
    assert len(rows(tmp_path / "log.sqlite")) == 1
    assert b"Doe" not in (tmp_path / "log.sqlite").read_bytes()


def test_many_threads_lose_no_row(champion, slice_png, tmp_path):
    app = create_app(champion)
    open_log(tmp_path / "log.sqlite")
    app.config["PREDICTION_LOG"] = tmp_path / "log.sqlite"
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: app.test_client().post(PREDICT, data=slice_png).status_code, range(24)))
    assert set(codes) == {200} and len(rows(tmp_path / "log.sqlite")) == 24


def test_the_log_is_append_only(tmp_path):
    path = tmp_path / "log.sqlite"
    open_log(path)
    record(path, "v", "i", {"a": 1.0}, np.zeros((4, 4), np.uint8))
    with closing(sqlite3.connect(path)) as log:
        for statement in ("DELETE FROM predictions", "UPDATE predictions SET version = 'w'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                log.execute(statement)
    assert [row[1:4] for row in rows(path)] == [("v", "i", '{"a": 1.0}')]


def test_a_log_that_cannot_be_written(champion, slice_png, tmp_path, monkeypatch, caplog):
    app = create_app(champion)
    app.config["PREDICTION_LOG"] = tmp_path / "none" / "log.sqlite"
    assert app.test_client().post(PREDICT, data=slice_png).status_code == 200, "the answer is not lost"
    assert "a prediction is missing from the log" in caplog.text
    monkeypatch.setenv("DEEPTUMORNET_PREDICTION_LOG", os.fspath(tmp_path / "none" / "log.sqlite"))
    with pytest.raises(click.ClickException, match="cannot be written .* DEEPTUMORNET_PREDICTION_LOG"):
        create_app(champion)


def test_a_log_that_is_none(tmp_path):
    with pytest.raises(StudyError, match="there is no prediction log"):
        read_log(tmp_path / "a.sqlite", "v", "a")
    (tmp_path / "a.sqlite").write_bytes(b"a note that is long enough to be no database" * 50)
    with pytest.raises(StudyError, match="is no prediction log"):
        read_log(tmp_path / "a.sqlite", "v", "a")
