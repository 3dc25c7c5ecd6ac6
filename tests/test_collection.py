"""Sources: whatever breaks on the way, the next run continues, and no slice is lost or counted twice."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deeptumornet import archives, collection
from deeptumornet.archives import extract, is_archive
from deeptumornet.collection import collect, idc_series
from deeptumornet.dicom import pseudonym, secret_salt, window, write_dicom
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import preprocess
from deeptumornet.study import Study, StudyError, check_params, load_params

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared/data"
CLASSES = ["squamous.cell.carcinoma", "adenocarcinoma"]
PNG = base64.b64decode(b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
SENTENCE = r"cannot be had \(.*2 attempts\): check the network connection and run again; what has been fetched is kept"


def study_on(source: str, workspace: Path, classes: list[str] = CLASSES, **more) -> Study:
    parameters = load_params(ROOT)
    parameters |= {"profile": "smoke", "classes": classes, "positive": classes[-1]}
    parameters["smoke"]["collect"] = {"source": source, "folders": {}, **more}
    return Study("smoke", ROOT, workspace, parameters)


def hidden(study: Study, identifier: str) -> str:
    return pseudonym(identifier, secret_salt(study.workspace))


def dicom_bytes(patient: str, series: str, position: float, size: int = 16, **tags) -> bytes:
    buffer = io.BytesIO()
    write_dicom(buffer, np.full((size, size), -500 + position, np.float32), patient, position, 1.4, series)
    data = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
    for name, value in tags.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


# ---- servers on the loopback that speak the archives' interfaces, and break where a test says so

class Archive(ThreadingHTTPServer):
    "Answers GET by `answer(path, query)`; `faults` hit the next files, one each; `log` has (path, range) of every file asked for"
    daemon_threads = True
    ranges = True
    guarded = "/"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.log, self.token, self.halted = [], [], None, threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, query: dict) -> tuple[bytes, bool, dict] | None:
        "(content, whether it is a file, headers), or None for 404"
        raise NotImplementedError


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self):
        server, address = self.server, urlsplit(self.path)
        found = server.answer(unquote(address.path), {k: v[0] for k, v in parse_qs(address.query).items()})
        if server.token and server.guarded in address.path and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.send(401, b"{}")
        if found is None:
            return self.send(404, b"")
        content, is_file, headers = found
        if not is_file:
            return self.send(200, content, headers)
        server.log.append((self.path, self.headers.get("Range", "")))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            return self.send(fault, b"wait", {"Retry-After": "0"})
        if fault == "wrong":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1:]
        start = 0
        if server.ranges and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
            start = int(asked[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send(206 if start else 200, content[start:], headers, cut=fault in ("cut", "halt"))
        if fault == "halt":
            server.halted.set()
            time.sleep(60)

    def send(self, status, content, headers=None, cut=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) * 2 // 3] if cut else content)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut


class Nbia(Archive):
    "The Cancer Imaging Archive: three CT series of three patients and a PET series, in zips without Range"
    ranges = False
    series = {"1.1": ("Lung_Dx-A0001", "CT"), "1.2": ("Lung_Dx-A0002", "CT"), "1.3": ("Lung_Dx-G0001", "CT"),
              "1.4": ("Lung_Dx-A0001", "PT")}

    def __init__(self):
        super().__init__()
        self.slices = {uid: {f"{n:08d}.dcm": dicom_bytes(patient, uid, 30.0 - 10 * n) for n in range(4)}
                       for uid, (patient, _) in self.series.items()}
        self.slices["1.3"]["00000004.dcm"] = dicom_bytes("Lung_Dx-G0001", "1.3", 99, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])

    def answer(self, path, query):
        if path == "/boxes.zip":
            return self.boxes, True, {}
        if path.endswith("/getSeries"):
            rows = [{"SeriesInstanceUID": uid, "PatientID": patient, "Modality": modality, "ImageCount": str(len(self.slices[uid])),
                     "LicenseName": "CC BY 4.0"} for uid, (patient, modality) in self.series.items()]
            return json.dumps(rows).encode() if query["Collection"] == "Lung-PET-CT-Dx" else b"", False, {}
        if path.endswith("/getImageWithMD5Hash"):
            buffer = io.BytesIO()
            files = self.slices[query["SeriesInstanceUID"]]
            with zipfile.ZipFile(buffer, "w") as whole:
                for name, content in files.items():
                    whole.writestr(name, content)
                sums = "".join(f"{name},{hashlib.md5(content).hexdigest()}\n" for name, content in files.items())
                whole.writestr("md5hashes.csv", f"Filename,MD5Hash\n{sums}")
            return buffer.getvalue(), True, {}


class Bucket(Archive):
    "S3 with the chosen series of the real index, in pages of seven"

    def __init__(self, chosen: pd.DataFrame):
        super().__init__()
        self.objects = {f"{row['prefix']}/{row['series'][-6:]}-{n}.dcm": dicom_bytes(row["patient"], row["series"], float(n), 256)
                        for row in chosen.to_dict("records") for n in range(row["count"])}

    def answer(self, path, query):
        if query.get("list-type") == "2":
            keys = sorted(k for k in self.objects if k.startswith(query["prefix"]))
            start = int(query.get("continuation-token", 0))
            sums = {key: hashlib.md5(self.objects[key]).hexdigest() for key in keys[start:start + 7]}
            items = "".join(f"<Contents><Key>{key}</Key><Size>{len(self.objects[key])}</Size><ETag>&quot;{md5}&quot;</ETag></Contents>"
                            for key, md5 in sums.items())
            items += f"<NextContinuationToken>{start + 7}</NextContinuationToken>" if len(keys) > start + 7 else ""
            return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{items}</ListBucketResult>'.encode(), False, {}
        content = self.objects.get(path.removeprefix("/idc-open-data/"))
        return content and (content, True, {})


class Kaggle(Archive):
    "Kaggle's download, asked for through a proxy, for kagglehub has no address to set; the MD5 in x-goog-hash, as Google's storage does"
    guarded = "/DownloadDataset"  # the storage's address needs no token: it is signed

    def __init__(self):
        super().__init__()
        buffer = io.BytesIO()
        names = {"train": ("adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib", "squamous.cell.carcinoma_left.hilum_T1_N2_M0_IIIa", "normal"),
                 "test": ("adenocarcinoma", "squamous.cell.carcinoma", "normal")}
        with zipfile.ZipFile(buffer, "w") as whole:
            for part, folders in names.items():
                for folder in folders:
                    for n in range(3):
                        whole.writestr(f"Data/{part}/{folder}/{n}.png", PNG + os.urandom(90_000))
        self.content = buffer.getvalue()

    def answer(self, path, query):
        if path.endswith("/DownloadDataset"):
            return b"", False, {"Location": "http://localhost/archive.zip"}
        digest = base64.b64encode(hashlib.md5(self.content).digest()).decode()
        return self.content, True, {"Accept-Ranges": "bytes", "x-goog-hash": f"crc32c=AAAAAA==,md5={digest}"}


class KaggleHandler(Handler):
    def send(self, status, content, headers=None, cut=False):
        super().send(302 if headers and "Location" in headers else status, content, headers, cut)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(archives, "WAIT", 0.0)
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def remote(request, monkeypatch, quick, tmp_path):
    "(server, study) of a source; the study collects every slice of what the server has"
    if request.param == "tcia":
        server = Nbia()
        monkeypatch.setenv("DEEPTUMORNET_TCIA_URL", f"{server.url}/nbia-api/services/v4")
        study = study_on("tcia", tmp_path / "w", annotations="none")
    elif request.param == "nih":
        pytest.importorskip("idc_index_data", reason="the extra nih is not installed")
        folders = {"squamous.cell.carcinoma": "Lung_Dx-G0010", "adenocarcinoma": "Lung_Dx-A0024"}
        server = Bucket(collection.choose_series(idc_series("lung_pet_ct_dx"), folders, 1, 0, "lung_pet_ct_dx"))
        monkeypatch.setenv("DEEPTUMORNET_IDC_URL", server.url)
        study = study_on("nih", tmp_path / "w", folders=folders, series=1, annotations="none")
    else:
        server = Kaggle()
        server.RequestHandlerClass = KaggleHandler
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
        monkeypatch.setenv("http_proxy", server.url)
        study = study_on("kaggle", tmp_path / "w")
    yield server, study
    server.shutdown()
    server.server_close()


every = pytest.mark.parametrize("remote", ["tcia", "nih", "kaggle"], indirect=True)
ours = pytest.mark.parametrize("remote", ["tcia", "nih"], indirect=True)


def assert_whole(server: Archive, study: Study, table: pd.DataFrame) -> None:
    "Every slice of the server once, and nothing half-written"
    expected = {Nbia: 13, Bucket: len(getattr(server, "objects", ())), Kaggle: 12}[type(server)]
    assert len(table) == expected == table["sha256_file"].nunique() == table["path"].nunique()
    assert all((study.workspace / p).is_file() for p in table["path"])
    assert sorted(os.listdir(study.workspace / "data")) == ["catalogue.csv", "raw"]
    assert not [p for p in study.workspace.rglob("*") if p.suffix in (".part", ".archive") or p.name.endswith("~")]
    assert pd.read_csv(study.catalogue, dtype=str, keep_default_na=False).equals(table)


@every
@pytest.mark.parametrize("fault", ["cut", "wrong", 429, 503])
def test_a_fault_is_survived_within_a_run(remote, fault):
    server, study = remote
    server.faults = [None, fault] if type(server) is not Kaggle else [fault]
    assert_whole(server, study, collect(study))


@every
@pytest.mark.parametrize("fault", ["cut", "wrong", 429, 503])
def test_after_a_fault_that_lasts_the_next_run_continues(remote, fault, monkeypatch):
    server, study = remote
    monkeypatch.setattr(archives, "ATTEMPTS", 2)
    server.faults = [None] * (type(server) is not Kaggle) + [fault] * 40
    with pytest.raises(StudyError, match=SENTENCE):
        collect(study)
    assert not study.raw.exists() and not study.catalogue.exists()
    done = {p.name for p in (study.workspace / ".cache").rglob("*") if p.suffix in (".zip", ".dcm")}
    assert len(done) == (type(server) is not Kaggle)
    server.faults, server.log = [], []
    assert_whole(server, study, collect(study))
    assert not [path for path, _ in server.log if any(path.endswith((f"={name.removesuffix('.zip')}", f"/{name}")) for name in done)]
    if fault == "cut" and server.ranges:
        assert [start for _, start in server.log if start], "a cut file is continued, not begun anew"
    server.log = []
    assert_whole(server, study, collect(study))
    assert not server.log, "what is there is not fetched again"


@every
def test_a_killed_run_is_continued(remote):
    server, study = remote
    server.faults = [None] * (type(server) is not Kaggle) + ["halt"] * 8
    program = f"from test_collection import *; collect(study_on(workspace=Path({str(study.workspace)!r}), **{study['collect']!r}))"
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    assert server.halted.wait(60)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not study.raw.exists() and [p for p in study.workspace.rglob("*") if p.suffix in (".part", ".archive")]
    server.faults, server.log = [], []
    assert_whole(server, study, collect(study))
    if server.ranges:
        assert [start for _, start in server.log if start]


@ours
def test_a_full_disk(remote, monkeypatch):
    server, study = remote
    collect(study)
    cache = study.workspace / ".cache/downloads" / study["collect"]["source"]
    lost = sorted(p for p in cache.rglob("*") if p.suffix in (".zip", ".dcm"))[1]
    lost.unlink()
    part = lost.with_name(f"{lost.name}.part")
    part.symlink_to("/dev/full")
    before = study.catalogue.read_bytes()
    with pytest.raises(StudyError, match=rf"the disk is full while writing .*{lost.name}: free some space"):
        collect(study)
    assert study.catalogue.read_bytes() == before
    part.unlink()
    server.log = []
    assert_whole(server, study, collect(study))
    assert len(server.log) == 1


@pytest.mark.parametrize("remote", ["kaggle"], indirect=True)
def test_a_disk_that_is_full_for_kaggle(remote):
    server, study = remote
    part = study.workspace / ".cache/downloads/kaggle/datasets" / f"{collection.KAGGLE.replace('versions/', '')}.archive"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(StudyError, match="the disk is full while writing .*: free some space"):
        collect(study)
    assert not study.raw.exists() and not study.catalogue.exists()
    part.unlink(missing_ok=True)
    assert_whole(server, study, collect(study))


@pytest.mark.parametrize("remote", ["tcia"], indirect=True)
def test_a_token_that_expires(remote, monkeypatch):
    server, study = remote
    server.token = "fresh"
    refused = r"of The Cancer Imaging Archive is refused \(401 Unauthorized\): .*DEEPTUMORNET_TCIA_TOKEN"
    with pytest.raises(StudyError, match=f"getSeries {refused}"):
        collect(study)
    monkeypatch.setenv("DEEPTUMORNET_TCIA_TOKEN", "fresh")
    answer = server.answer
    def expires(path, query):
        server.token = "fresher" if len(server.log) == 1 else server.token
        return answer(path, query)
    server.answer = expires
    with pytest.raises(StudyError, match=f"zip {refused}"):
        collect(study)
    server.answer = answer
    monkeypatch.setenv("DEEPTUMORNET_TCIA_TOKEN", "fresher")
    assert_whole(server, study, collect(study))
    assert len(server.log) == 3


@pytest.mark.parametrize(("source", "name"), [
    ("tcia", "The Cancer Imaging Archive"), ("nih", "idc-open-data of the Imaging Data Commons"), ("kaggle", "Kaggle")])
def test_no_network_is_one_sentence(source, name, monkeypatch, quick, tmp_path):
    if source == "nih":
        pytest.importorskip("idc_index_data", reason="the extra nih is not installed")
    monkeypatch.setenv("DEEPTUMORNET_TCIA_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DEEPTUMORNET_IDC_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    if source != "kaggle":
        monkeypatch.delenv("http_proxy")
    with pytest.raises(StudyError, match=rf"{name}.* cannot be had \(\w+, 5 attempts\): check the network connection"):
        collect(study_on(source, tmp_path / "w", annotations="none", series=1))


@pytest.mark.parametrize("remote", ["kaggle"], indirect=True)
def test_a_token_of_kaggle_that_expires_in_the_middle(remote, monkeypatch):
    server, study = remote
    monkeypatch.setattr(archives, "ATTEMPTS", 1)
    server.faults = ["cut"]
    with pytest.raises(StudyError, match="ChunkedEncodingError, 1 attempts"):
        collect(study)
    server.token = "fresh"
    monkeypatch.setenv("KAGGLE_API_TOKEN", "expired")
    with pytest.raises(StudyError, match=r"Kaggle's data set .* is refused \(401 .*KAGGLE_API_TOKEN.*or download it with a browser"):
        collect(study)
    assert not study.raw.exists() and not study.catalogue.exists()
    monkeypatch.setenv("KAGGLE_API_TOKEN", "fresh")
    server.log = []
    assert_whole(server, study, collect(study))
    assert [start for _, start in server.log if start], "what had come before is kept"


def test_a_missing_package(monkeypatch, quick, tmp_path):
    monkeypatch.setitem(sys.modules, "idc_index_data", None)
    with pytest.raises(StudyError, match=r"needs the package idc-index: install it by `pip install idc-index`"):
        collect(study_on("nih", tmp_path / "w"))


# ---- what is taken from an archive

@pytest.mark.parametrize("remote", ["tcia"], indirect=True)
def test_tcia_takes_ct_by_the_letter_and_hides_who_it_is(remote):
    server, study = remote
    table = collect(study)
    assert table.groupby("label").size().to_dict() == {"adenocarcinoma": 8, "squamous.cell.carcinoma": 5}
    assert set(table["patient_id"]) == {hidden(study, p) for p in ("Lung_Dx-A0001", "Lung_Dx-A0002", "Lung_Dx-G0001")}
    assert table["reason"].str.contains("locali", case=False).sum() == 1 == (table["status"] == "excluded").sum()
    kept = table[table["status"] == ""]
    for _, series in kept.groupby("series_id"):
        positions = [pydicom.dcmread(study.workspace / p).ImagePositionPatient[2] for p in series.sort_values("slice_index")["path"]]
        assert positions == sorted(positions)
    for path in [*study.raw.rglob("*"), study.catalogue]:
        assert "Lung_Dx" not in str(path) and (path.is_dir() or b"Lung_Dx" not in path.read_bytes())
    assert json.loads((study.raw / "provenance.json").read_text())["licences"] == ["CC BY 4.0"]
    with pytest.raises(StudyError, match=r"class 'healthy' has no CT series in Lung-PET-CT-Dx \(.* 'healthy'; there are Lung_Dx-A0001"):
        collect(study_on("tcia", study.workspace, classes=["healthy", "adenocarcinoma"], annotations="none"))
    with pytest.raises(StudyError, match=r"has no healthy patients, .*annotations is none: take that line away, .* adeno, smallcell"):
        collect(study_on("tcia", study.workspace, classes=["normal", "adenocarcinoma"], annotations="none"))
    with pytest.raises(StudyError, match=r"has no CT series in Lung-Nothing .*there are none"):
        collect(study_on("tcia:Lung-Nothing", study.workspace))
    assert len(collect(study_on("tcia", study.workspace, series=1, annotations="none"))) == 9


@pytest.mark.parametrize("remote", ["tcia"], indirect=True)
def test_tcia_in_one_line_has_the_classes_that_the_study_ships_with(remote, monkeypatch):
    """Boxes come over HTTP, cut once; normal slices are those far from each box, of the same patients."""
    server, study = remote
    buffer = io.BytesIO()
    boxed = [pydicom.dcmread(io.BytesIO(server.slices[series]["00000000.dcm"])).SOPInstanceUID for series in ("1.1", "1.2")]
    with zipfile.ZipFile(buffer, "w") as whole:
        for uid in boxed:
            whole.writestr(f"boxes/{uid}.xml", BOX_FILE)
    server.boxes = buffer.getvalue()
    monkeypatch.setattr(collection, "BOXES", f"{server.url}/boxes.zip")
    server.faults = ["cut"]
    study = study_on("tcia", study.workspace, classes=["normal", "adenocarcinoma"])
    table = collect(study)
    assert [path for path, _ in server.log].count("/boxes.zip") == 2
    position = table["path"].map(lambda p: float(pydicom.dcmread(study.workspace / p).ImagePositionPatient[2]))
    assert position.groupby(table["label"]).agg(list).to_dict() == {"adenocarcinoma": [30.0, 30.0], "normal": [0.0, 0.0]}
    assert table.groupby("patient_id")["label"].nunique().tolist() == [2, 2]


BOX_FILE = ("<annotation><object><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>30</xmax><ymax>50</ymax></bndbox></object>"
            "<object><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>")


@pytest.mark.skipif(not (SHARED / "tcia_lung_pet_ct_dx").is_dir(), reason="../shared/data/tcia_lung_pet_ct_dx is not there")
@pytest.mark.parametrize("remote", ["tcia"], indirect=True)
@pytest.mark.parametrize("zipped", [False, True])
def test_tumour_boxes_choose_the_slices(remote, zipped, tmp_path):
    server, study = remote
    files = sorted((SHARED / "tcia_lung_pet_ct_dx").rglob("*.dcm"))
    server.slices["1.2"] = {f"{n:08d}.dcm": p.read_bytes() for n, p in enumerate(files)}
    boxes = tmp_path / "boxes"
    shutil.copytree(SHARED / "tcia_lung_pet_ct_dx/Annotation", boxes)
    for slice_ in list(server.slices["1.3"].values())[:2]:
        uid = pydicom.dcmread(io.BytesIO(slice_)).SOPInstanceUID
        (boxes / f"{uid}.xml").write_text(BOX_FILE)
    (boxes / "1.2.3.xml").write_text("<annotation></annotation>")
    where = Path(shutil.make_archive(str(boxes), "zip", boxes)) if zipped else boxes
    table = collect(study_on("tcia", study.workspace, annotations=str(where)))
    assert table.groupby("label").size().to_dict() == {"adenocarcinoma": 8, "squamous.cell.carcinoma": 2}
    kept = pd.read_csv(study.raw / "boxes.csv")
    assert set("data/raw/" + kept["path"]) == set(table["path"]) and (kept["box_top"] < kept["box_bottom"]).all()
    assert kept[kept["path"].str.startswith("squamous")].iloc[:, 1:].to_numpy().tolist() == [[20, 10, 50, 30], [2, 1, 4, 3]] * 2
    (boxes / "1.2.3.xml").write_text("<annotation><object><bndbox/></object></annotation>")
    with pytest.raises(StudyError, match=r"1\.2\.3\.xml cannot be read as XML with the edges of its boxes"):
        collect(study_on("tcia", study.workspace, annotations=str(boxes)))
    with pytest.raises(StudyError, match=r"class 'squamous.cell.carcinoma' has no slice with a tumour box"):
        collect(study_on("tcia", study.workspace, annotations=str(SHARED / "tcia_lung_pet_ct_dx/Annotation")))


@pytest.mark.parametrize("remote", ["kaggle"], indirect=True)
def test_kaggle_joins_all_parts_and_takes_a_downloaded_archive(remote, tmp_path):
    server, study = remote
    table = collect(study)
    (tmp_path / "archive.zip").write_bytes(server.content)
    same = collect(study_on(str(tmp_path / "archive.zip"), tmp_path / "v", folders={label: f"{label}*" for label in CLASSES}))
    assert list(same["path"]) == list(table["path"]) and list(same["sha256_file"]) == list(table["sha256_file"])
    assert table["path"].str.contains("/train_").sum() == 6 == table["path"].str.contains("/test_").sum()
    with pytest.raises(StudyError, match=r"class 'squamous.cell.carcinoma' has no file in .*archive.zip/Data/train .*in collect.folders"):
        collect(study_on(str(tmp_path / "archive.zip"), tmp_path / "v"))


def test_the_choice_of_series_is_fixed_by_the_seed_and_spread_over_patients():
    pytest.importorskip("idc_index_data", reason="the extra nih is not installed")
    lung = idc_series("lung_pet_ct_dx")
    patterns = collection.patient_patterns(CLASSES, {}, "lung_pet_ct_dx")
    first = collection.choose_series(lung, patterns, 20, 0, "lung_pet_ct_dx")
    assert first.equals(collection.choose_series(lung.sample(frac=1, random_state=1), patterns, 20, 0, "lung_pet_ct_dx")[first.columns])
    assert not first.equals(collection.choose_series(lung, patterns, 20, 1, "lung_pet_ct_dx"))
    assert first["patient"].nunique() == len(first) == 40 and first["count"].min() >= collection.MONITORING
    fewer = lung[~lung["series"].isin(first["series"].iloc[:2])]
    assert len(set(collection.choose_series(fewer, patterns, 20, 0, "x")["series"]) - set(first["series"])) == 2
    with pytest.raises(StudyError, match="the index has no CT series of that collection; choose another"):
        idc_series("lung_nothing")
    assert len(idc_series("lidc_idri")) == 1018 and len(idc_series("nsclc_radiomics")) == 422


@pytest.mark.parametrize(("collect_", "quality", "sentence"), [
    ({"source": "tcia", "seires": 3}, {}, "line in collect 'seires' is unknown; choose source, folders,"),
    ({}, {}, "collect.source is missing; write phantom, kaggle"),
    ({"source": "phantom"}, None, "quality None must hold a line for each check"),
    ({"source": "phantom"}, {"foo": {"limit": 1, "action": "exclude"}}, "check in quality 'foo' is unknown; choose unreadable, blank"),
    ({"source": "phantom"}, {"blank": None}, "quality.blank is None; write a number"),
    ({"source": "phantom"}, {"blank": {"limit": "8", "action": "flag"}}, "quality.blank is .*'8'.*; write a number"),
    ({"source": "phantom"}, {"blank": {"limit": 8, "action": "drop"}}, "action in quality.blank 'drop' is unknown; choose exclude, flag"),
    ({"source": "phantom"}, {"unreadable": {"limit": 8, "action": "flag"}}, "in quality.unreadable 'flag' is unknown; choose exclude"),
])
def test_wrong_lines_of_params_are_refused(collect_, quality, sentence):
    parameters = load_params(ROOT)
    parameters[parameters["profile"]]["collect"], parameters["quality"] = collect_, quality
    with pytest.raises(StudyError, match=sentence):
        check_params(parameters, ROOT)


# ---- folders, CSV files, archives

def mixed_folder(folder: Path) -> Path:
    for label in CLASSES:
        (folder / label / "deep").mkdir(parents=True)
        Image.new("L", (64, 64), 9).save(folder / label / "deep" / "a.png")
    for n in range(3):
        (folder / CLASSES[1] / f"{n}.dcm").write_bytes(dicom_bytes("Doe^Jane", "s", 10.0 * (2 - n)))
    (folder / CLASSES[1] / "head.dcm").write_bytes(dicom_bytes("Doe^Jane", "t", 0.0, Modality="MR"))
    (folder / CLASSES[1] / "text.dcm").write_bytes(dicom_bytes("Doe^Jane", "s", 40.0, BurnedInAnnotation="YES"))
    (folder / CLASSES[1] / "cut.dcm").write_bytes(dicom_bytes("Doe^Jane", "s", 50.0)[:200])
    return folder


def packed(folder: Path, kind: str) -> Path:
    return Path(shutil.make_archive(str(folder), kind, folder.parent, folder.name))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "gztar", "xztar"])
def test_a_folder_or_archive_of_pictures_and_dicom(kind, tmp_path):
    source = mixed_folder(tmp_path / "mine")
    study = study_on(str(source if kind == "folder" else packed(source, kind)), tmp_path / "w")
    table = collect(study)
    names = ("0.dcm", "1.dcm", "2.dcm", "head.dcm", "text.dcm", "cut.dcm", "a.png")
    names = {hidden(study, name.partition(".")[0]): name for name in names}
    rows = table.set_index(table["path"].str.extract(r"(\w+)\.\w+$", expand=False).map(names))
    assert len(table) == 8
    assert list(rows.loc[["0.dcm", "1.dcm", "2.dcm"], "slice_index"]) == ["2", "1", "0"]
    assert set(rows.loc[["0.dcm", "1.dcm", "2.dcm"], "patient_id"]) == {hidden(study, "Doe^Jane")}
    assert (rows["status"] == "excluded").to_dict() == {n: n in ("head.dcm", "text.dcm", "cut.dcm") for n in rows.index}
    for name, word in {"head.dcm": "MR", "text.dcm": "burned", "cut.dcm": f"{hidden(study, 'cut')}.dcm cannot be read"}.items():
        assert word in rows.loc[name, "reason"]
    assert set(rows.loc["0.dcm", ["window_center", "window_width"]]) == {"-600", "1500"} and set(rows.loc["a.png", "window_center"]) == {""}
    assert not any(b"Doe" in p.read_bytes() for p in (tmp_path / "w").rglob("*") if p.is_file())
    assert sorted(os.listdir(tmp_path / "w/data")) == ["catalogue.csv", "raw"]


def test_nothing_that_is_kept_names_a_patient_a_series_or_a_date(tmp_path, monkeypatch):
    """Neither a path nor a reason, not even a short identifier, the name of a broken file or of a picture beside it; and no list of
    patients gives the hashes away without the secret."""
    monkeypatch.delenv("DEEPTUMORNET_SALT", raising=False)
    content = dicom_bytes("Lung_Dx-A0002", "s", 1.0)
    uid = str(pydicom.dcmread(io.BytesIO(content)).SeriesInstanceUID)
    files = {f"adenocarcinoma/Lung_Dx-A0002/04-25-2007-NA/{uid}/1-01.dcm": content, "adenocarcinoma/P1_0.dcm": dicom_bytes("P1", "t", 1.0),
             "normal/Lung_Dx-A0009_broken.dcm": content[:300], "normal/Lung_Dx-A0009_b.png": PNG,
             "normal/Lung_Dx-A0007_mr.dcm": dicom_bytes("Lung_Dx-A0007", "u", 1.0, Modality="MR")}
    for place, content in files.items():
        (tmp_path / "mine" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / place).write_bytes(content)
    study = study_on(str(tmp_path / "mine"), tmp_path / "w", classes=["normal", "adenocarcinoma"])
    table = collect(study)
    assert len(table) == 5 and table["reason"].str.contains("cannot be read as DICOM|modality MR").sum() == 2
    for path in [*study.raw.rglob("*"), study.catalogue]:
        for word in ("Lung_Dx", "P1", uid, "2007"):
            assert word not in str(path.relative_to(tmp_path)) and (path.is_dir() or word.encode() not in path.read_bytes()), (path, word)
    listed = {pseudonym(f"Lung_Dx-A{n:04d}", salt) for n in range(99) for salt in ("", "deeptumornet")}
    assert not listed & set(table["patient_id"]) and len(set(table["patient_id"]) - {""}) == 3
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "Smith_3.dcm").write_bytes(content[:300])
    (tmp_path / "csv" / "Smith_4.png").write_bytes(PNG)
    pd.DataFrame({"path": ["Smith_3.dcm", str(tmp_path / "csv/Smith_4.png")], "label": ["normal", "adenocarcinoma"],
                  "patient_id": ["Smith", "J"]}).to_csv(tmp_path / "csv/all.csv", index=False)
    study = study_on(str(tmp_path / "csv/all.csv"), tmp_path / "v", classes=["normal", "adenocarcinoma"])
    assert not any("Smith" in f"{v}" for v in collect(study).to_numpy().ravel())


def test_the_study_is_the_same_with_another_salt(tmp_path, monkeypatch):
    """Groups, splits and folds, slice by slice: patients of two series, and pictures of nobody beside them."""
    for number in range(16):
        folder = tmp_path / "mine" / ("normal", "adenocarcinoma")[number % 2]
        patient = draw_patient(number, bool(number % 2))
        for series in range(2):
            place = folder / patient.name / f"series {series}"
            place.mkdir(parents=True)
            write_dicom(place / "1.dcm", slice_hu(patient, 0.3 * series)[0], patient.name, 30.0 * series, 1.4, f"{number} {series}")
        Image.fromarray(window(slice_hu(patient, 0.0)[0])).save(folder / f"{number}.png")
    manifests = []
    for salt in ("one", "two", "three"):
        monkeypatch.setenv("DEEPTUMORNET_SALT", salt)
        study = study_on(str(tmp_path / "mine"), tmp_path / salt, classes=["normal", "adenocarcinoma"])
        collect(study)
        manifests.append(preprocess(study)[0])
    first, *others = manifests
    same = ["image_id", "label", "slice_index", "status", "group", "split", "fold"]
    for other in others:
        pd.testing.assert_frame_equal(first[same], other[same])
        assert not set(first["patient_id"]) & set(other["patient_id"]) - {""} and not set(first["path"]) & set(other["path"])


@pytest.mark.parametrize("kind", ["csv", "zip"])
def test_a_csv_names_labels_and_patients(kind, tmp_path):
    folder = tmp_path / "mine"
    (folder / "P0001").mkdir(parents=True)
    for n in range(4):
        Image.new("L", (64, 64), n).save(folder / "P0001" / f"{n}.png")
    labels = [*CLASSES, CLASSES[0], "other"]
    table = pd.DataFrame({"path": [f"P0001/{n}.png" for n in range(4)], "label": labels, "patient_id": ["P0001"] * 4})
    table.to_csv(folder / "slices.csv", index=False)
    study = study_on(str(folder / "slices.csv" if kind == "csv" else packed(folder, "zip")), tmp_path / "w")
    done = collect(study)
    assert done.groupby("label").size().to_dict() == {CLASSES[0]: 2, CLASSES[1]: 1}
    assert set(done["patient_id"]) == {hidden(study, "P0001")}
    assert not done["path"].str.contains("P0001").any()


@pytest.mark.parametrize(("lines", "sentence"), [
    ("file,label\na.png,normal\n", r"has no column path, only file, label"),
    ("path,label\n../b.png,normal\n", r"line 2: ../b.png lies outside the folder of the CSV"),
    ("path,label\n/etc/passwd,normal\n", r"line 2: /etc/passwd lies outside"),
    ("path,label\na.png,normal\nc.png,normal\n", r"line 3: there is no file c.png"),
    ("path,label\na.png,normal\n./a.png,normal\n", r"line 3: ./a.png is named a second time"),
    ("path,label\na.png,healthy\n", r"class 'normal' has no line in .* there are healthy"),
    ("", r"cannot be read as CSV"),
])
def test_a_csv_that_is_wrong(lines, sentence, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path.parent / "b.png").write_bytes(PNG)
    (tmp_path / "slices.csv").write_text(lines)
    with pytest.raises(StudyError, match=sentence):
        collect(study_on(str(tmp_path / "slices.csv"), tmp_path / "w", classes=["normal", "adenocarcinoma"]))


def test_folders_that_are_ambiguous(tmp_path):
    for name in ("normal", "normal two"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "a.png").write_bytes(PNG)
    with pytest.raises(StudyError, match=r"two files of class 'normal' have the name a.png: rename one, such as .*normal two/a.png"):
        collect(study_on(str(tmp_path / "mine"), tmp_path / "w", classes=["normal"], folders={"normal": "normal*"}))
    twice = {"normal": "normal*", "cancer": "*two"}
    with pytest.raises(StudyError, match=r"sub-folder .*normal two matches both 'normal' and 'cancer': narrow the patterns"):
        collect(study_on(str(tmp_path / "mine"), tmp_path / "w", classes=["normal", "cancer"], folders=twice))


# ---- archives that mean harm

def tar_of(path: Path, *entries: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as whole:
        for entry in entries:
            whole.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


@pytest.mark.parametrize("bad", [
    entry("../out.png"), entry("a/../../out.png"), entry("/tmp/out.png"), entry("C:/out.png"), entry("..\\out.png"),
    entry("out", tarfile.SYMTYPE, "/etc"), entry("out", tarfile.LNKTYPE, "/etc/passwd"), entry("out", tarfile.CHRTYPE),
    entry("out", tarfile.FIFOTYPE),
    entry("normal/a.png"), entry("normal"), entry("normal/a.png/b.png"),
], ids=lambda bad: bad.name)
def test_an_archive_that_climbs_out(bad, tmp_path):
    harmless = entry("normal/a.png")
    with pytest.raises(StudyError, match=r"archive bad.tar has .* nothing is taken from it"):
        extract(tar_of(tmp_path / "bad.tar", harmless, bad), tmp_path / "in/deep")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {"bad.tar", "a.png"}
    with pytest.raises(StudyError, match=r"archive bad.tar"):
        collect(study_on(str(tmp_path / "bad.tar"), tmp_path / "w"))
    assert not list((tmp_path / "w").rglob("*.png"))


def test_a_link_in_a_zip_and_an_encrypted_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as whole:
        link = zipfile.ZipInfo("normal")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        whole.writestr(link, "/etc")
    with pytest.raises(StudyError, match="a link or a device"):
        extract(tmp_path / "bad.zip", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "locked.zip", "w") as whole:
        whole.writestr("a.png", PNG)
    content = bytearray((tmp_path / "locked.zip").read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(StudyError, match="locked.zip is encrypted"):
        extract(tmp_path / "locked.zip", tmp_path / "out2")


@pytest.mark.parametrize("kind", ["zip", "gz", "xz"])
def test_bombs(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    bomb = tmp_path / f"bomb.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as whole:
            whole.writestr("normal/a.png", bytes(20 << 20))
    else:
        with tarfile.open(bomb, f"w:{kind}") as whole:
            whole.addfile(entry("normal/a.png", size=20 << 20), io.BytesIO(bytes(20 << 20)))
    with pytest.raises(StudyError, match=rf"bomb.{kind} unpacks to more than \d MiB"):
        extract(bomb, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 4 << 20
    monkeypatch.setattr(archives, "MOST_FILES", 3)
    with pytest.raises(StudyError, match="more than 3 entries"):
        extract(tar_of(tmp_path / "many.tar", *(entry(f"{n}") for n in range(4))), tmp_path / "many")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as whole:
        whole.write(bomb, "normal/bomb.zip")
    extract(tmp_path / "outer.zip", tmp_path / "nested")
    assert [p.name for p in (tmp_path / "nested").rglob("*") if p.is_file()] == ["bomb.zip"]


def whole_archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as whole:
            for n in range(3):
                whole.writestr(f"{n}.bin", bytes(range(200)) * 5)
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as whole:
            for n in range(3):
                whole.addfile(entry(f"{n}.bin", size=1000), io.BytesIO(bytes(range(200)) * 5))
    return buffer.getvalue()


WHOLE = {kind: whole_archive(kind) for kind in ("zip", "w", "w:gz", "w:xz", "w:bz2")}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1), st.binary(max_size=20), st.booleans())
def test_a_damaged_archive_gives_all_or_a_sentence(kind, at, noise, cut):
    with tempfile.TemporaryDirectory() as folder:
        path, content = Path(folder) / "a.zip", WHOLE[kind]
        at = int(at * len(content))
        path.write_bytes(content[:at] if cut else content[:at] + noise + content[at + len(noise):])
        if not is_archive(path):
            return
        try:
            extract(path, Path(folder) / "out")
        except StudyError as error:
            assert "a.zip" in str(error)
            return
        files = [p.read_bytes() for p in (Path(folder) / "out").rglob("*") if p.is_file()]
        assert len(files) == 3 and (files == [bytes(range(200)) * 5] * 3 or kind == "w" and not cut)  # tar has no checksum of contents


@pytest.mark.skipif(not (SHARED / "chest_ct_kaggle").is_dir(), reason="../shared/data/chest_ct_kaggle is not there")
def test_the_published_slices(tmp_path):
    study = study_on(str(SHARED / "chest_ct_kaggle"), tmp_path / "w", classes=["normal", "adenocarcinoma"],
                     folders={"normal": "normal*", "adenocarcinoma": "adenocarcinoma*"})
    assert collect(study).groupby("label").size().to_dict() == {"normal": 148, "adenocarcinoma": 195}
