"""Heat maps whose truth is known: networks that look at one place and nowhere else, boxes whose share of the map is counted by hand."""

from functools import cache
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from deeptumornet.collection import collect, store
from deeptumornet.dicom import window
from deeptumornet.explanation import (
    LEAST,
    METHODS,
    grad_cam,
    in_words,
    likeness,
    maps_layer,
    mean_interval,
    pointing_game,
    scrambled,
    seen_boxes,
)
from deeptumornet.export import Engine
from deeptumornet.serving import heat_shown
from deeptumornet.study import Study, open_study
from deeptumornet.training import add_head, build_body, load_backbone, load_model, load_network

ROOT = Path(__file__).parent.parent
TCIA = ROOT.parent / "shared/data/tcia_lung_pet_ct_dx"
SIZE = 64


@pytest.fixture(scope="module")
def looks_at_bright_places():
    """A network whose positive score is the mean of what is brighter than 100, seen through maps of 16×16, 8×8 and 4×4, and whose negative
    score is that of what is darker than 20."""
    maps = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Conv2D(2, 4, strides=4, activation="relu", name="fine")(maps)
    x = keras.layers.AveragePooling2D(2, name="middling")(x)
    x = keras.layers.AveragePooling2D(2, name="coarse")(x)
    backbone = keras.Model(maps, x, name="backbone")
    kernel = np.zeros((4, 4, 3, 2), np.float32)
    kernel[..., 0], kernel[..., 1] = 1 / 48, -1 / 48
    backbone.get_layer("fine").set_weights([kernel, np.array([-100 / 127.5 + 1, 20 / 127.5 - 1], np.float32)])
    body = build_body(backbone, load_network("inceptionv3"), SIZE)
    model = add_head(body, 2, {"units": 0, "dropout": 0.5}, 0)
    model.get_layer("probabilities").set_weights([np.array([[0, 9.0], [9.0, 0]]), np.zeros(2)])
    return model


def board(row, column, side=8):
    picture = np.full((SIZE, SIZE), 50, np.uint8)
    picture[row:row + side, column:column + side] = 200
    return picture


@pytest.mark.parametrize("method", METHODS)
@given(row=st.integers(0, 7), column=st.integers(0, 7))
@settings(max_examples=6, deadline=None)
def test_the_map_is_hot_where_the_network_looks(looks_at_bright_places, method, row, column):
    heat = METHODS[method](looks_at_bright_places, board(8 * row, 8 * column)[None], 1)[0]
    peak = (np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) * SIZE / len(heat)
    assert np.abs(peak - (8 * row + 4, 8 * column + 4)).max() <= SIZE / LEAST, "within a cell of the only bright place"
    assert heat.max() == 1 and (heat == 0).mean() > 0.7, "and cold elsewhere"


@pytest.mark.parametrize("method", METHODS)
def test_the_other_class_is_explained_by_other_places(looks_at_bright_places, method):
    picture = board(48, 48)
    picture[8:16, 8:16] = 0
    bright, dark = (METHODS[method](looks_at_bright_places, picture[None], positive)[0] for positive in (1, 0))
    assert bright.argmax() > bright.size // 2 > dark.argmax()


@pytest.mark.parametrize("method", METHODS)
def test_a_map_that_is_the_same_everywhere_points_nowhere(looks_at_bright_places, method):
    heat = METHODS[method](looks_at_bright_places, np.stack([np.full((SIZE, SIZE), grey, np.uint8) for grey in (50, 200)]), 1)
    assert (heat[0] == 0).all() and np.isfinite(heat).all()
    assert not pointing_game(heat[:1], [np.array([[0, 0, 1, 1.0]])])["hit"].any(), "nothing points at a box over all of the slice"


def test_the_layer_is_as_coarse_as_it_may_be(looks_at_bright_places):
    assert maps_layer(looks_at_bright_places) == "middling"
    assert grad_cam(looks_at_bright_places, board(0, 0)[None], 1).shape == (1, 8, 8)


@cache
def untrained(name, size):
    network = load_network(name)
    return add_head(build_body(load_backbone(network, size, "none", Path()), network, 80), 2, {"units": 0, "dropout": 0.0}, 0)


