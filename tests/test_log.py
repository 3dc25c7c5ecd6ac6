"""What was answered is in the prediction log, once, whatever happens to the service or the database; and nothing of a patient is."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pandas as pd
import pytest
import sqlalchemy as sa
from conftest import encoded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deeptumornet import log as log_module
from deeptumornet.dicom import window, write_dicom
from deeptumornet.export import Engine
from deeptumornet.log import _SERVERS, FEEDBACK, PREDICTIONS, ROW_BYTES, LogError, PredictionLog, connect, image_statistics, read_log
from deeptumornet.monitoring import WATCHED, watched
from deeptumornet.serving import create_app
from deeptumornet.study import StudyError

PREDICT, FEED, TOKEN = "/api/v1/predict", "/api/v1/feedback", "a-token-for-tests"
FLAT = image_statistics(np.zeros((8, 8), np.uint8))
TWO = {"normal": 0.25, "adenocarcinoma": 0.75}


@pytest.fixture(params=["sqlite", "postgres"])
def address(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'log.sqlite'}"
    url = request.getfixturevalue("postgres")
    with connect(url) as database:
        for table in (FEEDBACK, PREDICTIONS):
            database.execute(sa.delete(table))
    return url


def test_rows_and_corrections(address, tmp_path):
    log = PredictionLog(address, tmp_path / "spool")
    ids = [log.record("v", "i" * 64, TWO, FLAT, features=np.array([0.5, 1.25])) for _ in range(5)]
    log.feedback(ids[0], "normal", "A", list(TWO))
    log.feedback(ids[0], "adenocarcinoma", "B", list(TWO))
    log.close()
    table = read_log(address, "v", "adenocarcinoma").set_index("id")
    assert set(table.index) == set(ids) and (table["probability"] == 0.75).all()
    assert table.loc[ids[0], "decided_label"] == "adenocarcinoma" and table.loc[ids[1:], "decided_label"].isna().all()
    assert read_log(address, "another", "adenocarcinoma").empty
    with connect(address) as database:
        said = database.execute(sa.select(FEEDBACK).order_by(FEEDBACK.c.number)).all()
        assert [(r.who, r.label) for r in said] == [("A", "normal"), ("B", "adenocarcinoma")]
        assert database.execute(sa.select(PREDICTIONS.c.features)).scalars().all() == [[0.5, 1.25]] * 5
    assert log.keep(days=1, rows=2) == 3 and log.keep(days=0, rows=9) == 2
    with connect(address) as database:
        assert not database.execute(sa.select(FEEDBACK)).all(), "feedback goes with its prediction"


def test_processes_that_begin_at_the_same_moment_share_the_tables(address):
    def opened(_) -> int:
        with connect(address) as database:
            return database.scalar(sa.select(sa.func.count()).select_from(FEEDBACK))
    engine = sa.create_engine(address, poolclass=sa.NullPool)
    for _ in range(10):
        FEEDBACK.metadata.drop_all(engine)
        _SERVERS.clear()  # threads stand for processes here, which know of no tables yet
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(opened, range(8))) == [0] * 8


def test_a_row_that_is_sent_twice_is_there_once(address, tmp_path):
    log = PredictionLog(address, tmp_path / "spool", pause=60)
    log.record("v", "i", TWO, FLAT)
    copy = next((tmp_path / "spool").glob("*.open")).read_bytes()
    assert log.flush() == 1
    (tmp_path / "spool" / "0-killed-between-commit-and-removal.ready").write_bytes(copy + b'{"id": "to')
    assert log.flush() == 0 and len(read_log(address, "v", "normal")) == 1
    log.close()


def test_kill_minus_nine_of_the_service_loses_no_answer(champion, slice_png, address, tmp_path):
    serve = ("import sys; from deeptumornet.serving import create_app\n"
             "client = create_app(sys.argv[1]).test_client(); png = open(sys.argv[2], 'rb').read()\n"
             "while True: print(client.post('/api/v1/predict', data=png).json['id'], flush=True)")
    (tmp_path / "a.png").write_bytes(slice_png)
    process = subprocess.Popen([sys.executable, "-c", serve, str(champion), str(tmp_path / "a.png")], stdout=subprocess.PIPE, text=True,
                               cwd=tmp_path, env={**os.environ, "DEEPTUMORNET_PREDICTION_LOG": address})
    told = [process.stdout.readline().strip() for _ in range(60)]
    process.kill()
    told += [line for line in process.stdout.read().split("\n") if len(line) == 32]
    process.wait()
    spool = tmp_path / ("log.sqlite.spool" if address.startswith("sqlite") else "predictions.spool")
    PredictionLog(address, spool).close()
    kept = read_log(address, Engine(champion).card["version"], "normal")["id"]
    assert len(told) >= 60 and set(told) <= set(kept) and kept.is_unique and len(kept) <= len(told) + 1


def test_the_service_logs_what_monitoring_reads(champion, phantoms, tmp_path, monkeypatch):
    path = tmp_path / "log.sqlite"
    monkeypatch.setenv("DEEPTUMORNET_PREDICTION_LOG", str(path))
    app = create_app(champion)
    client, engine = app.test_client(), Engine(champion)
    said = [client.post(PREDICT, data=encoded(window(hu))).json for hu in phantoms]
    assert client.post(PREDICT, data=b"a note").status_code == 415
    assert client.post(PREDICT, data=encoded(np.zeros((99, 99), np.uint8))).status_code == 422
    app.config["PREDICTION_LOG"].close()
    read = read_log(path, engine.card["version"], "adenocarcinoma").set_index("id").loc[[answer["id"] for answer in said]]
    prepared = np.stack([engine.prepare(window(hu))[0] for hu in phantoms])
    assert np.allclose(read["probability"], [answer["probability"] for answer in said], atol=1e-6)
    pd.testing.assert_frame_equal(read[list(WATCHED)].reset_index(drop=True), watched(engine, prepared), rtol=1e-3)


def test_feedback_needs_the_token_a_known_prediction_and_a_class(champion, slice_png, tmp_path, monkeypatch):
    app = create_app(champion)
    client, good = app.test_client(), {"Authorization": f"Bearer {TOKEN}"}
    assert client.post(FEED, json={}).status_code == 401 and client.post(FEED, json={}, headers=good).status_code == 404
    monkeypatch.setenv("DEEPTUMORNET_FEEDBACK_TOKEN", TOKEN)
    app.config["PREDICTION_LOG"] = log = PredictionLog(tmp_path / "log.sqlite")
    word = {"id": client.post(PREDICT, data=slice_png).json["id"], "label": "normal", "who": "reader A"}
    refused = client.post(FEED, json=word, headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401 and "Bearer" in refused.headers["WWW-Authenticate"]
    assert client.post(FEED, json=word).status_code == 401
    assert client.post(FEED, data=b"{", headers=good).status_code == 400
    for wrong in ({"label": "benign"}, {"id": "0" * 32}, {"who": " "}):
        answer = client.post(FEED, json=word | wrong, headers=good)
        assert answer.status_code == 422 and answer.content_type == "application/problem+json"
    assert client.post(FEED, json=word, headers=good).status_code == 201
    log.close()
    assert read_log(tmp_path / "log.sqlite", Engine(champion).card["version"], "normal")["decided_label"].tolist() == ["normal"]


def test_no_log_unless_asked(champion, slice_png, monkeypatch):
    monkeypatch.delenv("DEEPTUMORNET_PREDICTION_LOG", raising=False)
    app = create_app(champion)
    assert app.config["PREDICTION_LOG"] is None
    assert "id" not in app.test_client().post(PREDICT, data=slice_png).json


def test_the_log_holds_no_pixel_and_nothing_of_a_patient(champion, phantoms, tmp_path):
    app = create_app(champion)
    app.config["PREDICTION_LOG"] = log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    write_dicom(tmp_path / "a.dcm", phantoms[1], "Doe^Jane", 0.0, 1.4, "series")
    data = {"file": ((tmp_path / "a.dcm").open("rb"), "Doe Jane.dcm")}
    assert app.test_client().post(PREDICT, data=data).status_code == 200
    spooled = next((tmp_path / "log.sqlite.spool").glob("*.open")).read_bytes()
    log.close()
    assert b"Doe" not in spooled + (tmp_path / "log.sqlite").read_bytes() and len(spooled) < 1000


def test_many_threads_lose_no_row(champion, slice_png, tmp_path):
    app = create_app(champion)
    app.config["PREDICTION_LOG"] = log = PredictionLog(tmp_path / "log.sqlite", pause=0.01)
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda _: app.test_client().post(PREDICT, data=slice_png).json["id"], range(48)))
    log.close()
    assert sorted(read_log(tmp_path / "log.sqlite", Engine(champion).card["version"], "normal")["id"]) == sorted(told)


def test_a_locked_database_delays_rows_and_no_answer(champion, slice_png, address, tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "PATIENCE", 2)
    monkeypatch.setenv("DEEPTUMORNET_FEEDBACK_TOKEN", TOKEN)
    app = create_app(champion)
    client = app.test_client()
    app.config["PREDICTION_LOG"] = log = PredictionLog(address, tmp_path / "spool", pause=60)
    with sa.create_engine(address, poolclass=sa.NullPool).connect() as other:
        other.exec_driver_sql("BEGIN EXCLUSIVE" if address.startswith("sqlite") else "LOCK TABLE predictions IN ACCESS EXCLUSIVE MODE")
        start = time.perf_counter()
        told = client.post(PREDICT, data=slice_png).json["id"]
        assert time.perf_counter() - start < 2
        said = client.post(FEED, json={"id": told, "label": "normal", "who": "A"}, headers={"Authorization": f"Bearer {TOKEN}"})
        assert said.headers["Retry-After"] == "2"
        assert said.status_code == 503 and re.search("cannot be written or read .*lock", said.json["detail"])
        assert time.perf_counter() - start < 20
    log.close()
    assert read_log(address, Engine(champion).card["version"], "normal")["id"].tolist() == [told]


def test_a_database_of_a_server_that_is_gone_and_comes_back(postgres, tmp_path):
    with sa.create_engine(postgres, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool).connect() as server:
        server.exec_driver_sql("CREATE DATABASE passing")
        address = postgres.replace("/postgres", "/passing")
        log = PredictionLog(address, tmp_path / "spool", pause=60)
        server.exec_driver_sql("DROP DATABASE passing")
        told = log.record("v", "i", TWO, FLAT)
        with pytest.raises(StudyError, match="cannot be written or read .*does not exist"):
            log.flush()
        server.exec_driver_sql("CREATE DATABASE passing")
        log.close()
        assert read_log(address, "v", "normal")["id"].tolist() == [told]
        server.exec_driver_sql("DROP DATABASE passing")


def test_a_full_database_keeps_rows_waiting(tmp_path):
    log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    def no_room(raw, _): raw.execute("PRAGMA max_page_count = 1")  # no more pages than there are  # noqa: E704
    sa.event.listen(sa.Engine, "connect", no_room)
    try:
        told = [log.record("v", "i", TWO, FLAT) for _ in range(100)]
        with pytest.raises(StudyError, match="cannot be written or read .* is full.*has room"):
            log.flush()
    finally:
        sa.event.remove(sa.Engine, "connect", no_room)
    log.close()
    assert set(read_log(tmp_path / "log.sqlite", "v", "normal")["id"]) == set(told)


def test_a_database_that_is_gone_or_a_full_spool_keeps_rows_waiting(tmp_path, monkeypatch, caplog):
    (tmp_path / "db").mkdir()
    log = PredictionLog(tmp_path / "db" / "log.sqlite", tmp_path / "spool", pause=60)
    shutil.rmtree(tmp_path / "db")
    told = log.record("v", "i", TWO, FLAT)
    with pytest.raises(StudyError, match="cannot be written or read"):
        log.flush()
    (tmp_path / "db").mkdir()
    log.close()
    assert read_log(tmp_path / "db" / "log.sqlite", "v", "normal")["id"].tolist() == [told]
    monkeypatch.setattr(log_module, "LARGEST_SPOOL", 10)
    with pytest.raises(LogError, match="cannot be logged, and none is given without"):
        log.record("v", "i", TWO, FLAT)
    assert "an answer was refused" in caplog.text, "a bound that is reached is said, not silent"


def test_a_log_that_cannot_be_opened(champion, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_PREDICTION_LOG", os.fspath(tmp_path / "none" / "log.sqlite"))
    with pytest.raises(click.ClickException, match="cannot be written or read"):
        create_app(champion)
    with pytest.raises(StudyError, match="there is no prediction log"):
        read_log(tmp_path / "a.sqlite", "v", "a")
    (tmp_path / "a.sqlite").write_bytes(b"a note that is long enough to be no database" * 50)
    with pytest.raises(StudyError, match="cannot be written or read .*not a database"):
        read_log(tmp_path / "a.sqlite", "v", "a")


def test_the_oldest_rows_go_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_LOG_ROWS", "3")
    log = PredictionLog(tmp_path / "log.sqlite", pause=0.01, tidy=0)
    ids = [log.record("v", "i", TWO, FLAT) for _ in range(5)]
    deadline = time.monotonic() + 30
    while len(read_log(tmp_path / "log.sqlite", "v", "normal")) != 3 or log.flush():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    log.close()
    assert read_log(tmp_path / "log.sqlite", "v", "normal")["id"].tolist() == ids[2:]
    for wrong in ("many", "0", "inf", "nan"):
        monkeypatch.setenv("DEEPTUMORNET_LOG_DAYS", wrong)
        with pytest.raises(StudyError, match=f"DEEPTUMORNET_LOG_DAYS is '{wrong}', and no number of at least 1"):
            PredictionLog(tmp_path / "log.sqlite")


def test_a_row_is_as_small_as_said_and_gives_its_room_back(address, tmp_path):
    rows = [{"id": f"{k:032x}", "time": log_module.now(), "clock": float(k), "version": "v" * 64, "image_id": f"{k:064x}",
             "request": f"{k:032x}", "probabilities": {"normal": 1 / 3, "adenocarcinoma": 2 / 3}, "features": [1 / 3] * 4,
             **{name: 1 / 3 for name in FLAT}}
            for k in range(5000)]
    with connect(address) as database:
        database.execute(sa.insert(PREDICTIONS), rows)
    file = tmp_path / "log.sqlite"
    with connect(address) as database:
        size = file.stat().st_size if file.exists() else database.exec_driver_sql("SELECT pg_total_relation_size('predictions')").scalar()
    assert 300 * 5000 < size < ROW_BYTES * 5000
    assert PredictionLog(address, tmp_path / "spool", pause=60).keep(days=365, rows=50) == 4950
    assert not file.exists() or file.stat().st_size < size / 10


def test_a_wrong_password_is_a_sentence_without_it(postgres, tmp_path):
    with pytest.raises(StudyError, match="cannot be written or read") as error:
        PredictionLog(postgres.replace("loopback", "wrong-secret"), tmp_path / "spool")
    assert "wrong-secret" not in str(error.value)


DAYS = 100
START = datetime(2026, 1, 1, tzinfo=UTC)
steps = st.tuples(st.floats(0, 60), st.one_of(st.just(0.0), st.floats(-3000, 3000)), st.booleans())


@settings(max_examples=30, deadline=None)
@given(st.lists(steps, min_size=1, max_size=12))
@example([(1, 0, False)] * 4 + [(0.01, -2000, False)] * 2 + [(1, 0, False)] * 2)  # reset to 2020 for a while
@example([(30, 0, False)] * 10 + [(1, 200, False)] * 2)  # 200 days ahead of 300 days of history
@example([(1, 2000, False)] * 3 + [(30, 0, False)] * 5)  # a clock that was ahead and is right again
@example([(20, 0, True)] * 9 + [(1, -30, True)] * 2)
def test_no_clock_makes_a_row_older_than_it_is(history):
    """Each step: days that pass, by how many the clock is wrong then, and whether the service starts again. One row is entered in each."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        passed, wrong, entered = 0.0, 0.0, []
        patch.setattr(log_module, "time", SimpleNamespace(monotonic=lambda: 86400 * passed))
        patch.setattr(log_module, "now", lambda: (START + timedelta(days=passed + wrong)).isoformat(timespec="milliseconds"))
        log = PredictionLog(address := Path(folder) / "log.sqlite", pause=60)
        for days, shift, restart in history:
            passed, wrong = passed + days, shift
            if restart:
                log.close()
                log = PredictionLog(address, pause=60)
            entered.append((log.record("v", "i", TWO, FLAT), passed))
            log.flush()
            log.keep(DAYS, 1000)
            left = read_log(address, "v", "normal")["id"].tolist()
            gone = entered[:len(entered) - len(left)]
            assert [one for one, _ in entered[len(gone):]] == left, "only the rows that were entered first go"
            assert all(passed - when > DAYS - 1e-6 for _, when in gone), "and none before its time"
        if not any(restart for *_, restart in history):
            assert all(passed - when <= DAYS + 1e-6 for one, when in entered if one in left), "while the service runs, all go in time"
        log.close()


