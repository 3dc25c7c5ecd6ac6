"The comparison on a made-up study: thirty groups, two networks of known skill, a shortcut in the file format"

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deeptumornet import comparison as c
from deeptumornet import metrics
from deeptumornet.preprocessing import load_manifest
from deeptumornet.study import Study, StudyError, save_figure, sha256, write_csv, write_json

CLASSES = ["normal", "adenocarcinoma"]
POSITIVE = "adenocarcinoma"
SKILL = {"good": 2.0, "poor": 0.2}


def make_study(workspace: Path) -> Study:
    "Manifest and slices of 120 distinct slices in 30 groups, 20 exact copies, one unreadable file; the study's paths"
    rng = np.random.default_rng(0)
    study = Study("smoke", workspace, workspace, {
        "profile": "smoke", "seed": 0, "classes": CLASSES, "positive": POSITIVE,
        "networks": dict.fromkeys(SKILL, "04_x"), "smoke": {"compare": {"draws": 200, "sensitivity": 0.9}}})
    study.slices.mkdir(parents=True)
    rows = []
    for i in range(120):
        group, cancer = i // 4, i // 4 % 2
        name = f"{i:064x}"
        pixels = np.clip(rng.normal(120 - cancer, 40, (32, 32)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(study.slices / f"{name}.png")
        odd = rng.random() < (0.75 if cancer else 0.25)
        rows.append({
            "path": f"raw/{i}.png", "source": "made", "label": CLASSES[cancer], "patient_id": f"p{group}",
            "image_id": name, "width": 512, "height": 500 if odd else 512, "mode": "L", "format": "PNG",
            "file_bytes": 9000, "border": 0.5, "planted": "", "status": "kept", "reason": "", "group": f"g{group}",
            "split": "test" if group < 12 else "validation" if group < 18 else "train",
            "fold": "" if group < 12 else str(group // 2 % 2)})
    for i in range(20):
        rows.append(rows[i] | {"path": f"raw/{i} copy.png", "status": "excluded", "group": "", "split": "", "fold": "",
                               "reason": f"exact copy of raw/{i}.png"})
    rows.append(rows[0] | {"path": "raw/torn.png", "image_id": "", "width": 0, "height": 0, "mode": "", "format": "",
                           "status": "excluded", "reason": "damaged", "group": "", "split": "", "fold": ""})
    write_csv(study.manifest, pd.DataFrame(rows))
    return study


def predict(rows: pd.DataFrame, name: str, protocol: str, repeat: int = 0, fold: str = "0") -> pd.DataFrame:
    "Made-up answers of the network `name`"
    rng = np.random.default_rng([repeat, len(rows), sum(map(ord, protocol + fold + name))])
    sign = np.where(rows["label"] == POSITIVE, 1, -1)
    p = 1 / (1 + np.exp(-rng.normal(SKILL.get(name.removeprefix("finetuned/"), 0) * sign, 1.5)))
    return rows[["image_id", "path", "group", "label"]].assign(
        network=name, protocol=protocol, repeat=repeat, fold=fold, p_normal=1 - p, p_adenocarcinoma=p)


def train(study: Study, name: str, path: bool = True) -> pd.DataFrame:
    "Write what the train stage leaves behind for one network, but for the model"
    manifest = load_manifest(study.manifest)
    kept, files = manifest[manifest["status"] == "kept"], c.readable(manifest)
    parts = [predict(kept[kept["split"] == "validation"], name, "validation")]
    for repeat in range(2):
        rest = kept[kept["split"] != "test"]
        parts += [predict(rest[rest["fold"] == fold], name, "grouped", repeat, fold) for fold in ("0", "1")]
        at = np.random.default_rng(repeat).permutation(len(files))[:42]
        parts.append(predict(files.iloc[at], name, "published", repeat))
    table = pd.concat(parts, ignore_index=True)
    table = table if path else table.drop(columns="path")
    write_csv(study.candidate(name) / "predictions.csv", table)
    folder = study.models / name
    folder.mkdir(parents=True)
    (folder / "model.keras").write_bytes(b"stands in")
    write_json(folder / "card.json", {"network": name, "title": name.title(), "classes": CLASSES, "weights": "none",
                                      "data_sha256": sha256(study.manifest),
                                      "files": {"model.keras": sha256(folder / "model.keras")}})
    return table


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def manifest(study):
    return load_manifest(study.manifest)


@pytest.fixture(scope="module")
def predictions(study, manifest):
    for name in SKILL:
        train(study, name)
    read = [c.read_predictions(study.reports / "networks" / name / "predictions.csv", CLASSES) for name in SKILL]
    test = manifest[manifest["split"] == "test"]
    table = pd.concat([*read, *(predict(test, name, "holdout") for name in SKILL)], ignore_index=True)
    base = c.baseline_predictions(table, manifest, study.slices, CLASSES)
    return pd.concat([table, base], ignore_index=True)


@pytest.fixture(scope="module")
def chosen(predictions):
    return c.choose_thresholds(predictions[predictions["protocol"] == "validation"], CLASSES, POSITIVE, 0.9)


@pytest.fixture(scope="module")
def result(predictions, chosen):
    return {"profile": "smoke", "positive": POSITIVE, "classes": CLASSES,
            "titles": {"good": "Good", "poor": "Poor"} | c.BASELINES,
            "protocols": c.evaluate(predictions, CLASSES, POSITIVE, chosen, 200, 0)}


# Splits and baselines

def test_every_name_predicts_the_same_slices_in_every_split(predictions):
    for _, part in predictions.groupby(["protocol", "repeat", "fold"]):
        asked = part.groupby("network")["path"].agg(lambda p: tuple(sorted(p)))
        assert asked.nunique() == 1 and set(asked.index) == {*SKILL, *c.BASELINES}


def test_fit_and_predict_never_share_a_row_nor_grouped_a_group(predictions, manifest):
    trained = predictions[predictions["network"].isin(SKILL) & (predictions["protocol"] != "holdout")]
    seen = {}
    for key, rows, fit, asked in c.splits_of(trained, manifest):
        seen[key["protocol"]] = seen.get(key["protocol"], 0) + 1
        assert not (fit & asked).any()
        if key["protocol"] == "published":
            assert len(rows) == 140 and asked.sum() == 42 and (fit | asked).all()
        else:
            assert not set(rows.loc[fit, "group"]) & set(rows.loc[asked, "group"])
            assert "test" not in set(rows.loc[fit, "split"])
    assert seen == {"grouped": 4, "published": 2, "validation": 1, "holdout": 1}


def test_without_paths_copies_are_matched_by_their_number(predictions, manifest):
    trained = predictions[predictions["network"].isin(SKILL) & (predictions["protocol"] == "published")]
    for _, rows, _, asked in c.splits_of(trained.drop(columns="path"), manifest):
        if len(rows) == 140:
            assert asked.sum() == 42


def test_majority_gives_the_shares_of_the_fitting_part(predictions, manifest):
    share = (manifest.query("split == 'train'")["label"] == POSITIVE).mean()
    got = predictions.query("network == 'majority' and protocol == 'holdout'")
    assert np.allclose(got["p_adenocarcinoma"], share)


def test_metadata_finds_the_shortcut_and_baselines_repeat_exactly(study, predictions, manifest, result):
    auc = result["protocols"]["grouped"]["metadata"]["auc"]["value"]
    assert auc > 0.6
    again = c.baseline_predictions(predictions[predictions["network"].isin(SKILL)], manifest, study.slices, CLASSES)
    first = predictions[predictions["network"].isin(c.BASELINES)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again[first.columns], first)


def test_a_baseline_may_not_see_what_it_predicts(manifest):
    rows = manifest[manifest["status"] == "kept"]
    everything = np.ones(len(rows), bool)
    with pytest.raises(StudyError, match="both parts"):
        c.baselines(rows, np.zeros((len(rows), 4)), everything, everything, CLASSES)


def test_one_class_to_fit_on_is_a_sentence_and_one_class_to_predict_is_null(manifest):
    rows = manifest[manifest["status"] == "kept"]
    normal, thumbs = (rows["label"] == "normal").to_numpy(), np.zeros((len(rows), 4))
    with pytest.raises(StudyError, match="of 1 class"):
        c.baselines(rows, thumbs, normal, ~normal, CLASSES)
    fit = np.arange(len(rows)) % 3 > 0
    part = c.baselines(rows, thumbs, fit, ~fit & normal, CLASSES).assign(protocol="grouped", repeat=0, fold="0")
    scores = c.evaluate(part, CLASSES, POSITIVE, {}, 50, 0)["grouped"]
    assert scores["thumbnail"]["auc"]["why"] and scores["thumbnail"]["auc"]["value"] is None
    result = {"titles": c.BASELINES | {"n": "N"}, "protocols": {"grouped": scores | {"n": scores["majority"]}}}
    assert "cannot be judged: one class has no slices" in " ".join(c.verdict(result))
    assert c.finding(result).startswith("No network clearly beats")


def test_networks_scored_on_different_slices_are_refused(predictions, manifest):
    table = predictions.query("network in ('good', 'poor') and protocol == 'grouped'")
    short = table.drop(table.query("network == 'poor'").index[:1])
    with pytest.raises(StudyError, match="good and poor were scored on different slices in protocol 'grouped'"):
        list(c.splits_of(short, manifest))


# Files

@pytest.mark.parametrize("fault, part", [
    (lambda t: t.assign(p_normal=np.nan), "have a probability that is no number"),
    (lambda t: t.assign(p_normal=1.5), "have a probability that is no number"),
    (lambda t: t.assign(label="squamous"), "the label 'squamous'"),
    (lambda t: t.drop(columns=["p_adenocarcinoma", "fold"]), "no column fold, p_adenocarcinoma"),
])
def test_bad_predictions_are_a_sentence(tmp_path, predictions, fault, part):
    file = write_csv(tmp_path / "predictions.csv", fault(predictions.query("network == 'good'")))
    with pytest.raises(StudyError, match=part):
        c.read_predictions(file, CLASSES)


def test_missing_predictions_name_the_file(tmp_path):
    with pytest.raises(StudyError, match="nothing.csv is missing"):
        c.read_predictions(tmp_path / "nothing.csv", CLASSES)


def test_predictions_survive_the_file_exactly(tmp_path, predictions):
    write_csv(tmp_path / "all.csv", predictions)
    again = c.read_predictions(tmp_path / "all.csv", CLASSES)
    assert (again["p_adenocarcinoma"].to_numpy() == predictions["p_adenocarcinoma"].to_numpy()).all()


def test_candidates_are_networks_and_tuned_ones_with_both_files(tmp_path):
    study = make_study(tmp_path)
    for name in ("poor", "tuned", "good", "finetuned/good", "removed"):
        train(study, name)
    (study.models / "poor" / "model.keras").unlink()
    assert list(c.candidates(study)) == ["good", "tuned", "finetuned/good"]
    assert [c.title_of(n, {"title": "Good"}) for n in ("good", "tuned", "finetuned/good")] == ["Good", "Good (tuned)", "Good (fine-tuned)"]


@pytest.mark.parametrize("change, part", [
    ({"classes": ["a", "b"]}, "trained for the classes a, b"),
    ({"data_sha256": "0"}, "trained on another data/manifest.csv"),
    ({"files": {"model.keras": "0"}}, "not the file that was trained"),
    ({"files": {"gone": "0"}}, "not the file that was trained"),
])
def test_a_model_that_does_not_belong_is_refused(tmp_path, change, part):
    study = make_study(tmp_path)
    train(study, "good")
    folder, data = study.models / "good", sha256(study.manifest)
    card = c.read_card(folder, CLASSES, data)
    write_json(folder / "card.json", card | change)
    with pytest.raises(StudyError, match=part):
        c.read_card(folder, CLASSES, data)
    (folder / "card.json").unlink()
    with pytest.raises(StudyError, match="card.json is missing"):
        c.read_card(folder, CLASSES, data)


@pytest.mark.parametrize("fault, sentence", [
    (lambda file: file.unlink(), "predictions.csv is missing: notebook 06_nasnetmobile makes it"),
    (lambda file: write_csv(file, pd.read_csv(file).assign(p_normal=np.nan)), "have a probability that is no number"),
])
def test_the_stage_ends_in_a_sentence_for_a_missing_file_and_for_nan(tmp_path, fault, sentence):
    root = Path(c.__file__).parents[1]
    shutil.copy(root / "params.yaml", tmp_path)
    (tmp_path / "nbs").symlink_to(root / "nbs")
    study = dataclasses.replace(make_study(tmp_path), profile="demo")
    for name in ("resnet50", "inceptionv3", "nasnetmobile"):
        train(study, name)
    fault(study.candidate("nasnetmobile") / "predictions.csv")
    done = subprocess.run([Path(sys.executable).with_name("deeptumornet"), "run", "08_comparison", "--profile", "demo"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr + done.stdout
    assert not (study.reports / "comparison").exists()


# Choice

def test_the_champion_is_best_on_validation_and_test_is_never_read(predictions):
    networks = predictions[predictions["network"].isin(SKILL)]
    validation = networks[networks["protocol"] == "validation"]
    assert c.choose_champion(validation, POSITIVE, {"good": 9, "poor": 1}) == "good"
    with pytest.raises(StudyError, match="validation slices alone, and got holdout"):
        c.choose_champion(networks.query("protocol in ('validation', 'holdout')"), POSITIVE, {"good": 9, "poor": 1})
    with pytest.raises(StudyError, match="alone, and got holdout"):
        c.choose_thresholds(networks.query("protocol == 'holdout'"), CLASSES, POSITIVE, 0.9)


def test_of_equals_the_smaller_file_wins(predictions):
    one = predictions.query("network == 'good' and protocol == 'validation'")
    both = pd.concat([one, one.assign(network="other")])
    assert c.choose_champion(both, POSITIVE, {"good": 2, "other": 1}) == "other"


def test_the_operating_point_reaches_its_sensitivity_on_validation(predictions, chosen):
    for name in SKILL:
        table = predictions.query("network == @name and protocol == 'validation' and label == @POSITIVE")
        p = metrics.calibrate(table[c.p_columns(CLASSES)].to_numpy(), chosen[name]["temperature"])[:, 1]
        assert (p >= chosen[name]["threshold"]).mean() >= 0.9


def test_no_positive_validation_slice_is_a_sentence(predictions):
    table = predictions.query("network == 'good' and protocol == 'validation' and label == 'normal'")
    with pytest.raises(StudyError, match="none of the positive class"):
        c.choose_thresholds(table, CLASSES, POSITIVE, 0.9)
    with pytest.raises(StudyError, match="all of one class"):
        c.choose_champion(table, POSITIVE, {"good": 1})


# Scores and words

def test_scores_hold_their_contract(result):
    assert list(result["protocols"]) == ["holdout", "grouped", "published"]
    for protocol, scores in result["protocols"].items():
        for s in scores.values():
            assert {"n", "n_groups", "n_positive", "positive_class", "threshold"} <= set(s)
            for m in metrics.METRICS:
                assert s[m]["value"] is not None or s[m]["why"]
        assert (protocol == "holdout") == (scores["good"]["threshold"] != 0.5)
    assert result["protocols"]["grouped"]["good"]["n"] == 72 and result["protocols"]["grouped"]["good"]["repeats"] == 2
    assert "share slices" in result["protocols"]["published"]["good"]["auc"]["interval"]
    assert result["protocols"]["holdout"]["majority"]["auc"]["value"] == 0.5


def test_the_verdict_says_who_beats_the_baseline(result):
    said = " ".join(c.verdict(result))
    assert c.winners(result["protocols"]["grouped"]) == ["good"]
    assert "Poor's AUC of" in said and "does not clear the best baseline" in said and "lies above" in said
    assert "under the published protocol and" in said
    assert c.finding(result).startswith("Good clearly beats the best baseline (")
    assert c.finding(result).endswith("Poor does not")


def test_tables_hold_every_number(result, predictions, chosen):
    table = c.wide_table(result["protocols"], list(SKILL))
    assert len(table) == 6 and table["auc"].between(0, 1).all()
    flat = c.flat_summary(result["protocols"])
    assert flat["grouped.good.auc"] == result["protocols"]["grouped"]["good"]["auc"]["value"]
    points = c.roc_points(predictions, POSITIVE)
    for name, curve in points.groupby("name"):
        area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
        assert area == pytest.approx(result["protocols"]["holdout"][name]["auc"]["value"])
    answers = c.called(predictions, "good", CLASSES, POSITIVE, chosen)
    assert (answers["actual"] == answers["predicted"]).mean() == pytest.approx(
        result["protocols"]["holdout"]["good"]["accuracy"]["value"])


# Figures

def test_figures_are_whole_and_the_same_bytes_again(study, result, predictions, chosen):
    for name, draw in {"number": lambda: c.number_figure(result), "roc": lambda: c.roc_figure(result, predictions),
                       "confusion": lambda: c.confusion_figure(result, predictions, chosen, "good", 0.9)}.items():
        png = save_figure(draw(), study, name)
        first = [png.read_bytes(), png.with_suffix(".pdf").read_bytes()]
        save_figure(draw(), study, name)
        assert first == [png.read_bytes(), png.with_suffix(".pdf").read_bytes()]
        assert Image.open(png).width > 600 and b"CreationDate" not in first[1]


def test_four_classes_are_drawn_whole():
    rng = np.random.default_rng(1)
    four = ["normal", "adenocarcinoma", "large cell", "squamous"]
    p = rng.dirichlet(np.ones(4), 120)
    table = pd.DataFrame(p, columns=c.p_columns(four)).assign(
        label=np.array(four)[np.arange(120) % 4], network="n", protocol="holdout", image_id=[f"{i}" for i in range(120)],
        group=[f"g{i // 3}" for i in range(120)], repeat=0, fold="0")
    how = c.choose_thresholds(table.assign(protocol="validation"), four, POSITIVE, 0.9)
    matrix = c.confusion_table(table, ["n"], four, POSITIVE, how)
    right = (table["label"] == np.array(four)[p.argmax(1)]).sum()
    assert matrix.shape == (4, 7) and np.trace(matrix[four]) == right and (matrix[four].sum(axis=1) == 30).all()
    result = {"positive": POSITIVE, "classes": four, "titles": {"n": "N"}, "protocols": c.evaluate(table, four, POSITIVE, how, 50, 0)}
    figure = c.confusion_figure(result, table, how, "n", 0.9)
    assert len(figure.axes[0].texts) == 16 and f"names the class of {right} of 120" in figure.get_suptitle().replace("\n", " ")


def test_a_network_has_its_colour_in_every_figure():
    titles = {"a": "A", "b": "B", "tuned": "B (tuned)"} | c.BASELINES
    assert c.colours_of(["b"], titles)["b"] == c.colours_of(list(titles), titles)["b"] == c.colours_of(["tuned"], titles)["tuned"]


def test_a_hopeless_temperature_is_told(predictions):
    table = predictions.query("network == 'good' and protocol == 'validation'")
    wrong = table.assign(p_normal=table["p_adenocarcinoma"], p_adenocarcinoma=table["p_normal"])
    assert "ended at the bound" in c.choose_thresholds(wrong, CLASSES, POSITIVE, 0.9)["good"]["why"]


def test_the_published_protocol_counts_the_groups_of_one_repeat(result):
    for s in result["protocols"]["published"].values():
        assert s["n"] == 42 and s["n_groups"] <= 30 and s["n_groups"] <= s["n"]


def test_figures_survive_undefined_numbers_and_one_protocol(study, result, predictions):
    scores = {n: dict(s) for n, s in result["protocols"]["holdout"].items()}
    for s in scores.values():
        s["auc"] = {"value": None, "low": None, "high": None, "why": "one class has no slices"}
    alone = result | {"protocols": {"holdout": scores}}
    normal = predictions.query("label == 'normal'")
    save_figure(c.number_figure(alone), study, "alone")
    save_figure(c.roc_figure(alone, normal), study, "alone")


# The models

@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    import keras
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    size = keras.Input((32, 32, 1))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(size))
    keras.Model(size, keras.layers.Dense(2, activation="softmax")(pooled)).save(folder / "model.keras")
    return folder


def test_the_holdout_is_predicted_in_the_order_of_its_rows(study, manifest, model_folder):
    table = c.holdout_predictions({"tiny": model_folder}, manifest, study.slices, CLASSES)
    test = manifest.query("split == 'test'")
    assert table["image_id"].tolist() == test["image_id"].tolist() and set(table["protocol"]) == {"holdout"}
    back = c.predict_model(model_folder / "model.keras", study.slices, test["image_id"].tolist()[::-1], CLASSES)
    np.testing.assert_allclose(table[c.p_columns(CLASSES)], back[::-1], atol=1e-6)
    np.testing.assert_allclose(back.sum(1), 1, atol=1e-6)


def test_a_model_that_does_not_fit_is_a_sentence(study, manifest, model_folder, tmp_path):
    name = manifest["image_id"].iloc[0]
    model = model_folder / "model.keras"
    with pytest.raises(StudyError, match="gives 2 probabilities"):
        c.predict_model(model, study.slices, [name], ["a", "b", "c"])
    with pytest.raises(StudyError, match="missing or damaged"):
        c.predict_model(model, study.slices, ["nothing"], CLASSES)
    Image.new("L", (16, 16)).save(tmp_path / "small.png")
    with pytest.raises(StudyError, match="takes slices of"):
        c.predict_model(model, tmp_path, ["small"], CLASSES)
    (tmp_path / "model.keras").write_bytes(b"torn")
    with pytest.raises(StudyError, match="cannot be loaded"):
        c.predict_model(tmp_path / "model.keras", study.slices, [name], CLASSES)