@pytest.mark.parametrize(("name", "size", "layer", "cells"), [
    ("resnet50", 64, "conv3_block4_out", 8), ("resnet50", 224, "backbone", 7), ("inceptionv3", 80, "mixed2", 7),
    ("nasnetmobile", 80, "normal_concat_3", 10),
    ("vgg16", 64, "block4_conv3", 8)])
def test_each_network_is_seen_through_maps_that_can_point(name, size, layer, cells):
    model = untrained(name, size)
    assert maps_layer(model) == layer
    slices = np.random.default_rng(0).integers(0, 256, (2, 80, 80)).astype(np.uint8)
    heat = grad_cam(model, slices, 1)
    assert heat.shape == (2, cells, cells) and heat.min() >= 0 and heat.max() <= 1


def test_grad_cam_is_the_gradient_that_finite_differences_find(looks_at_bright_places):
    from deeptumornet.features import cut
    lower, upper = cut(looks_at_bright_places, "middling")
    slices = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE)).astype(np.uint8)
    value = lower(slices[..., None].astype("float32")).numpy().astype("float64")

    def odds(maps):
        p = upper(tf.constant(maps, tf.float32), training=False).numpy()[0].astype("float64")
        return np.log(p[1] / p[0])

    weight = [(odds(value + step) - odds(value - step)) / 0.2 / value[0, ..., 0].size for step in 0.1 * np.eye(2)]
    expected = np.maximum((value[0] * weight).sum(-1), 0)
    np.testing.assert_allclose(grad_cam(looks_at_bright_places, slices, 1)[0], expected / expected.max(), atol=1e-3)


def test_the_service_shows_occlusion_where_its_engine_s_map_is_too_coarse(champion, phantoms):
    engine, model = Engine(champion), load_model(champion / "model.keras")
    prepared = engine.prepare(window(phantoms[1]))[0]
    heat = engine.predict(prepared[None])[1][0]
    assert min(heat.shape) >= LEAST and heat_shown(engine, prepared, heat) is heat
    bright = np.where(np.indices(prepared.shape).sum(0) < len(prepared), 20, 230).astype(np.uint8)
    bright[:20, :20] = 255  # the network looks at what is bright
    shown = heat_shown(engine, bright, heat[:2, :2])
    assert np.ptp(shown) == 1
    np.testing.assert_allclose(shown, METHODS["occlusion"](model, bright[None], 1)[0], atol=1e-3)


def test_scrambling_is_undone_and_changes_the_map(looks_at_bright_places):
    before, picture = looks_at_bright_places.get_weights(), board(16, 40)[None]
    learned = grad_cam(looks_at_bright_places, picture, 1)
    with scrambled(looks_at_bright_places, 3):
        other = grad_cam(looks_at_bright_places, picture, 1)
        assert sorted(looks_at_bright_places.get_weights()[0].ravel()) == sorted(before[0].ravel())
    assert all((a == b).all() for a, b in zip(before, looks_at_bright_places.get_weights(), strict=True))
    assert np.abs(learned - other).max() > 0.1


def test_likeness_counts_no_map_that_is_constant():
    ramp = np.arange(49.0).reshape(1, 7, 7)
    np.testing.assert_allclose(likeness(np.concatenate([ramp, ramp, ramp]), np.concatenate([ramp, -ramp, 0 * ramp])), [1, -1, np.nan])
    found = mean_interval(np.array([0.2, 0.4, np.nan, 0.6]), 500, 0)
    assert found["n"] == 3 and found["value"] == pytest.approx(0.4) and 0.2 <= found["low"] < 0.4 < found["high"] <= 0.6
    assert mean_interval(np.array([np.nan]), 500, 0) == {"n": 0, "value": None, "low": None, "high": None}


