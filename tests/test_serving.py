"""The service as a client meets it: answers, errors, headers, and nothing told that should not be."""

import ast
import base64
import inspect
import json
import logging
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import click
import keras
import numpy as np
import pydicom
import pytest
import tritonclient.http
from conftest import encoded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.serving import make_server

from deeptumornet.comparison import predict_model
from deeptumornet.dicom import window, write_dicom
from deeptumornet.explanation import grad_cam
from deeptumornet.export import ENGINES, Engine, principal_axes
from deeptumornet.jobs import Jobs
from deeptumornet.log import PredictionLog, add_feedback, image_statistics
from deeptumornet.lungs import see
from deeptumornet.metrics import calibrate
from deeptumornet.preprocessing import read_slice
from deeptumornet.serving import ATTEMPTS, HEADERS, LARGEST_BODY, MOST_ITEMS, Gate, cautions, create_app
from deeptumornet.study import sha256
from deeptumornet.training import load_model

PREDICT = "/api/v1/predict"
INFER = "/v2/models/deeptumornet/infer"
MALFORMED = int(os.environ.get("MALFORMED", 10_000))
ROOT = Path(__file__).resolve().parents[1]
LEAKS = (str(ROOT), str(Path.home()), tempfile.gettempdir(), "site-packages", "Traceback", 'File "', ".py")


