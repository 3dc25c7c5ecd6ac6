"""DICOM slices become Hounsfield units whatever way they are stored; pydicom's own reading of the same pixels is the oracle."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, pixel_array

from deeptumornet.dicom import deidentify, describe, is_dicom, pseudonym, read_dicom, secret_salt, window, write_dicom
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.study import StudyError

ROOT = Path(__file__).resolve().parents[1]
TCIA = ROOT.parent / "shared/data/tcia_lung_pet_ct_dx"
SALT = "a secret of the tests"
needs_tcia = pytest.mark.skipif(not TCIA.is_dir(), reason=f"the series of TCIA is not at {TCIA}")
COMPRESSED = {
    "JPEG lossless": "JPEGLosslessProcess14", "JPEG lossless SV1": "JPEGLosslessProcess14_1", "JPEG-LS": "JPEGLSLossless",
    "JPEG 2000": "JPEG2000Lossless", "RLE": "RLELossless",
}


def shipped(name: str) -> Path:
    "A file inside pydicom's wheel, never one that it would download"
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom does not ship {name}")
    return Path(path)


def dataset(stored: np.ndarray, slope=1, intercept=-1024, bits: int = 16, **values) -> FileDataset:
    "An uncompressed CT data set of the stored numbers (int16 or uint16; two axes, or three for frames)"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.CTImageStorage, "1.2.3.4"
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = uid.CTImageStorage, "1.2.3.4", "CT"
    data.PatientID, data.PatientName, data.SeriesInstanceUID, data.StudyInstanceUID = "P1", "Doe^Jane", "1.2.3", "1.2"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-100, -100, 7.5]
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, bits, bits - 1, int(stored.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept = slope, intercept
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    for keyword, value in values.items():
        vr = pydicom.datadict.dictionary_VR(keyword)
        data.add_new(keyword, ("SS" if stored.dtype.kind == "i" else "US") if vr == "US or SS" else vr, value)
    return data


def saved(data: Dataset) -> bytes:
    buffer = BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def compressed(data: Dataset, syntax: str, folder: Path) -> bytes:
    gdcm = pytest.importorskip("gdcm", reason="python-gdcm writes the compressed files")
    (folder / "plain.dcm").write_bytes(saved(data))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "packed.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "packed.dcm").read_bytes()


def oracle(source: bytes | Path) -> np.ndarray:
    "The modality values as pydicom reads them"
    data = pydicom.dcmread(BytesIO(source) if isinstance(source, bytes) else source)
    return apply_modality_lut(pixel_array(data), data)


@pytest.fixture(scope="module")
def slice_12bit() -> np.ndarray:
    hu, _ = slice_hu(draw_patient(1, True), 0.0)
    return np.clip(np.round(hu[60:140, 40:170]) + 1024, 0, 4095).astype(np.uint16)


@given(st.integers(1, 2**32 - 1), st.booleans(), st.sampled_from([12, 16]), st.sampled_from([0.25, 0.5, 1, 1.5, 2, -1]),
       st.integers(-8192, 1024), st.booleans())
@settings(max_examples=60, deadline=None)
def test_rescale_sign_and_bits(seed, signed, bits, slope, intercept, implicit):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    stored = np.random.default_rng(seed).integers(low, high, (7, 9)).astype(np.int16 if signed else np.uint16)
    data = dataset(stored, slope, intercept, bits)
    if implicit:
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    source = saved(data)
    hu, _ = read_dicom(source, "a.dcm")
    assert hu.dtype == np.float32 and hu.shape == (7, 9)
    np.testing.assert_allclose(hu, oracle(source), rtol=1e-6)
    np.testing.assert_allclose(hu, stored.astype(np.float64) * slope + intercept, rtol=1e-6)


def test_big_endian():
    stored = np.arange(-35, 28, dtype=np.int16).reshape(7, 9)
    data = dataset(stored)
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    data.PixelData = stored.astype(">i2").tobytes()
    data["PixelData"].VR = "OW"
    data.set_original_encoding(False, False)
    assert (read_dicom(saved(data), "a.dcm")[0] == stored - 1024.0).all()


def test_twelve_signed_bits_without_their_sign_extended():
    stored = np.array([[-2048, -1], [0, 2047]], np.int16).repeat(4, 0).repeat(4, 1)
    data = dataset(stored, bits=12)
    data.PixelData = (stored.view(np.uint16) & 0x0FFF).tobytes()
    assert (read_dicom(saved(data), "a.dcm")[0] == stored - 1024.0).all()


@pytest.mark.parametrize("syntax", COMPRESSED)
@pytest.mark.parametrize("kind", ["unsigned 12", "signed 16", "frames"])
def test_compressed(syntax, kind, slice_12bit, tmp_path):
    stored = {"unsigned 12": slice_12bit, "signed 16": slice_12bit.astype(np.int16) - 1024,
              "frames": np.stack([slice_12bit, slice_12bit[::-1], slice_12bit[:, ::-1]])}[kind]
    source = compressed(dataset(stored, bits=16 if kind == "signed 16" else 12), COMPRESSED[syntax], tmp_path)
    assert pydicom.dcmread(BytesIO(source)).file_meta.TransferSyntaxUID.is_compressed
    for frame in range(3) if kind == "frames" else [None]:
        expected = (stored if frame is None else stored[frame]) - 1024.0
        for given_as in (source, tmp_path / "packed.dcm"):
            hu, _ = read_dicom(given_as, "a.dcm", frame)
            assert (hu == expected).all()
        decoded = pixel_array(pydicom.dcmread(BytesIO(source)), index=frame)
        assert (hu == decoded - 1024.0).all()


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "dicomdirtests/77654033/CT2/17106"])
def test_ct_files_that_pydicom_ships(name):
    path = shipped(name)
    hu, data = read_dicom(path, name)
    expected = oracle(path)
    padding = pixel_array(path) == data.get("PixelPaddingValue", 10**6)
    assert (hu[~padding] == expected[~padding]).all() and (hu[padding] == -1024).all()
    header = describe(path, name)
    assert header.set_aside == "" and header.frames == 1 and header.patient_id == data.PatientID
    assert header.sop_uid == data.SOPInstanceUID and abs(header.position - float(data.ImagePositionPatient[2])) < 150


@pytest.mark.parametrize(("name", "words"), [
    ("MR_small.dcm", "kind MR Image Storage"), ("dicomdirtests/98892003/MR700/4678", "kind MR Image"),
    ("dicomdirtests/98892001/CT5N/2062", ""), ("dicomdirtests/98892001/CT2N/6293", "a localizer"),
    ("SC_rgb_rle.dcm", "Secondary Capture"), ("rtdose.dcm", "RT Dose"), ("rtplan.dcm", "RT Plan"),
    ("rtstruct.dcm", "RT Structure Set"), ("reportsi.dcm", "SR"), ("test-SR.dcm", "SR"), ("liver_1frame.dcm", "Segmentation"),
    ("examples_palette.dcm", "Ultrasound"), ("JPEG2000.dcm", "Secondary Capture"),
])
def test_what_is_set_aside(name, words):
    path = shipped(name)
    header = describe(path, "x.dcm")
    assert words in header.set_aside and bool(words) == bool(header.set_aside)
    if words:
        assert header.set_aside.startswith("x.dcm ") and "leave it out" in header.set_aside
        with pytest.raises(StudyError) as refused:
            read_dicom(path, "x.dcm")
        assert str(refused.value) == header.set_aside


def test_every_file_that_pydicom_ships_gives_a_header_and_slices_or_one_sentence(tmp_path):
    folder = Path(pydicom.__file__).parent / "data"
    seen = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".json", ".txt", ".md")):
        header = describe(path, path.name)
        assert header.set_aside == "" or (header.set_aside.startswith(path.name) and "\n" not in header.set_aside)
        try:
            hu, _ = read_dicom(path, path.name)
            assert hu.ndim == 2 and hu.dtype == np.float32 and np.isfinite(hu).all()
            assert header.set_aside == ""
        except StudyError as error:
            assert path.name in str(error) and "\n" not in str(error)
        try:
            deidentify(path, tmp_path / path.name, SALT)
            before, after = pydicom.dcmread(path, force=True), pydicom.dcmread(tmp_path / path.name)
            assert before.get("PixelData") == after.get("PixelData")
        except StudyError as error:
            assert path.name in str(error)
        seen += 1
    assert seen > 50


@pytest.mark.parametrize(("normal_of", "why"), [
    ([1, 0, 0, 0, 0, -1], "leans by 90°"), ([0, 1, 0, 0, 0, -1], "leans by 90°"), ([1, 0, 0, 0, 0.5, 0.8660254], "leans by 60°"),
    ([1, 0, 0, 0, 0.8660254, -0.5], ""), ([-1, 0, 0, 0, -1, 0], ""), ([1, 0, 0, 0, 1, 0], ""),
])
def test_axial_planes(normal_of, why):
    source = saved(dataset(np.zeros((8, 8), np.uint16), ImageOrientationPatient=normal_of))
    assert why in describe(source, "a.dcm").set_aside and bool(why) == bool(describe(source, "a.dcm").set_aside)


def test_burned_in_annotation_is_respected():
    for flag, refused in (("YES", True), ("yes", True), ("NO", False), ("", False)):
        source = saved(dataset(np.zeros((8, 8), np.uint16), BurnedInAnnotation=flag))
        header = describe(source, "a.dcm")
        assert header.burned_in == refused == ("burned into its pixels" in header.set_aside)
    with pytest.raises(StudyError, match="a.dcm is not a"):
        read_dicom(saved(dataset(np.zeros((8, 8), np.uint16), ImageOrientationPatient=[1, 0, 0, 0, 0, -1])), "a.dcm")


def test_window_fields_and_monochrome1_change_nothing(slice_12bit):
    expected = slice_12bit.astype(np.float32) - 1024
    for values in ({}, {"WindowCenter": [-600, 40], "WindowWidth": [1500, 400]}, {"WindowCenter": "", "WindowWidth": ""},
                   {"WindowCenter": [50, 60, 70], "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
                   {"PhotometricInterpretation": "MONOCHROME1"}):
        hu, _ = read_dicom(saved(dataset(slice_12bit, **values)), "a.dcm")
        assert (hu == expected).all()
    # stored upside down, as MONOCHROME1 files of some scanners are: the slope says so, and the picture is the same
    upside_down = dataset((4095 - slice_12bit).astype(np.uint16), slope=-1, intercept=4095 - 1024, PhotometricInterpretation="MONOCHROME1")
    assert (window(read_dicom(saved(upside_down), "a.dcm")[0]) == window(expected)).all()


@pytest.mark.parametrize(("dtype", "padding", "limit"), [
    (np.int16, -2000, None), (np.int16, -2048, -2000), (np.uint16, 63536, None), (np.uint16, 65000, 65535), (np.int16, 32767, None),
    (np.uint16, 0, None),
])
def test_padding_becomes_air(dtype, padding, limit):
    stored = np.full((8, 8), 1064, dtype)
    stored[:2] = padding
    stored[2:3] = padding if limit is None else limit
    values = {"PixelPaddingValue": padding} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    hu, _ = read_dicom(saved(dataset(stored, **values)), "a.dcm")
    assert (hu[:3] == -1024).all() and (hu[3:] == 40).all()
    assert (window(hu)[:3] < 60).all()


def enhanced(stored: np.ndarray) -> FileDataset:
    "An enhanced CT file: each frame with its own place and rescale in the functional groups, none in the data set"
    data = dataset(stored)
    for keyword in ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient"):
        delattr(data, keyword)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    shared, plane = Dataset(), Dataset()
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PlaneOrientationSequence = [plane]
    data.SharedFunctionalGroupsSequence, data.PerFrameFunctionalGroupsSequence = [shared], []
    for frame in range(len(stored)):
        groups, place, values = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, 30 - 10 * frame]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1 + frame, -1000 - frame, "HU"
        groups.PlanePositionSequence, groups.PixelValueTransformationSequence = [place], [values]
        data.PerFrameFunctionalGroupsSequence.append(groups)
    return data


def test_enhanced_ct_has_a_rescale_and_a_place_per_frame():
    stored = np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8)
    source = saved(enhanced(stored))
    header = describe(source, "e.dcm")
    assert (header.frames, header.set_aside, header.position, header.positions) == (3, "", 30, (30, 20, 10))
    for frame in range(3):
        assert (read_dicom(source, "e.dcm", frame)[0] == stored[frame] * (1.0 + frame) - 1000 - frame).all()
    with pytest.raises(StudyError, match="e.dcm holds 3 frames: name one"):
        read_dicom(source, "e.dcm")
    with pytest.raises(StudyError, match="none is number 3"):
        read_dicom(source, "e.dcm", 3)


def test_a_shared_rescale_of_frames():
    data = enhanced(np.ones((2, 8, 8), np.uint16))
    for groups in data.PerFrameFunctionalGroupsSequence:
        shared = groups.pop("PixelValueTransformationSequence").value
    data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = shared
    assert (read_dicom(saved(data), "e.dcm", 1)[0] == 2 - 1001).all()


def test_slices_are_ordered_along_the_normal():
    tilted = [1, 0, 0, 0, float(np.cos(0.3)), float(np.sin(0.3))]
    normal = np.cross(tilted[:3], tilted[3:])
    corners = [[round(float(v), 6) for v in 5 * k * normal + [3, 4, 0]] for k in range(4)]
    empty = np.zeros((4, 4), np.uint16)
    files = [saved(dataset(empty, ImageOrientationPatient=tilted, ImagePositionPatient=corner)) for corner in corners]
    steps = [describe(file, "a").position for file in files]
    np.testing.assert_allclose(np.diff(steps), 5, atol=1e-3)
    nowhere = dataset(empty)
    del nowhere.ImagePositionPatient
    assert describe(saved(nowhere), "a").position is None and describe(saved(nowhere), "a").set_aside == ""


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
@pytest.mark.parametrize("meta", [True, False])
def test_without_a_preamble(syntax, meta, slice_12bit):
    data = dataset(slice_12bit)
    data.file_meta.TransferSyntaxUID = syntax
    whole = saved(data)[132:]
    source = whole if meta else whole[12 + int.from_bytes(whole[8:12], "little"):]
    assert is_dicom(source[:132])
    assert (read_dicom(source, "a.dcm")[0] == slice_12bit - 1024.0).all() and describe(source, "a.dcm").position == 7.5


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_picture_is_taken_for_dicom_and_no_bytes_escape_the_sentence(junk):
    assert not is_dicom((b"\x89PNG\r\n\x1a\n" + junk)[:128]) and not is_dicom((b"\xff\xd8\xff" + junk)[:128])
    for source in (junk, b"\0" * 128 + b"DICM" + junk, b"\x08\0\5\0" + junk):
        assert "cannot be read" in describe(source, "a.dcm").set_aside or describe(source, "a.dcm").set_aside.startswith("a.dcm ")
        with pytest.raises(StudyError, match="^a.dcm "):
            read_dicom(source, "a.dcm")


def test_a_missing_decoder_is_named(tmp_path, slice_12bit):
    (tmp_path / "packed.dcm").write_bytes(compressed(dataset(slice_12bit, bits=12), "JPEGLosslessProcess14_1", tmp_path))
    code = ("import sys; sys.modules['gdcm'] = None\nfrom pathlib import Path\nfrom deeptumornet.dicom import read_dicom\n"
            f"read_dicom(Path({str(tmp_path / 'packed.dcm')!r}), 'packed.dcm')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "packed.dcm is compressed as JPEG Lossless" in run.stderr and "install the package python-gdcm" in run.stderr


@pytest.mark.parametrize(("syntax", "marker", "offset"), [
    ("JPEG lossless SV1", b"\xff\xc3\x00\x0b", 4), ("JPEG lossless", b"\xff\xc3\x00\x0b", 6), ("JPEG-LS", b"\xff\xf7\x00\x0b", 8),
    ("JPEG-LS", b"\xff\xf7\x00\x0b", 9), ("JPEG 2000", b"\xff\x4f\xff\x51", 11), ("JPEG 2000", b"\xff\x4f\xff\x51", 42),
])
def test_a_frame_that_contradicts_its_header_is_not_decoded(syntax, marker, offset, slice_12bit, tmp_path):
    "GDCM's JPEG decoder writes beyond its buffer where a damaged frame claims other bits, and ends the process"
    source = bytearray(compressed(dataset(slice_12bit, bits=12), COMPRESSED[syntax], tmp_path))
    source[source.index(marker) + offset] ^= 0x57
    with pytest.raises(StudyError, match="a.dcm cannot be read as DICOM .*its header contradicts"):
        read_dicom(bytes(source), "a.dcm")


def test_a_small_file_cannot_ask_for_gigabytes():
    data = dataset(np.zeros((8, 8), np.uint16))
    data.Rows = data.Columns = 60_000
    with pytest.raises(StudyError, match="too many for a CT slice"):
        read_dicom(saved(data), "a.dcm")


def test_values_that_are_no_hounsfield_units():
    plain = np.ones((8, 8), np.uint16)
    none = dataset(plain)
    del none.RescaleSlope
    beyond = saved(dataset(plain, slope="1.5e300")).replace(b"1.5e300 ", b"1.5e999 ")
    other = saved(dataset(plain, RescaleType="Z_EFF"))
    for source, words in ((other, "of type Z_EFF"), (saved(none), "no rescale slope"), (beyond, "finite")):
        with pytest.raises(StudyError, match=words):
            read_dicom(source, "a.dcm")


def test_deidentify_keeps_the_pixels_and_nothing_that_identifies(tmp_path, slice_12bit):
    data = enhanced(np.stack([slice_12bit, slice_12bit]))
    secret = "Zyxwv"
    for element in ("PatientName", "PatientID", "InstitutionName", "ReferringPhysicianName", "PatientComments", "StudyDescription",
                    "SeriesDescription", "ProtocolName", "StationName", "DeviceSerialNumber", "OperatorsName", "AccessionNumber",
                    "ImageComments", "PatientAddress"):
        setattr(data, element, secret)
    data.PatientBirthDate, data.StudyDate, data.AcquisitionDateTime, data.PatientAge = "19410203", "20190405", "20190405101112", "078Y"
    data.private_block(0x0011, secret, create=True).add_new(1, "LO", secret)
    data.PerFrameFunctionalGroupsSequence[0].private_block(0x0013, secret, create=True).add_new(1, "LO", secret)
    content = Dataset()
    content.FrameAcquisitionDateTime, content.FrameComments = "20190405101112", secret
    data.PerFrameFunctionalGroupsSequence[0].FrameContentSequence = [content]
    data.add_new(0x60003000, "OW", secret.encode() + b"\0")
    for key in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(data, key, f"1.3.99.{len(key)}.4711")
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    (tmp_path / "a.dcm").write_bytes(saved(data))
    deidentify(tmp_path / "a.dcm", tmp_path / "b.dcm", SALT)
    copy = (tmp_path / "b.dcm").read_bytes()
    for word in (secret, "19410203", "20190405", "078Y", "4711"):
        assert word.encode() not in copy
    hidden = pydicom.dcmread(tmp_path / "b.dcm")
    assert hidden.PixelData == data.PixelData
    assert hidden.PatientID == hidden.PatientName == pseudonym(secret, SALT)
    assert describe(tmp_path / "b.dcm", "b").positions == describe(tmp_path / "a.dcm", "a").positions
    assert (read_dicom(tmp_path / "b.dcm", "b", 1)[0] == read_dicom(tmp_path / "a.dcm", "a", 1)[0]).all()
    deidentify(tmp_path / "a.dcm", tmp_path / "c.dcm", "another")
    assert pydicom.dcmread(tmp_path / "c.dcm").SeriesInstanceUID != hidden.SeriesInstanceUID
    assert not [p for p in tmp_path.iterdir() if p.name.endswith("~")]


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_deidentify_keeps_compressed_pixels(syntax, slice_12bit, tmp_path):
    (tmp_path / "a.dcm").write_bytes(compressed(dataset(slice_12bit, bits=12), COMPRESSED[syntax], tmp_path))
    deidentify(tmp_path / "a.dcm", tmp_path / "b.dcm", SALT)
    before, after = pydicom.dcmread(tmp_path / "a.dcm"), pydicom.dcmread(tmp_path / "b.dcm")
    assert before.PixelData == after.PixelData and before.file_meta.TransferSyntaxUID == after.file_meta.TransferSyntaxUID
    assert (read_dicom(tmp_path / "b.dcm", "b")[0] == slice_12bit - 1024.0).all()


def test_a_secret_salt_is_made_once_and_read_by_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPTUMORNET_SALT", raising=False)
    with ThreadPoolExecutor(16) as pool:
        made = set(pool.map(lambda _: secret_salt(tmp_path / "w"), range(64)))
    assert len(made) == 1 and len(made.pop()) == 64 and [p.name for p in (tmp_path / "w").iterdir()] == [".salt"]
    assert (tmp_path / "w/.salt").stat().st_mode & 0o777 == 0o600
    assert secret_salt(tmp_path / "v") != secret_salt(tmp_path / "w")
    monkeypatch.setenv("DEEPTUMORNET_SALT", "given")
    assert secret_salt(tmp_path / "w") == "given"
    monkeypatch.delenv("DEEPTUMORNET_SALT")
    (tmp_path / "w/.salt").write_text("")
    with pytest.raises(StudyError, match="salt is empty, and holds the secret .* restore it, or remove it"):
        secret_salt(tmp_path / "w")


def test_one_series_stays_one_series(tmp_path):
    for k in range(3):
        write_dicom(tmp_path / f"{k}.dcm", np.zeros((8, 8), np.float32), "Doe^Jane", 5.0 * k, 1.0, "one")
        deidentify(tmp_path / f"{k}.dcm", tmp_path / f"h{k}.dcm", SALT)
    headers = [describe(tmp_path / f"h{k}.dcm", "h") for k in range(3)]
    assert len({h.series_id for h in headers}) == 1 and len({h.patient_id for h in headers}) == 1 and len({h.sop_uid for h in headers}) == 3


@needs_tcia
def test_a_real_series(tmp_path):
    files = sorted(TCIA.rglob("*.dcm"))
    headers = {path: describe(path, path.name) for path in files}
    assert {h.set_aside for h in headers.values()} == {""} and len({h.series_id for h in headers.values()}) == 1
    ordered = sorted(files, key=lambda p: headers[p].position)
    np.testing.assert_allclose(np.diff([headers[p].position for p in ordered]), 8, atol=1e-3)
    for path in files[::6]:
        data = pydicom.dcmread(path)
        assert len(data.WindowCenter) == 2
        hu, _ = read_dicom(path, path.name)
        assert (hu == apply_modality_lut(data.pixel_array, data)).all()
        assert -1100 < hu[:20, :20].mean() < -900 and hu.max() < 3072
        deidentify(path, tmp_path / "copy.dcm", SALT)
        copy = pydicom.dcmread(tmp_path / "copy.dcm")
        assert copy.PixelData == data.PixelData
        raw = (tmp_path / "copy.dcm").read_bytes()
        assert b"Lung_Dx-A0002" not in raw and b"6655.2359" not in raw and b"20070425" not in raw
    shutil.rmtree(tmp_path)