def test_a_disk_that_fills_in_the_middle_of_a_row_keeps_no_part_of_it(tmp_path):
    """On a real limit of the file's size: the kernel writes what fits, as a full disk does."""
    script = ("import resource, signal, sys; from deeptumornet.log import LogError, PredictionLog\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); log = PredictionLog(sys.argv[1], sys.argv[2], pause=60)\n"
              "def row(): print(log.record('v', 'i', {'a': 1.0}, dict.fromkeys(('mean', 'std', 'sharpness', 'dark'), 0.0)))\n"
              "row(); size = log._waiting\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, resource.RLIM_INFINITY))\n"
              "try: row()\n"
              "except LogError as error: print(error, file=sys.stderr)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)); row(); log.close()")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "log.sqlite"), str(tmp_path / "spool")],
                          capture_output=True, text=True, check=True)
    assert "cannot be logged, and none is given without (No space left on device)" in done.stderr and "torn" not in done.stderr
    assert read_log(tmp_path / "log.sqlite", "v", "a")["id"].tolist() == done.stdout.split()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_answers_nothing_that_it_cannot_log(champion, slice_png, small_disk):
    app = create_app(champion)
    client = app.test_client()
    app.config["PREDICTION_LOG"] = log = PredictionLog(small_disk / "log.sqlite", pause=60)
    told = [client.post(PREDICT, data=slice_png).json["id"]]
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    answers = [client.post(PREDICT, data=slice_png) for _ in range(20)]
    told += [answer.json["id"] for answer in answers if answer.status_code == 200]
    assert {one.status_code for one in answers} <= {200, 503} and answers[-1].status_code == 503, "what the last page takes is answered"
    assert "cannot be logged, and none is given without (No space left on device)" in answers[-1].json["detail"]
    assert client.post("/api/v1/batch", data={"file": [(BytesIO(slice_png), "a.png")]}).json["items"][0]["status"] == 503
    with pytest.raises(LogError, match="has room"):
        log.flush()
    (small_disk / "filler").unlink()
    told.append(client.post(PREDICT, data=slice_png).json["id"])
    log.close()
    assert read_log(log.address, Engine(champion).card["version"], "normal")["id"].tolist() == told


