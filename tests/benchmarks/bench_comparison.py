"""Comparison and report of 25 folds × 4 networks with intervals from 2,000 draws, to the page that a reader opens; and what four times the
draws cost. The predictions are those of the real slices that stand in reports/paper; slices and file metadata, which baselines and examples
look at, are drawn, for the real ones are nobody's to give away."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from benchmark import save, seconds
from PIL import Image

from deeptumornet.comparison import (
    baselines,
    choose_thresholds,
    confusion_figure,
    evaluate,
    number_figure,
    read_predictions,
    roc_figure,
    wide_table,
)
from deeptumornet.report import render
from deeptumornet.study import open_study, read_json, run_notebook, save_figure, write_json, write_table

ROOT = Path(__file__).resolve().parents[2]
CLASSES, POSITIVE = ["normal", "adenocarcinoma"], "adenocarcinoma"


def prepared(workspace: Path) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    "The committed predictions, a manifest of their slices and thumbnails; drawn slices lie in the workspace"
    shutil.copytree(ROOT / "reports" / "paper", workspace / "reports" / "paper")
    shutil.copy(ROOT / "README.md", workspace)
    predictions = read_predictions(workspace / "reports/paper/comparison/predictions.csv", CLASSES)
    rows = predictions.drop_duplicates("image_id")[["image_id", "path", "group", "label"]].reset_index(drop=True)
    rng = np.random.default_rng(0)
    (workspace / "data/slices").mkdir(parents=True)
    for name in rows["image_id"]:
        Image.fromarray(rng.integers(0, 256, (299, 299), dtype=np.uint8)).save(workspace / "data/slices" / f"{name}.png")
    drawn = {"width": rng.integers(300, 600, len(rows)), "height": 400, "file_bytes": 9000, "border": 0.5, "mode": "L", "format": "PNG"}
    return predictions, rows.assign(**drawn), rng.random((len(rows), 256), np.float32)


def compared(workspace: Path, predictions: pd.DataFrame, rows: pd.DataFrame, thumbs: np.ndarray) -> None:
    "What 08_comparison does after the networks have spoken, then the notebooks of evidence, paper and report"
    study, grouped = open_study("paper", workspace), predictions[predictions["protocol"] == "grouped"]
    for _, fold in grouped[grouped["network"] == "resnet50"].groupby(["repeat", "fold"]):
        asked = rows["image_id"].isin(fold["image_id"]).to_numpy()
        baselines(rows, thumbs, ~asked, asked, CLASSES)
    chosen = choose_thresholds(predictions[predictions["protocol"] == "validation"], CLASSES, POSITIVE, 0.95)
    result = read_json(study.reports / "comparison/metrics.json")
    result["protocols"] = evaluate(predictions, CLASSES, POSITIVE, chosen, study["compare"]["draws"], study.seed)
    write_json(study.reports / "comparison/metrics.json", result)
    write_table(study.reports / "tables/networks.csv", wide_table(result["protocols"], list(result["titles"])))
    for name, figure in {"what_the_number_is_worth": number_figure(result), "roc": roc_figure(result, predictions),
                         "confusion": confusion_figure(result, predictions, chosen, result["champion"], 0.95)}.items():
        save_figure(figure, study, name)
    for notebook in ("08c_evidence", "08f_paper", "14_report"):
        executed = run_notebook(notebook, "paper", workspace)
    render(executed, study.reports / "index.html", "measured")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = prepared(Path(folder))
        taken = [seconds(lambda: compared(Path(folder), *given)) for _ in range(3)]
    save("comparison_seconds", [t / 60 for t in taken], "at most 1",
         "seconds of baselines, scores, tests, calibration, tables, figures and page of 4 networks in 25 folds with 2,000 draws, by 60",
         seconds=taken)
    table = given[0][given[0]["protocol"] == "grouped"]
    few, many = zip(*[[seconds(lambda draws=draws: evaluate(table, CLASSES, POSITIVE, {}, draws, 0)) for draws in (4000, 16000)]
                      for _ in range(9)], strict=True)
    save("bootstrap_is_linear", [b / a / 4 for a, b in zip(few, many, strict=True)], "at most 1.2",
         "seconds of all metrics with 16,000 draws by four times those with 4,000, the median of interleaved rounds", seconds=[few, many])
