"""Standardising the lung field: what changes between hospitals goes, the tumour stays, and nothing passes unseen."""

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.lungs import NORMALISATIONS, TISSUE, find_lungs, see, standardise
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import read_slice
from deeptumornet.study import StudyError

DATA = Path(__file__).resolve().parents[2] / "shared/data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data, with real slices, is not here")


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 40), centre=st.floats(-650, -350), width=st.floats(1400, 2400), frame=st.integers(0, 30))
def test_window_and_frame_leave_no_trace(number, centre, width, frame):
    hu, _ = slice_hu(draw_patient(number, bool(number % 2)), 0.0)
    plain, _ = standardise(window(hu), 96)
    other, _ = standardise(np.pad(window(hu, centre, width), frame, constant_values=255), 96)
    assert np.corrcoef(plain.ravel(), other.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("shown", [(-600, 1500), (40, 400)])
def test_masses_are_not_covered(shown):
    kept = []
    for number in range(1, 40, 2):
        hu, mass = slice_hu(draw_patient(number, True), 0.0)
        if mass.any():
            field = find_lungs(window(hu, *shown))
            small = np.asarray(Image.fromarray(mass).resize(field.grey.shape[::-1], Image.Resampling.BOX))
            kept.append((small & field.chest).sum() / max(1, small.sum()))
    assert len(kept) > 10 and np.mean(kept) > 0.95 and min(kept) > 0.7


def test_a_slice_cropped_to_the_lungs_edge_is_still_found():
    hu, _ = slice_hu(draw_patient(4, False), 0.0)
    whole = find_lungs(window(hu))
    scale = hu.shape[0] / whole.grey.shape[0]
    rows = np.flatnonzero(np.any(whole.lungs, axis=0).any(1)) * scale
    tight = window(hu)[int(rows[0]) + 4:int(rows[-1]) - 4]
    assert find_lungs(tight).lungs, "lungs that the edge of the picture cuts"


@pytest.mark.parametrize("pixels", [np.zeros((128, 128), np.uint8), np.full((300, 200), 255, np.uint8),
                                    np.random.default_rng(0).integers(0, 255, (256, 256)).astype(np.uint8)])
def test_no_silent_raw_slice(pixels):
    with pytest.raises(StudyError, match="no lung field was found"):
        standardise(pixels, 96)


@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_the_square_says_where_it_is(normalise):
    hu, _ = slice_hu(draw_patient(2, False), 0.0)
    pixels = window(hu)
    picture, (top, left, side) = see(pixels, 64, normalise)
    assert picture.shape == (64, 64) and picture.dtype == np.uint8 and side > 0
    assert top + side > 0 and left + side > 0 and top < pixels.shape[0] and left < pixels.shape[1]


@real
def test_real_slices_of_both_hospitals():
    files = sorted(DATA.glob("chest_ct_kaggle/Data/train/*/*.png"))[::4] + sorted(DATA.glob("iqothnccd_part/*/*.jpg"))[::3]
    pictures = [read_slice(file, file.name).pixels for file in files]
    start, found = time.process_time(), 0
    for pixels in pictures:
        try:
            picture, _ = standardise(pixels, 224)
        except StudyError:
            continue
        found += 1
        inside = picture[np.abs(picture.astype(int) - TISSUE) > 8]
        assert inside.size > 0.1 * picture.size, "something of the chest is seen"
    assert found >= 0.98 * len(files)
    rate = len(pictures) / (time.process_time() - start)
    print(f"{rate:.0f} slices a second and core")