def test_a_job_waits_until_the_log_takes_its_answers(champion, slice_png, tmp_path, monkeypatch):
    monkeypatch.setattr("deeptumornet.jobs.LEASE", 0.0)
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    app = create_app(champion)
    app.config["PREDICTION_LOG"] = log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    client = app.test_client()
    with monkeypatch.context() as full:
        full.setattr(log_module, "LARGEST_SPOOL", 10)
        job = client.post("/api/v1/jobs", data={"file": [(BytesIO(slice_png), f"{k}.png") for k in range(2)]}).json["id"]
        time.sleep(1)
        assert client.get(f"/api/v1/jobs/{job}").json["state"] != "done"
    deadline = time.monotonic() + 30
    while client.get(f"/api/v1/jobs/{job}").json["state"] != "done":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    log.close()
    rows = read_log(log.address, Engine(champion).card["version"], "normal")
    told = [item["prediction"]["id"] for item in client.get(f"/api/v1/jobs/{job}/result").json["items"]]
    assert rows["id"].tolist() == told and rows["request"].nunique() == 1 and job not in rows["request"].tolist()


def test_what_is_asked_together_is_known_by_its_request(champion, slice_png, tmp_path):
    app = create_app(champion)
    app.config["PREDICTION_LOG"] = log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    client = app.test_client()
    for _ in range(2):
        client.post("/api/v1/batch", data={"file": [(BytesIO(slice_png), f"{k}.png") for k in range(3)]})
    client.post(PREDICT, data=slice_png)
    log.close()
    assert read_log(log.address, Engine(champion).card["version"], "normal").groupby("request", sort=False).size().tolist() == [3, 3, 1]


