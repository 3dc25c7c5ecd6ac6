"""A challenger becomes champion only whole and not inferior; the way back gives the same bytes."""

import shutil

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from deeptumornet.export import Engine
from deeptumornet.retraining import not_inferior, promote, rollback
from deeptumornet.study import StudyError, read_json, sha256, write_json

GOOD = {"passes": True, "why": "not inferior"}


@pytest.fixture
def rivals(champion, tmp_path):
    shutil.copytree(champion, tmp_path / "champion")
    shutil.copytree(champion, tmp_path / "challenger")
    card = read_json(tmp_path / "challenger" / "card.json")
    write_json(tmp_path / "challenger" / "card.json", card | {"version": "challeng"})
    return tmp_path / "champion", tmp_path / "challenger"


def predictions(seed: int, strength: float, n: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return pd.DataFrame({"image_id": [f"{i:04d}" for i in range(n)], "group": np.arange(n) // 2 * 2 + y, "label": np.where(y, "t", "n"),
                         "p_t": 1 / (1 + np.exp(-strength * y - rng.normal(size=n)))})


def test_a_worse_challenger_seldom_passes_and_an_equal_one_is_let_through():
    worse = sum(not_inferior(predictions(2 * k, 2), predictions(2 * k + 1, 1.5), "t", draws=200)["passes"] for k in range(40))
    assert worse <= 4, "0.07 under the champion's AUC of 0.92 lies past the margin: at most 2.5 % in the long run"
    assert not_inferior(predictions(0, 2), predictions(0, 2), "t", draws=200)["passes"]


def test_promotion_and_the_way_back(rivals):
    champion, challenger = rivals
    first = Engine(champion).card["version"]
    before = {p.name: sha256(p) for p in champion.iterdir()}
    assert promote(champion, challenger, GOOD) == "challeng" == Engine(champion).card["version"]
    assert rollback(champion) == first and {p.name: sha256(p) for p in champion.iterdir()} == before
    history = read_json(champion.parent / "champions" / "history.json")
    assert [(s["from"], s["to"]) for s in history] == [(first, "challeng"), ("challeng", first)]
    with pytest.raises(StudyError, match="nothing to go back to"):
        rollback(champion)


def test_what_is_never_promoted(rivals):
    champion, challenger = rivals
    before = sha256(champion / "card.json")
    with pytest.raises(StudyError, match="it may be worse.*the champion stays"):
        promote(champion, challenger, {"passes": False, "why": "it may be worse"})
    with FileLock(champion.parent / ".champion.lock"), pytest.raises(StudyError, match="another promotion or rollback is at work"):
        promote(champion, challenger, GOOD)
    write_json(challenger / "card.json", read_json(challenger / "card.json") | {"positive": "normal"})
    with pytest.raises(StudyError, match="positive normal are not the champion's"):
        promote(champion, challenger, GOOD)
    (challenger / "engine.tflite").unlink()
    with pytest.raises(StudyError, match="is missing or is not the file that card.json names"):
        promote(champion, challenger, GOOD)
    assert sha256(champion / "card.json") == before


def test_a_kept_champion_whose_file_is_gone(rivals):
    champion, challenger = rivals
    first = Engine(champion).card["version"]
    promote(champion, challenger, GOOD)
    (champion.parent / "champions" / first / "engine.tflite").unlink()
    with pytest.raises(StudyError, match="is missing or is not the file"):
        rollback(champion)
    assert Engine(champion).card["version"] == "challeng", "the running champion is untouched"
