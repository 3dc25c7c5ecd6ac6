"""The paper's figures and its advice, the cost and the controls: what they say of networks that are constant, untested, missing or wrong"""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deeptumornet import comparison, paper
from deeptumornet.controls import VACUOUS, control_figure, control_sentences, shortcuts, subgroups
from deeptumornet.evidence import differences, said

CLASSES, POSITIVE = ["normal", "adenocarcinoma"], "adenocarcinoma"
TITLES = {"resnet50": "ResNet50", "inceptionv3": "InceptionV3"} | comparison.BASELINES


def drawn(skill: dict[str, float | None]) -> pd.DataFrame:
    "Hold-out and validation of 40 groups of three slices; a network of skill None gives one half for each"
    rng, parts = np.random.default_rng(0), []
    for protocol in ("validation", "holdout"):
        group = np.arange(120) // 3
        for name, s in skill.items():
            p = np.full(120, 0.5) if s is None else 1 / (1 + np.exp(-rng.normal(s * (2 * (group % 2) - 1), 1)))
            parts.append(pd.DataFrame({
                "image_id": [f"{i:03}" for i in range(120)], "path": "", "group": group.astype(str), "network": name, "protocol": protocol,
                "repeat": 0, "fold": "0", "label": np.array(CLASSES)[group % 2], "p_normal": 1 - p, "p_adenocarcinoma": p}))
    return pd.concat(parts, ignore_index=True)


def told(predictions: pd.DataFrame) -> tuple[dict, dict]:
    "The result as 08_comparison writes it, and the thresholds"
    chosen = comparison.choose_thresholds(predictions[predictions["protocol"] == "validation"], CLASSES, POSITIVE, 0.95)
    scores = comparison.evaluate(predictions[predictions["protocol"] == "holdout"], CLASSES, POSITIVE, chosen, 100, 0)
    weights = dict.fromkeys(TITLES, "none")
    return {"positive": POSITIVE, "classes": CLASSES, "titles": TITLES, "weights": weights, "protocols": scores}, chosen


@pytest.fixture(scope="module")
def study():
    predictions = drawn({"resnet50": 1.5, "inceptionv3": 0.6, "thumbnail": 0.1, "metadata": 0.0})
    result, chosen = told(predictions)
    thresholds = {n: c["threshold"] for n, c in chosen.items()}
    return result, chosen, predictions, differences(predictions, ["resnet50", "inceptionv3"], POSITIVE, thresholds)


COST = pd.DataFrame({"name": ["resnet50", "inceptionv3"], **{m: [2.0, 1.0] for m, _, _ in paper.SCENARIOS.values() if m != "auc_low"}})


def title(figure) -> str:
    return figure.get_suptitle().replace("\n", " ")


def test_a_constant_network_goes_through_every_figure_and_is_recommended_to_nobody(tmp_path):
    predictions = drawn({"resnet50": None, "inceptionv3": None, "thumbnail": None, "metadata": None})
    result, chosen = told(predictions)
    names = ["resnet50", "inceptionv3"]
    pairs = differences(predictions, names, POSITIVE, {n: chosen[n]["threshold"] for n in names})
    assert all(s.startswith("No network is better") for s in said(pairs, TITLES))
    for figure in (paper.performance_figure(result, "resnet50"), paper.comparative_figure(result, names),
                   paper.pr_figure(result, predictions), comparison.number_figure(result),
                   comparison.roc_figure(result, predictions)):
        figure.canvas.draw()
        assert len(title(figure)) > 20
    assert "no network is better than another" in title(paper.difference_figure(result, pairs, names))
    advice = paper.recommend(result, COST, pairs, {"resnet50": False, "inceptionv3": False})
    assert set(advice["network"]) == {"none"} and advice["says"].str.contains("no network is eligible").all()


def test_pairs_that_no_test_could_compare_are_not_called_equal(study):
    result, chosen, predictions, _ = study
    lone = predictions.assign(group=np.where(predictions["label"] == "normal", "all", predictions["group"]))
    pairs = differences(lone, ["resnet50", "inceptionv3"], POSITIVE, {n: c["threshold"] for n, c in chosen.items()})
    assert "no network could be tested against another" in title(paper.difference_figure(result, pairs, ["resnet50", "inceptionv3"]))


def test_an_end_of_zero_is_an_end(study):
    result, _, _, _ = study
    scores = {n: dict(s) for n, s in result["protocols"]["holdout"].items()}
    scores["resnet50"]["specificity"] = {"value": 0.05, "low": 0.0, "high": 0.2}
    figure = paper.comparative_figure(result | {"protocols": {"holdout": scores}}, ["resnet50", "inceptionv3"])
    lines = [line.get_xdata() for line in figure.axes[-1].lines]
    assert [0.0, 0.2] in [list(x) for x in lines]