def test_a_segment_belongs_to_who_has_it_open_in_any_container(tmp_path):
    """The other process has a number that nobody here has, as in another container; then it is killed."""
    script = ("import sys, time; from deeptumornet.log import PredictionLog; log = PredictionLog(sys.argv[1], pause=60)\n"
              "row = dict.fromkeys(('mean', 'std', 'sharpness', 'dark'), 0.0)\n"
              "for k in range(3): print(log.record('v', 'i', {'a': 1.0}, row), flush=True)\n"
              "time.sleep(600)")
    apart = ["unshare", "--pid", "--fork", "--kill-child"] if os.geteuid() == 0 and shutil.which("unshare") else []
    other = subprocess.Popen([*apart, sys.executable, "-c", script, str(tmp_path / "log.sqlite")], stdout=subprocess.PIPE, text=True)
    told = [other.stdout.readline().strip() for _ in range(3)]
    log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    assert all(told) and log.flush() == 0 and log._waiting > 0
    other.kill()
    other.wait()
    deadline = time.monotonic() + 10
    while not log.flush():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert log._waiting == 0
    log.close()
    assert read_log(tmp_path / "log.sqlite", "v", "a")["id"].tolist() == told


def test_what_another_process_moved_waits_no_longer(tmp_path):
    one, two = (PredictionLog(tmp_path / "log.sqlite", pause=60) for _ in range(2))
    one.record("v", "i", TWO, FLAT)
    two.flush()
    assert two._waiting > 0
    one.close()
    two.close()
    assert two._waiting == 0


def test_logging_costs_at_most_two_percent_of_an_answer(champion, slice_png, tmp_path):
    """Of the prediction of a tiny network, which is faster than any that is served. The median of the log's own time is compared, for
    the difference of two whole answers is drowned in their scatter."""
    client = create_app(champion).test_client()
    def seconds(run): start = time.perf_counter(); run(); return time.perf_counter() - start  # noqa: E702
    log = PredictionLog(tmp_path / "log.sqlite", pause=60)
    answer = np.median([seconds(lambda: client.post(PREDICT, data=slice_png)) for _ in range(30)])
    row = np.median([seconds(lambda: log.record("v", "i" * 64, TWO, FLAT, np.ones(4))) for _ in range(200)])
    log.close()
    print(f"answer {1000 * answer:.2f} ms, log {1000 * row:.3f} ms")
    assert row <= 0.02 * answer, (row, answer)