@given(cells=st.integers(3, 12), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_chance_is_the_hit_rate_of_a_peak_anywhere(cells, seed):
    top, left = np.random.default_rng(seed).uniform(0, 0.6, 2)
    box = np.array([[top, left, top + 0.3, left + 0.2]])
    everywhere = np.eye(cells * cells).reshape(-1, cells, cells)
    game = pointing_game(everywhere, [box] * len(everywhere))
    assert game["hit"].mean() == pytest.approx(game["chance"].iloc[0]) and 0 < game["chance"].iloc[0] < 1


def test_a_slice_without_a_box_is_no_miss():
    heat = np.eye(9)[None].repeat(2, 0)
    game = pointing_game(heat, [np.empty((0, 4)), np.array([[0, 0, 0.1, 0.1], [0.9, 0.9, 1, 1]])])
    assert game.index.tolist() == [1] and game["hit"].all() and game["chance"].iloc[0] == pytest.approx(2 / 81)


@pytest.mark.parametrize(("hits", "low", "high", "words"), [
    (20, 0.5, 0.8, "more often than chance (15%)"), (1, 0.0, 0.12, "less often than chance (15%)"),
    (4, 0.05, 0.3, "no more often than chance, and the interval holds chance (15%)")])
def test_a_rate_below_chance_is_said(hits, low, high, words):
    row = {"method": "Grad-CAM", "n": 30, "n_groups": 30, "constant": 1, "scrambled_n": 29, "scrambled_value": 0.1, "scrambled_low": -0.1,
           "scrambled_high": 0.3, "tumour_known": 30, "hits": hits, "hit_rate": hits / 30, "low": low, "high": high, "chance": 0.15}
    lines = in_words(row, "ResNet50")
    assert words in lines[2] and f"in {hits} of 30 slices" in lines[2]
    assert "depends on what was learned" in lines[0] and "29 slices" in lines[0] and "undefined, for 1 of 30" in lines[1]
    picture = in_words({**row, "scrambled_value": 0.8, "scrambled_low": 0.6, "scrambled_high": 0.9}, "ResNet50")
    assert "shows the picture, not the network" in picture[0]


def test_a_phantom_knows_where_its_mass_is(tmp_path):
    study = open_study("smoke", tmp_path)
    study["collect"].update(patients=4, slices_per_patient=1)
    table = collect(study)
    boxes = pd.read_csv(study.raw / "boxes.csv")
    assert len(boxes) == (table["path"].str.contains("adenocarcinoma/PHANTOM")).sum() == 2
    assert all(seen_boxes(study, f"data/raw/{path}").shape == (1, 4) for path in boxes["path"])
    assert all(len(seen_boxes(study, path)) == 0 for path in table.loc[table["label"] == "normal", "path"] if "PHANTOM" in path)


@pytest.mark.skipif(not TCIA.is_dir(), reason="../shared/data/tcia_lung_pet_ct_dx is not there")
def test_the_boxes_of_radiologists_reach_the_pointing_game(tmp_path):
    from deeptumornet.collection import series_rows, tumour_slices, write_boxes
    from deeptumornet.dicom import describe

    boxes = tumour_slices(str(TCIA / "Annotation"), "Lung-PET-CT-Dx", ROOT, tmp_path, tmp_path)
    uids = {describe(file, file.name).sop_uid: file for file in TCIA.rglob("*.dcm")}
    uid = next(uid for uid in uids if uid in boxes)
    study = Study("smoke", ROOT, tmp_path, open_study("smoke", tmp_path).settings)
    rows = series_rows({"label": "adenocarcinoma", "patient": "A0002", "series": "1", "licence": "", "count": 1}, [uids[uid]], boxes)
    known = store(rows, study.raw, "a secret", private=True)
    (path, row), = known.items()
    write_boxes(((path, box) for box in row["boxes"]), study.raw)
    (top, left, bottom, right), = boxes[uid]
    study["preprocess"]["normalise"] = "scaling"  # the square that the network sees is the slice
    seen, = seen_boxes(study, f"data/raw/{path}")
    np.testing.assert_allclose(seen * 512, [top, left, bottom, right])
    heat = np.zeros((1, 64, 64))
    heat[0, int((top + bottom) / 16), int((left + right) / 16)] = 1
    game = pointing_game(heat, [seen[None]])
    assert game["hit"].all() and game["chance"].iloc[0] == pytest.approx((bottom - top + 8) * (right - left + 8) / 512**2, rel=0.1)