@pytest.fixture(scope="module")
def app(champion):
    return create_app(champion)


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture(scope="module")
def dicom(phantoms, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("dicom") / "a.dcm"
    write_dicom(path, phantoms[1], "Doe^Jane", 0.0, 1.4, "series")
    return path.read_bytes()


def problem(response, status: int) -> str:
    """The detail of a problem document with this status."""
    assert response.status_code == status, response.text
    assert response.content_type == "application/problem+json"
    content = json.loads(response.data)
    assert set(content) == {"type", "title", "status", "detail"} and content["status"] == status
    assert not any(leak in response.text for leak in LEAKS), response.text
    return content["detail"]


def opened(url: str) -> Image.Image:
    head, body = url.split(",")
    assert head == "data:image/png;base64"
    return Image.open(BytesIO(base64.b64decode(body)))


def test_answer_is_the_engines(client, champion, slice_png):
    said = client.post(PREDICT, data=slice_png).json
    engine = Engine(champion)
    p, *_ = engine.predict(engine.prepare(read_slice(slice_png, "a.png").pixels)[0][None])
    assert said["probability"] == said["probabilities"]["adenocarcinoma"] == p[0, 1]
    assert list(said["probabilities"]) == ["normal", "adenocarcinoma"]
    assert said["class"] == max(said["probabilities"], key=said["probabilities"].get)
    assert said["threshold"] == 0.3 and said["decision"] == ("positive" if p[0, 1] >= 0.3 else "negative")
    assert said["model"] == {**{k: engine.card[k] for k in ("name", "version", "network", "precision")},
                             "sha256": sha256(champion / engine.card["engine"])}
    assert "phantoms" in said["warnings"][0] and "heat_map" not in said and "picture" not in said


def test_keras_says_the_same(client, champion, phantoms):
    from deeptumornet.metrics import calibrate
    from deeptumornet.training import load_model

    model, engine = load_model(champion / "model.keras"), Engine(champion)
    for hu in phantoms:
        prepared = engine.prepare(window(hu))[0][None, ..., None].astype("float32")
        expected = calibrate(np.asarray(model(prepared, training=False)), engine.card["temperature"])[0, 1]
        assert abs(client.post(PREDICT, data=encoded(window(hu))).json["probability"] - expected) < 1e-4


def test_every_way_to_send_the_same_slice(client, slice_png, dicom):
    bodies = [slice_png, dicom, encoded(np.dstack([np.asarray(Image.open(BytesIO(slice_png)))] * 3))]
    answers = [client.post(PREDICT, data=body) for body in bodies]
    answers += [client.post(PREDICT, data={"file": (BytesIO(body), "Doe Jane.exe")}) for body in bodies]
    answers.append(client.post(PREDICT, data=slice_png, content_type="application/x-www-form-urlencoded"))
    assert len({answer.json["probability"] for answer in answers}) == 1
    assert "colour" in client.post(PREDICT, data=bodies[2]).json["warnings"][-1]


def test_of_many_at_once_each_is_told_its_own(app, phantoms, slice_png):
    bodies = [*(encoded(window(hu)) for hu in phantoms), slice_png[:3000], encoded(np.zeros((40, 400), np.uint8))] * 4
    def told(body):
        said = app.test_client().post(PREDICT, data=body).json
        return said.get("detail") or said["warnings"], said.get("probability", 0.0)
    with ThreadPoolExecutor(12) as pool:
        notes, probabilities = zip(*pool.map(told, bodies), strict=True)
    expected, alone = zip(*map(told, bodies), strict=True)
    assert notes == expected and len(set(probabilities[:6])) == 5
    np.testing.assert_allclose(probabilities, alone, atol=1e-5)


def test_jpeg_is_read_with_a_warning(client, phantoms):
    said = client.post(PREDICT, data=encoded(window(phantoms[0]), "JPEG"))
    assert said.status_code == 200 and any("JPEG" in w for w in said.json["warnings"])


@pytest.mark.parametrize("scale", [1, 5])
def test_heat_map_lies_over_the_lungs(client, phantoms, scale):
    pixels = np.kron(window(phantoms[1]), np.ones((scale, scale), np.uint8))
    pixels = np.pad(pixels, ((0, 60 * scale), (0, 0)))
    said = client.post(f"{PREDICT}?heat_map=true", data=encoded(pixels)).json
    picture, heat = opened(said["picture"]), opened(said["heat_map"])
    assert picture.mode == "L" and heat.mode == "RGBA" and picture.size == heat.size
    assert max(picture.size) == min(512, max(pixels.shape))
    if scale == 1:
        assert (np.asarray(picture) == pixels).all()
    _, (top, left, side) = see(pixels, 80, "lungs")
    ratio = picture.size[1] / pixels.shape[0]
    rows, columns = np.nonzero(np.asarray(heat)[..., 3])
    assert len(rows), "something is warm"
    assert rows.min() >= top * ratio - 2 and rows.max() <= (top + side) * ratio + 2
    assert columns.min() >= left * ratio - 2 and columns.max() <= (left + side) * ratio + 2


def test_what_is_refused(client, slice_png, dicom):
    cut = "damaged or cut short"
    assert "no file" in problem(client.post(PREDICT), 400)
    assert "no file" in problem(client.post(PREDICT, data={"other": (BytesIO(slice_png), "a.png")}), 400)
    torn = client.post(PREDICT, data=slice_png, content_type="multipart/form-data; boundary=x")
    assert "no file" in problem(torn, 400)
    assert "true or false" in problem(client.post(f"{PREDICT}?heat_map=1", data=slice_png), 400)
    assert "32 MiB" in problem(client.post(PREDICT, data=bytes(LARGEST_BODY + 1)), 413)
    assert "32 MiB" in problem(client.post(PREDICT, data={"file": (BytesIO(bytes(LARGEST_BODY + 1)), "a.png")}), 413)
    undeclared = {"input_stream": BytesIO(bytes(LARGEST_BODY + 1)), "headers": {"Transfer-Encoding": "chunked"}}
    assert "32 MiB" in problem(client.post(PREDICT, **undeclared, environ_overrides={"wsgi.input_terminated": True}), 413)
    for body in (b"a note", b"GIF89a" + bytes(90), b"%PDF-1.7", b"\x00"):
        assert "not a PNG, JPEG or DICOM" in problem(client.post(PREDICT, data=body), 415)
    assert cut in problem(client.post(PREDICT, data=slice_png[:len(slice_png) // 2]), 422)
    assert "1×1" in problem(client.post(PREDICT, data=encoded(np.zeros((1, 1), np.uint8))), 422)
    assert "no lung field" in problem(client.post(PREDICT, data=encoded(np.full((99, 99), 200, np.uint8))), 422)
    assert "shape" in problem(client.post(PREDICT, data=encoded(np.zeros((32, 20000), np.uint8))), 422)
    assert "as a square" in problem(client.post(PREDICT, data=encoded(np.zeros((3400, 13500), np.uint8))), 422)
    assert "14000×1 pixels" in client.post(INFER, json=tensor("slices", "UINT8", [1, 1, 14000], [0] * 14000)).json["detail"]
    assert "cannot be read as DICOM" in problem(client.post(PREDICT, data=dicom[:4000]), 422)
    assert problem(client.get("/nothing"), 404) and problem(client.get("/page/../serving.py"), 404)
    response = client.get(PREDICT)
    assert problem(response, 405) and "POST" in response.headers["Allow"]


def test_a_small_file_that_asks_for_gigabytes(client, dicom):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    small = encoded(np.zeros((64, 64), np.uint8), "JPEG")
    frame = small.index(b"\xff\xc0") + 5
    for side in (9000, 60000):
        head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
        body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body
        data = pydicom.dcmread(BytesIO(dicom))
        data.Rows = data.Columns = side
        data.save_as(whole := BytesIO())
        deflated = pydicom.dcmread(BytesIO(dicom))
        deflated.Rows, deflated.Columns, deflated.PixelData = side, side, bytes(2 * 4096**2)
        deflated.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
        deflated.save_as(packed_ := BytesIO())
        assert len(packed_.getvalue()) < 100_000
        jpeg = small[:frame] + side.to_bytes(2, "big") * 2 + small[frame + 4:]
        for what in (bomb, jpeg, whole.getvalue(), packed_.getvalue()):
            assert problem(client.post(PREDICT, data=what), 422)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "no picture was made of them, in KB"


def test_a_defect_tells_nothing(champion, slice_png, monkeypatch, caplog):
    app = create_app(champion)
    monkeypatch.setattr("deeptumornet.serving.answer", lambda *_: 1 / 0)
    with caplog.at_level(logging.DEBUG):
        detail = problem(app.test_client().post(PREDICT, data=slice_png), 500)
    assert "division" not in detail and "ZeroDivisionError" in caplog.text and "division by zero" not in caplog.text


def test_headers_on_everything(client, slice_png):
    answers = [client.get(path) for path in ("/", "/page/app.js", "/nothing")]
    for response in (*answers, client.post(PREDICT, data=slice_png), client.post(PREDICT)):
        assert {k: response.headers[k] for k in HEADERS} == HEADERS
        response.close()
    assert "default-src 'self'; img-src 'self' data: blob:" in HEADERS["Content-Security-Policy"]


def test_health_and_card(client, champion):
    assert client.get("/v2/health/live").json == {"live": True}
    assert client.get("/v2/health/ready").json == {"ready": True}
    card = client.get("/api/v1/model").json
    full = json.loads((champion / "card.json").read_text())
    assert card.pop("feedback") is False
    assert card == {k: full[k] for k in card} and {"metrics", "baseline", "threshold", "intended_use"} <= set(card)
    assert not {"files", "engine"} & set(card)


def test_nothing_of_a_patient_is_told(client, dicom, phantoms, caplog, capfd, recwarn):
    data = pydicom.dcmread(BytesIO(dicom))
    data.PatientName, data.PatientID, data.PatientBirthDate = "Secret^Person", "SECRET-ID", "19010203"
    data.add_new(0x00104000, "LT", "SECRET COMMENT")
    whole = BytesIO()
    data.save_as(whole)
    wrong = BytesIO()
    data.Modality = "CT"
    data.NumberOfFrames = 7
    data.save_as(wrong)
    truncated = whole.getvalue()[:3000]
    with caplog.at_level(logging.DEBUG):
        for body in (whole.getvalue(), wrong.getvalue(), truncated, whole.getvalue().replace(b"19010203", b"SECRET!!")):
            text = client.post(f"{PREDICT}?heat_map=true", data={"file": (BytesIO(body), "SECRET.dcm")}).text
            assert "secret" not in text.lower() and "1901" not in text[:600]
    said = caplog.text + "".join(capfd.readouterr()) + "".join(str(w.message) for w in recwarn)
    assert "secret" not in said.lower()


def test_no_upload_touches_the_disk(client, phantoms, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a temporary file")
    for name in ("TemporaryFile", "SpooledTemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, never)
    monkeypatch.setattr("werkzeug.formparser.SpooledTemporaryFile", never)
    monkeypatch.setattr("werkzeug.formparser.TemporaryFile", never, raising=False)
    problem(client.post(PREDICT, data={"file": (BytesIO(bytes(2_000_000)), "a.png")}), 415)
    noise = np.random.default_rng(0).integers(0, 2, (phantoms[0].shape[0] * 6,) * 2).astype(np.uint8)
    body = encoded(np.kron(window(phantoms[0]), np.ones((6, 6), np.uint8)) // 2 + noise)
    assert len(body) > 500_000, "so large that werkzeug would spool it"
    assert client.post(PREDICT, data={"file": (BytesIO(body), "a.png")}).status_code == 200


def test_threads_agree_with_one(app, phantoms):
    bodies = [encoded(window(hu)) for hu in phantoms] * 6
    def ask(body):
        return app.test_client().post(f"{PREDICT}?heat_map=true", data=body).json
    alone = [ask(body) for body in bodies[:4]] * 6
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, bodies)) == alone


def mutate(source: bytes, edits: list[tuple[int, int]], end: int) -> bytes:
    body = bytearray(source)
    for place, value in edits:
        body[(place if place % 3 else place % 1200) % len(body)] = value
    return bytes(body[:end % len(body)] if end % 2 else body)


def test_no_body_makes_a_500(app, phantoms, tmp_path):
    client, small = app.test_client(), phantoms[1][::3, ::3]
    write_dicom(tmp_path / "a.dcm", small, "Doe^Jane", 0.0, 1.4, "series")
    dicom = (tmp_path / "a.dcm").read_bytes()
    sources = [encoded(window(small)), encoded(window(small), "JPEG"), dicom]
    protocol = tensor("files", "BYTES", [1], [base64.b64encode(sources[0]).decode()])
    sources += [packed({"a.png": sources[0], "b.dcm": dicom[:9000]}), json.dumps(protocol).encode()]
    edits = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=12)
    bodies = st.one_of(st.binary(max_size=300), st.builds(mutate, st.sampled_from(sources), edits, st.integers(0, 2**20)),
                       st.builds(lambda source, rest: source[:140] + rest, st.sampled_from(sources), st.binary(max_size=300)))

    @settings(max_examples=MALFORMED, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies, st.booleans(), st.sampled_from([PREDICT, PREDICT, "/api/v1/batch", "/api/v1/series", INFER]))
    def holds(body, multipart, path):
        data = {"file": (BytesIO(body), "a.png")} if multipart else body
        response = client.post(path, data=data, headers={"Inference-Header-Content-Length": str(len(body) // 2)})
        assert response.status_code in (200, 400, 415, 422), response.text
        assert b'"status":500' not in response.data and not any(leak in response.text for leak in LEAKS), response.text
        if response.status_code == 200 and path == PREDICT:
            assert 0 <= response.json["probability"] <= 1
    holds()


def test_serves_without_tensorflow(champion, slice_png, tmp_path):
    (tmp_path / "a.png").write_bytes(slice_png)
    code = ("import sys\nfrom deeptumornet.serving import create_app\n"
            "client = create_app().test_client()\n"
            f"assert client.post('{PREDICT}?heat_map=true', data=open('a.png', 'rb').read()).status_code == 200\n"
            "print([m for m in ('tensorflow', 'keras', 'mlflow') if m in sys.modules])")
    env = {**os.environ, "DEEPTUMORNET_CHAMPION": str(champion), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_missing_or_changed_champion_is_a_sentence(champion, tmp_path):
    with pytest.raises(click.ClickException, match="run `make study` first"):
        create_app(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPTUMORNET_CHAMPION": ""}
    (tmp_path / "params.yaml").write_text("")
    words = [sys.executable, "-m", "flask", "--app", "deeptumornet.serving", "run", "--port", "0"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "run `make study` first" in done.stderr


def packed(files: dict[str, bytes]) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tensor(name: str, datatype: str, shape: list, data: list) -> dict:
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]}


def test_the_same_number_by_every_path(champion, phantoms, dicom, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    client = create_app(champion).test_client()
    pixels, engine = window(phantoms[1]), Engine(champion)
    png = encoded(pixels)
    prepared = engine.prepare(read_slice(png, "a.png").pixels)[0][None]
    Image.fromarray(prepared[0]).save(tmp_path / "a.png")  # as 02_preprocessing keeps it, and 08_comparison asks about it
    keras = calibrate(predict_model(champion / "model.keras", tmp_path, ["a"], engine.card["classes"]), engine.card["temperature"])[0, 1]
    form = client.post("/api/v1/batch", data={"file": [(BytesIO(png), "a"), (BytesIO(dicom), "b")]}).json["items"]
    archive = client.post("/api/v1/batch", data=packed({"a.png": png, "d/": b"", "b.dcm": dicom})).json["items"]
    series = client.post("/api/v1/series", data=packed({"b.dcm": dicom})).json
    job = client.post("/api/v1/batch", data=packed({"a.png": png, "b.dcm": dicom}), headers={"Prefer": "respond-async"})
    finished(client, job.json["id"])
    job = client.get(f"{job.headers['Location']}/result").json["items"]
    header = json.dumps({"inputs": [{"name": "slices", "datatype": "UINT8", "shape": [1, *pixels.shape],
                                     "parameters": {"binary_data_size": pixels.size}}]}).encode()
    files = json.dumps({"inputs": [{"name": "files", "datatype": "BYTES", "shape": [1],
                                    "parameters": {"binary_data_size": len(png) + 4}}]}).encode()
    binary = struct.pack("<I", len(png)) + png
    protocol = [client.post(INFER, json=tensor("slices", "UINT8", [1, *pixels.shape], pixels.ravel().tolist())),
                client.post(INFER, json=tensor("files", "BYTES", [2], [base64.b64encode(b).decode() for b in (png, dicom)])),
                client.post(INFER, data=header + pixels.tobytes(), headers={"Inference-Header-Content-Length": str(len(header))}),
                client.post(INFER, data=files + binary, headers={"Inference-Header-Content-Length": str(len(files))})]
    told = [engine.predict(prepared)[0][0, 1], keras, client.post(PREDICT, data=png).json["probability"],
            *[item["prediction"]["probability"] for item in (*form, *archive, *job, *series["slices"])], series["series"]["mean"],
            *[p for answer in protocol for p in answer.json["outputs"][0]["data"][1::2]]]
    assert len(told) == 3 + 2 + 2 + 2 + 1 + 1 + 5 and max(told) - min(told) < 1e-4


def test_one_bad_item_fails_no_other(client, slice_png):
    bad = {"empty.png": b"", "../climbs.png": slice_png, "/root.png": slice_png, "note.txt": b"a note", "torn.png": slice_png[:2000],
           "nested.zip": packed({"a.png": slice_png}), "bomb.png": bytes(LARGEST_BODY + 1)}
    said = client.post("/api/v1/batch", data=packed({"good.png": slice_png, **bad, "last.png": slice_png}))
    assert said.status_code == 200 and "climbs.png" not in said.text
    assert [item["status"] for item in said.json["items"]] == [200, 415, 422, 422, 415, 422, 415, 422, 200]
    assert [item["item"] for item in said.json["items"]] == list(range(9))
    assert len(packed(bad)) < 200_000, "a small archive that asks for much"
    assert "damaged" in problem(client.post("/api/v1/batch", data=packed({"a": slice_png})[:-30]), 422)
    assert "send 1 to" in problem(client.post("/api/v1/batch", data=packed({})), 422)
    assert "--jobs FILE" in problem(client.post("/api/v1/batch", data=packed({str(k): b"" for k in range(MOST_ITEMS + 1)})), 422)


def test_a_series_is_put_in_order(client, phantoms, tmp_path):
    for place, position in enumerate((7.5, -2.5, 2.5)):
        write_dicom(tmp_path / f"{place}.dcm", phantoms[place], "Doe^Jane", position, 1.4, "one")
    write_dicom(tmp_path / "other.dcm", phantoms[0], "Doe^Jane", 0.0, 1.4, "two")
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("[0-9].dcm"))}
    said = client.post("/api/v1/series", data=packed(files)).json
    assert [s["position_mm"] for s in said["slices"]] == [-2.5, 2.5, 7.5] and [s["item"] for s in said["slices"]] == [1, 2, 0]
    p = [s["prediction"]["probability"] for s in said["slices"]]
    assert said["series"]["mean"] == pytest.approx(np.mean(p)) and said["series"]["highest"]["probability"] == max(p)
    assert said["series"]["positive_slices"] == sum(v >= 0.3 for v in p) and "Doe" not in json.dumps(said)
    mixed = packed({**files, "other.dcm": (tmp_path / "other.dcm").read_bytes()})
    assert "more than one series" in problem(client.post("/api/v1/series", data=mixed), 422)
    assert "no DICOM file" in problem(client.post("/api/v1/series", data=encoded(window(phantoms[0]))), 422)


def test_the_protocol_says_what_is_wrong(client, slice_png):
    good = tensor("files", "BYTES", [1], [base64.b64encode(slice_png).decode()])
    tensors = [("files", "BYTES", [2], good["inputs"][0]["data"]), ("slices", "FP32", [1, 2, 2], [0] * 4), ("else", "BYTES", [1], [""]),
               ("slices", "UINT8", [1, 2, 2], [256] * 4), ("slices", "UINT8", [1, -2, 2], [0] * 4)]
    for wrong in ([], {}, {"inputs": []}, *[tensor(*words) for words in tensors]):
        response = client.post(INFER, json=wrong)
        assert response.status_code == 400 and response.json["error"] == response.json["detail"], wrong
    assert client.post(INFER, json={**good, "id": "seven"}).json["id"] == "seven"
    assert client.get("/v2/models/deeptumornet").json["inputs"][0] == {"name": "slices", "datatype": "UINT8", "shape": [-1, -1, -1]}
    assert client.get("/v2/models/deeptumornet/ready").status_code == 200 and client.get("/v2").json["name"] == "deeptumornet"


def test_tokens_rate_and_too_much_at_once(champion, slice_png, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_TOKENS", "first second")
    monkeypatch.setenv("DEEPTUMORNET_RATE", "4")
    monkeypatch.setattr("deeptumornet.serving.time.time", lambda: 90.0)
    client = create_app(champion).test_client()
    for words in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer f\u00efrst"}):
        refused = client.post(PREDICT, data=slice_png, headers=words)
        assert "token" in problem(refused, 401) and refused.headers["WWW-Authenticate"].lower().startswith("bearer")
    assert client.get("/").status_code == client.get("/v2/health/ready").status_code == 200
    good = [client.post(PREDICT, data=slice_png, headers={"Authorization": "Bearer second"}) for _ in range(5)]
    assert [r.status_code for r in good] == [200] * 4 + [429] and good[-1].headers["Retry-After"] == "30"

    monkeypatch.delenv("DEEPTUMORNET_TOKENS")
    monkeypatch.delenv("DEEPTUMORNET_RATE")
    monkeypatch.setattr("deeptumornet.serving.MOST_AT_ONCE", 0)
    busy = create_app(champion).test_client().post(PREDICT, data=slice_png)
    assert "in hand" in problem(busy, 503) and busy.headers["Retry-After"] == "1"


def test_metrics_count(champion, slice_png):
    client = create_app(champion).test_client()
    for body in (slice_png, slice_png, b"a note"):
        client.post(PREDICT, data=body)
    client.get("/not/there")
    found = {(s.name, s.labels.get("address"), s.labels.get("status")): s.value
             for family in text_string_to_metric_families(client.get("/metrics").text) for s in family.samples}
    assert found["deeptumornet_requests_total", PREDICT, "200"] == 2 and found["deeptumornet_requests_total", PREDICT, "415"] == 1
    assert found["deeptumornet_requests_total", "none", "404"] == 1 and found["deeptumornet_seconds_count", PREDICT, None] == 3


def test_marks_and_strange_slices_are_warned_of(champion, slice_png, phantoms):
    app = create_app(champion)
    assert not any("marked" in w or "outside" in w for w in app.test_client().post(PREDICT, data=slice_png).json["warnings"])
    from deeptumornet.serving import seen
    engine, found = Engine(champion), read_slice(slice_png, "a.png")
    prepared = engine.prepare(found.pixels)[0]
    noise = np.random.default_rng(0)
    usual = np.stack([np.clip(prepared + noise.integers(-2, 3, prepared.shape), 0, 255).astype(np.uint8) for _ in range(24)])
    card = {**engine.card, "seen": seen(usual), "quality": {"colour": {"limit": 0.0002}, "text": {"limit": 3}}}
    assert seen(usual[:19]) == {} and not any("outside" in w for w in cautions(card, found, image_statistics(usual[0])))
    assert any("outside of what the model was measured on" in w for w in cautions(card, found, image_statistics(255 - prepared)))
    arrow = np.dstack([found.pixels] * 3)
    arrow[100:120, 100:120] = (255, 0, 0)
    assert any("coloured marks" in w for w in cautions(card, read_slice(encoded(arrow), "a.png"), image_statistics(prepared)))


@pytest.mark.parametrize(("sources", "expected"), [(["phantom"], True), (["feedback", "phantom"], True), (["folder"], False)])
def test_phantoms_are_told_by_the_data_and_not_by_the_profile(champion, slice_png, sources, expected):
    card, found = {**Engine(champion).card, "sources": sources}, read_slice(slice_png, "a.png")
    said = cautions(card, found, image_statistics(found.pixels))
    assert any("drawn phantoms" in sentence for sentence in said) is expected and card["profile"] == "smoke"


@pytest.mark.parametrize("precision", ENGINES)
def test_each_engine_is_keras(champion, phantoms, precision):
    model, engine = load_model(champion / "model.keras"), Engine(champion, precision=precision)
    slices = np.stack([engine.prepare(window(hu))[0] for hu in phantoms])
    probabilities, heat, features = engine.predict(slices)
    close = {"float32": 1e-5, "float32_openvino": 1e-5, "float16": 1e-2, "int8": 0.1}[precision]
    truth = calibrate(model(slices[..., None].astype("float32"), training=False).numpy(), engine.card["temperature"])
    np.testing.assert_allclose(probabilities, truth, atol=close)
    np.testing.assert_allclose(heat, grad_cam(model, slices, 1), atol=5 * close)
    pooled = keras.Model(model.input, model.get_layer("features").output)
    reference = np.load(champion / "reference.npz")["slices"]
    axes = principal_axes(pooled(reference[..., None].astype("float32")).numpy())
    expected = pooled(slices[..., None].astype("float32")).numpy() @ axes
    np.testing.assert_allclose(features, expected, atol=5 * close * np.abs(expected).max())
    assert np.ptp(expected[:, 0]) > 0


@pytest.mark.parametrize("token", ["", "a-token"])
def test_schemathesis_finds_nothing(champion, tmp_path, monkeypatch, token):
    for name, value in {"JOBS": str(tmp_path / "jobs.sqlite"), "TOKENS": token, "FEEDBACK_TOKEN": token,
                        "PREDICTION_LOG": f"{tmp_path / 'log.sqlite'}" if token else ""}.items():
        monkeypatch.setenv(f"DEEPTUMORNET_{name}", value)
    server = make_server("127.0.0.1", 0, create_app(champion), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [Path(sys.executable).with_name("schemathesis"), "--config-file", ROOT / "tests" / "schemathesis.toml", "run", "--no-color",
             "--max-examples", "25", "--generation-deterministic", *(["-H", f"Authorization: Bearer {token}"] if token else [])]
    done = subprocess.run([*words, f"http://127.0.0.1:{server.port}/openapi.json"], cwd=tmp_path, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0 and re.search(r"(\d+) generated, \1 passed", done.stdout), done.stdout


def test_a_client_of_the_protocol(app, client, phantoms, slice_png):
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{server.port}") as triton:
        assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("deeptumornet")
        assert triton.get_model_metadata("deeptumornet")["outputs"][0]["shape"] == [-1, 2]
        pixels, expected = np.stack([window(phantoms[1])] * 2), client.post(PREDICT, data=slice_png).json["probability"]
        for name, values, datatype in (("slices", pixels, "UINT8"), ("files", np.array([slice_png] * 2, object), "BYTES")):
            for binary in (True, False)[:1 if datatype == "BYTES" else 2]:
                given_ = tritonclient.http.InferInput(name, list(values.shape), datatype)
                given_.set_data_from_numpy(values, binary_data=binary)
                said = triton.infer("deeptumornet", [given_]).as_numpy("probabilities")
                assert said.shape == (2, 2) and np.abs(said[:, 1] - expected).max() < 1e-6
        wrong = tritonclient.http.InferInput("slices", [1, 2, 2], "UINT8").set_data_from_numpy(np.zeros((1, 2, 2), np.uint8))
        with pytest.raises(tritonclient.utils.InferenceServerException, match="2×2 pixels|no lung field|shape"):
            triton.infer("deeptumornet", [wrong])
    server.shutdown()


def finished(client, job: str) -> dict:
    for _ in range(600):
        progress = client.get(f"/api/v1/jobs/{job}").json
        if progress["state"] == "done":
            return progress
        time.sleep(0.05)
    raise AssertionError(progress)


def test_a_job_outlives_the_process_that_took_it(champion, slice_png, tmp_path, monkeypatch):
    monkeypatch.setattr("deeptumornet.jobs.LEASE", 1.0)
    before = Jobs(tmp_path / "jobs.sqlite")
    job = before.submit([slice_png, b"a note"])
    assert before.take()[:2] == (job, 0)  # and dies with it
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    client = create_app(champion).test_client()
    assert "not done" in problem(client.get(f"/api/v1/jobs/{job}/result"), 409)
    assert finished(client, job) == {"id": job, "state": "done", "done": 2, "slices": 2}
    expected = client.post(PREDICT, data=slice_png).json
    first, second = client.get(f"/api/v1/jobs/{job}/result").json["items"]
    assert first == {"item": 0, "status": 200, "prediction": expected} and (second["item"], second["status"]) == (1, 415)


def test_a_job_is_accepted_answered_and_cancelled(champion, slice_png, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    client = create_app(champion).test_client()
    sent = client.post("/api/v1/jobs", data=packed({"a.png": slice_png, "../b.png": slice_png}))
    assert sent.status_code == 202 and sent.headers["Location"] == f"/api/v1/jobs/{sent.json['id']}" and sent.json["slices"] == 2
    finished(client, sent.json["id"])
    assert [i["status"] for i in client.get(f"{sent.headers['Location']}/result").json["items"]] == [200, 422]
    assert slice_png[:500] not in (tmp_path / "jobs.sqlite").read_bytes(), "a slice goes with its answer"
    assert (tmp_path / "jobs.sqlite").stat().st_mode & 0o77 == 0
    long = client.post("/api/v1/jobs", data=packed({str(k): slice_png for k in range(400)})).headers["Location"]
    assert client.delete(long).status_code == 204
    for response in (client.get(long), client.delete(long), client.get("/api/v1/jobs/none/result")):
        problem(response, 404)


def test_jobs_are_off_unless_asked_for(client, slice_png):
    assert "--jobs FILE" in problem(client.post("/api/v1/jobs", data=slice_png), 404)


def archive(data: bytes, size: int, entries: int) -> bytes:
    """A zip of so many entries, each `data`, and each said to unpack to `size` bytes."""
    deflated, crc = zlib.compress(data, wbits=-15), zlib.crc32(data)
    entry = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 33, crc, len(deflated), size, 1, 0) + b"a" + deflated
    directory = [struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 33, crc, len(deflated), size, 1, *[0] * 5, k * len(entry)) + b"a"
                 for k in range(entries)]
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[entries % 65536] * 2, sum(map(len, directory)), entries * len(entry), 0)
    return entry * entries + b"".join(directory) + end


def test_a_small_archive_that_asks_for_much(client):
    start = time.monotonic()
    large = archive(bytes(LARGEST_BODY + 1), LARGEST_BODY + 1, MOST_ITEMS)
    said = client.post("/api/v1/batch", data=large).json["items"]
    assert len(said) == MOST_ITEMS and {item["status"] for item in said} == {422}, "16 GiB, of which nothing is unpacked"
    assert "more than 512 MiB" in problem(client.post("/api/v1/batch", data=archive(bytes(2**21), 2**21, 300)), 422)
    (lies,) = client.post("/api/v1/batch", data=archive(bytes(LARGEST_BODY + 1), 10, 1)).json["items"]
    assert lies["status"] == 422 and "damaged" in lies["problem"]["detail"]
    assert "send 1 to 512" in problem(client.post("/api/v1/batch", data=archive(b"", 0, 300_000)), 422)
    assert len(large) < 20 * 2**20 and time.monotonic() - start < 10


def test_a_file_of_a_thousand_million_frames(client, dicom):
    start, data = time.monotonic(), pydicom.dcmread(BytesIO(dicom))
    for frames in (2**31 - 1, 60_000, -1):
        data.NumberOfFrames = frames
        data.save_as(asks := BytesIO())
        for path in (PREDICT, "/api/v1/series"):
            assert problem(client.post(path, data=asks.getvalue()), 422)
    assert time.monotonic() - start < 5


def test_a_position_that_is_no_number(client, dicom):
    data = pydicom.dcmread(BytesIO(dicom))
    data.ImagePositionPatient = ["0", "0", "0"]
    data.save_as(whole := BytesIO())
    for value in (b"nan", b"inf"):
        at = whole.getvalue().index(b"0\\0\\0 ")
        said = client.post("/api/v1/series", data=whole.getvalue()[:at] + b"0\\" + value + whole.getvalue()[at + 5:])
        assert "NaN" not in said.text and "Infinity" not in said.text
        assert said.status_code == 422 or said.json["slices"][0]["position_mm"] is None


def test_a_file_name_is_no_path(champion, slice_png, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "x.png").write_bytes(slice_png)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    client = create_app(champion).test_client()
    before = sorted(tmp_path.rglob("*"))
    for name in ("../../x.png", str(tmp_path / "x.png"), "..\\..\\x.png", "x.png\0.dcm"):
        assert problem(client.post(PREDICT, data={"file": (BytesIO(b"a note"), name)}), 415)
        for path in ("/api/v1/batch", "/api/v1/series", "/api/v1/jobs"):
            assert "x.png" not in client.post(path, data={"file": (BytesIO(b"a note"), name)}).text
        assert (tmp_path / "x.png").read_bytes() == slice_png and sorted(tmp_path.rglob("*")) == before


def test_no_other_origin_is_let_in_and_nothing_trains(app, client, slice_png):
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for method, path in (("POST", PREDICT), ("OPTIONS", PREDICT), ("GET", "/")):
        answer = client.open(path, method=method, data=slice_png if method == "POST" else None, headers=origin)
        assert not [name for name, _ in answer.headers if name.lower().startswith("access-control")]
        answer.close()
    changes = {(rule.rule, method) for rule in app.url_map.iter_rules() for method in rule.methods - {"GET", "HEAD", "OPTIONS"}}
    assert changes == {*[(f"/api/v1/{what}", "POST") for what in ("predict", "batch", "series", "jobs", "feedback")], (INFER, "POST"),
                       ("/api/v1/jobs/<job>", "DELETE")}


@pytest.mark.parametrize("function", [Gate.check, add_feedback])
def test_tokens_are_compared_in_constant_time(function):
    tree = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))
    compared = [ast.unparse(node) for node in tree if isinstance(node, ast.Compare)]
    assert not [text for text in compared if any(word in text for word in ("token", "given", "shown"))], "== ends at the first difference"
    calls = [node for node in tree if isinstance(node, ast.Call) and ast.unparse(node.func) == "hmac.compare_digest"]
    assert calls and all("token" in ast.unparse(call.args[1]) for call in calls)


def test_a_batch_too_large_to_wait_for_becomes_a_job(champion, slice_png, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    client = create_app(champion).test_client()
    many = [(BytesIO(b"a note"), "a") for _ in range(1100)]  # more parts than Flask takes by itself
    sent = client.post("/api/v1/batch", data={"file": [*many, (BytesIO(slice_png), "b")]})
    assert sent.status_code == 202 and sent.json["slices"] == 1101
    finished(client, sent.json["id"])
    found = client.get(f"{sent.headers['Location']}/result").json["items"]
    assert [item["status"] for item in found] == [415] * 1100 + [200]
    assert client.post("/api/v1/batch", data=slice_png).status_code == 200, "a small one is answered at once"


def test_a_slice_that_ends_its_process_is_given_up(champion, slice_png, tmp_path, monkeypatch):
    monkeypatch.setattr("deeptumornet.jobs.LEASE", 0.0)
    jobs = Jobs(tmp_path / "jobs.sqlite")
    job = jobs.submit([slice_png])
    assert [jobs.take()[3] for _ in range(ATTEMPTS)] == [1, 2, 3]  # each time a process that dies with it
    monkeypatch.setenv("DEEPTUMORNET_JOBS", str(tmp_path / "jobs.sqlite"))
    client = create_app(champion).test_client()
    finished(client, job)
    (item,) = client.get(f"/api/v1/jobs/{job}/result").json["items"]
    assert item["status"] == 500 and "not tried again" in item["problem"]["detail"]


def test_the_whole_slice_is_looked_at_for_lungs(champion, slice_png, dicom, client):
    card = {**Engine(champion).card, "input": {"size": 80, "normalise": "scaling"}}
    blank = read_slice(encoded(np.full((99, 99), 200, np.uint8)), "a.png")
    lungs = read_slice(slice_png, "b.png")
    for found, expected in ((blank, True), (lungs, False)):
        said = cautions(card, found, image_statistics(see(found.pixels, 80, "scaling")[0]))
        assert any("No lung field" in sentence for sentence in said) is expected
    data = pydicom.dcmread(BytesIO(dicom))
    data.BurnedInAnnotation = "YES"
    data.save_as(marked := BytesIO())
    said = client.post(PREDICT, data=marked.getvalue()).json
    assert any("burned into its pixels" in sentence for sentence in said["warnings"])
    assert said["probability"] == client.post(PREDICT, data=dicom).json["probability"]


def test_an_inference_can_be_spoken_of(champion, slice_png, tmp_path):
    app = create_app(champion)
    app.config["PREDICTION_LOG"] = log = PredictionLog(tmp_path / "log.sqlite")
    client = app.test_client()
    _, ids = client.post(INFER, json=tensor("files", "BYTES", [1], [base64.b64encode(slice_png).decode()])).json["outputs"]
    assert client.get("/v2/models/deeptumornet").json["outputs"][1] == {"name": "ids", "datatype": "BYTES", "shape": [-1]}
    log.feedback(ids["data"][0], "normal", "a reader", ["normal", "adenocarcinoma"])
    log.close()


@pytest.mark.parametrize("change", [{"engine": "../engine.tflite"}, {"engine": "other.tflite"}, {"files": {"../card.json": "0"}}])
def test_an_engine_that_the_card_does_not_vouch_for_is_refused(champion, tmp_path, change):
    shutil.copytree(champion, tmp_path / "champion")
    shutil.copy(champion / "engine.tflite", tmp_path / "champion" / "other.tflite")
    shutil.copy(champion / "engine.tflite", tmp_path)
    card = json.loads((champion / "card.json").read_text())
    (tmp_path / "champion" / "card.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(click.ClickException, match="run `make study` again"):
        create_app(tmp_path / "champion")


def test_every_address_is_documented(app, client):
    document = client.get("/openapi.json").json
    served = {(rule.rule, method.lower()) for rule in app.url_map.iter_rules() for method in rule.methods - {"HEAD", "OPTIONS"}}
    pages = {"/", "/docs", "/openapi.json", "/page/<path:filename>"}
    told = {(path.replace("{job}", "<job>"), method) for path, said in document["paths"].items() for method in set(said) - {"parameters"}}
    assert told == {s for s in served if s[0] not in pages}
    assert document["openapi"] == "3.1.0" and "http" not in client.get("/docs").text.replace("http://www.w3.org/2000/svg", "")
