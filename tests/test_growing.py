"""An archive is scored by Spark as the service would: each file once, an unreadable one with its sentence."""

import shutil

import pytest
from conftest import encoded

from deeptumornet.dicom import window
from deeptumornet.growing import score
from deeptumornet.serving import answer, open_engine
from deeptumornet.study import StudyError


def test_every_file_is_scored_once_as_the_service_would(champion, phantoms, tmp_path):
    pytest.importorskip("pyspark", reason="pyspark is not installed: pip install 'deeptumornet[spark]'")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java 17, and there is none")
    import pandas as pd

    archive, engine = tmp_path / "archive", open_engine(champion)
    (archive / "below").mkdir(parents=True)
    for k, hu in enumerate(phantoms):
        (archive / "below" / f"{k}.png").write_bytes(encoded(window(hu)))
    (archive / "note.txt").write_text("no slice")
    assert score(champion, str(archive), str(tmp_path / "scores"), "local[2]") == {"files": 5, "scored": 4, "refused": 1}
    said = pd.read_parquet(tmp_path / "scores").set_index("path")
    assert len(said) == said.index.nunique() == 5
    for path, row in said.iterrows():
        file = archive / path.split("/archive/")[1]
        if row["why"]:
            assert file.name == "note.txt" and "not a PNG, JPEG or DICOM" in row["why"]
        else:
            assert row["probability"] == pytest.approx(answer(engine, file.read_bytes())["probability"], abs=1e-4)
    with pytest.raises(StudyError, match="a target that is not"):
        score(champion, str(archive), str(tmp_path / "scores"), "local[2]")
