"""Scores, tests and figures of 25 folds × 4 networks, with intervals from 2,000 draws; and what twice the draws cost."""

import itertools

import numpy as np
import pandas as pd
from benchmark import save, seconds

from deeptumornet.comparison import evaluate, number_figure, roc_figure
from deeptumornet.evidence import differences, said
from deeptumornet.paper import comparative_figure, difference_figure, pr_figure

CLASSES, NETWORKS, SLICES, REPEATS, FOLDS = ["normal", "cancer"], ("a", "b", "c", "d"), 343, 5, 5
TITLES = {name: name.upper() for name in NETWORKS}


def drawn() -> pd.DataFrame:
    """Predictions as the networks write them, of slices in groups of three."""
    rng = np.random.default_rng(0)
    group = np.arange(SLICES) // 3
    rows = pd.DataFrame({"image_id": [f"{k:04}" for k in range(SLICES)], "group": group, "label": np.array(CLASSES)[group % 2]})
    parts = []
    for name, repeat in itertools.product(NETWORKS, range(REPEATS)):
        p = 1 / (1 + np.exp(-rng.normal(np.where(rows["label"] == "cancer", 1, -1), 1.5)))
        fold = rng.integers(FOLDS, size=SLICES).astype(str)
        parts.append(rows.assign(network=name, protocol="grouped", repeat=repeat, fold=fold, path=rows["image_id"],
                                 p_cancer=p, p_normal=1 - p))
    return pd.concat(parts, ignore_index=True).astype({"group": str})


def compared(predictions: pd.DataFrame, draws: int) -> None:
    scores = evaluate(predictions, CLASSES, "cancer", {}, draws, 0)
    result = {"protocols": scores, "titles": TITLES, "positive": "cancer", "classes": CLASSES}
    pairs = differences(predictions, NETWORKS, "cancer", dict.fromkeys(NETWORKS, 0.5))
    said(pairs, TITLES)
    for figure in (number_figure(result), roc_figure(result, predictions), pr_figure(result, predictions),
                   comparative_figure(result, NETWORKS), difference_figure(result, pairs, NETWORKS)):
        figure.canvas.draw()


if __name__ == "__main__":
    table = drawn()
    taken = [seconds(lambda: compared(table, 2000)) for _ in range(5)]
    save("comparison_seconds", [t / 60 for t in taken], "at most 1",
         "seconds of scores, intervals, tests and figures of 4 networks in 25 folds with 2,000 draws, by 60", seconds=taken)
    few, many = ([seconds(lambda draws=draws: evaluate(table, CLASSES, "cancer", {}, draws, 0)) for _ in range(5)]
                 for draws in (2000, 8000))
    save("bootstrap_is_linear", [b / a / 4 for a, b in zip(few, many, strict=True)], "at most 1.2",
         "seconds of all metrics with 8,000 draws by four times those with 2,000", seconds=[few, many])