def test_examples_of_a_class_without_slices_say_so(study, tmp_path):
    result, chosen, predictions, _ = study
    for name in predictions["image_id"].unique():
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    normal = predictions[predictions["label"] == "normal"]
    figure = paper.example_figure(normal, ["resnet50"], TITLES, tmp_path, CLASSES, POSITIVE, {"resnet50": chosen["resnet50"]["threshold"]})
    assert [ax.get_title().endswith("no slice") for ax in figure.axes] == [False, True] and "of 1 cases" in title(figure)


def test_what_the_number_is_worth_is_one_network_and_the_same_baselines_at_each_step(study):
    result, _, _, _ = study
    external = pd.DataFrame({"name": ["resnet50", "inceptionv3", "metadata"], "metric": "balanced_accuracy",
                             "value": [0.5, 0.9, 0.6], "low": [0.4, 0.8, 0.5], "high": [0.6, 1.0, 0.7], "n": 90, "n_groups": 30})
    rows = paper.worth_rows(result, "resnet50", external)
    steps = rows.groupby("step", sort=False)["name"].agg(list).tolist()
    assert steps == [["paper"], ["resnet50", "metadata", "thumbnail"], ["resnet50", "metadata"]]
    figure = paper.worth_figure(rows, {"same_pixels": 0.37, "same_group": 0.78, "splits": 20}, "resnet50", TITLES)
    assert "ResNet50 reaches" in title(figure) and "50% at another hospital (file metadata 60%)" in title(figure)
    assert "37.0%" in figure.get_supxlabel() and "78%" in figure.get_supxlabel()


def test_nobody_is_advised_to_take_a_network_that_fails_a_control_or_another_hospital(study):
    result, _, _, pairs = study
    equal, clean = pairs.assign(p_holm=0.5), {"resnet50": False, "inceptionv3": False}

    def by(**given) -> set[str]:
        return set(paper.recommend(result, **{"cost": COST, "pairs": equal, "shortcut": clean, **given})["network"])

    assert "ResNet50" in by()
    assert "ResNet50" not in by(shortcut=clean | {"resnet50": True})
    assert by(shortcut=dict.fromkeys(clean, True)) == by(shortcut={}) == {"none"}
    assert "ResNet50" not in by(external=pd.DataFrame({"name": ["resnet50"], "metric": "auc", "low": [0.45]}))
    why = paper.objections(result, COST[:1], equal, {"resnet50": True}, None)
    assert why["resnet50"] == ["uses a shortcut: it tells the classes apart with the lungs blacked out"]
    assert {"was not put through the controls", "has no measured cost"} <= set(why["inceptionv3"])


def test_blackened_lungs_of_lungs_alone_prove_nothing():
    table = pd.DataFrame([
        ("resnet50", "unaltered", 0.8, 0.7, 0.9, ""), ("resnet50", "lungs blacked out", 0.5, None, None, VACUOUS),
        ("inceptionv3", "unaltered", 0.8, 0.7, 0.9, ""), ("inceptionv3", "lungs blacked out", 0.7, 0.6, 0.9, ""),
    ], columns=["name", "control", "auc", "low", "high", "why"]).assign(n=9, n_groups=3)
    assert shortcuts(table) == {"resnet50": None, "inceptionv3": True}
    sentences = control_sentences(table, TITLES | {"tuned": "InceptionV3 (tuned)"})
    assert "cannot be tested" in sentences[0] and "by construction" in sentences[0] and "uses a shortcut" in sentences[1]
    assert sentences[2] == "Not put through these controls: InceptionV3 (tuned)."
    assert "InceptionV3 still tells" in title(control_figure(table, TITLES))
    assert "can show no shortcut" in title(control_figure(table[table["name"] == "resnet50"], TITLES))


def test_thirds_that_differ_have_names_that_differ():
    names = [str(k) for k in range(30)]
    rows = pd.DataFrame({
        "image_id": names, "group": names, "label": np.where(np.arange(30) % 2, POSITIVE, "normal"), "source": "folder", "format": "PNG",
        "window_center": "", "width": 100, "height": 100, "sharpness": np.arange(30), "noise": 1 + np.arange(30) / 100})
    found = subgroups(pd.DataFrame({"image_id": names, f"p_{POSITIVE}": np.arange(30) / 30}), rows, POSITIVE, 20, 0)
    noise = found[found["by"] == "noise, greys"]
    assert len(noise) == 3 and noise["part"].nunique() == 3 and noise["n"].sum() == 30
