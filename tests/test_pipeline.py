"""The pipeline as a stranger runs it: a copy of the project in a folder with spaces, profile smoke, `dvc repro`."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from deeptumornet.dicom import window
from deeptumornet.log import PredictionLog, image_statistics
from deeptumornet.phantom import draw_patient, slice_hu
from deeptumornet.preprocessing import read_slice
from deeptumornet.retraining import FEEDBACK, promote
from deeptumornet.study import open_study, read_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["collect", "preprocess", "train@vgg16", "tune", "finetune", "compare", "evidence", "cost", "controls", "paper", "explain",
          "export", "monitor", "readme", "report"]


class Project:
    def __init__(self, folder: Path):
        self.folder = folder
        tools = Path(sys.executable).parent
        self.env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(words, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def repro(self) -> dict[str, float]:
        """Run the whole pipeline; the seconds that each stage took."""
        running = subprocess.Popen(["dvc", "repro"], cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        said, began = [], {}
        for line in running.stdout:
            said.append(line)
            if line.startswith("Running stage"):
                began[line.split("'")[1]] = time.monotonic()
        assert running.wait() == 0, "".join(said)[-3000:]
        ends = [*list(began.values())[1:], time.monotonic()]
        return {stage: end - start for (stage, start), end in zip(began.items(), ends, strict=True)}

    def killed_after(self, stage: str, seconds: float) -> bool:
        """Repeat one stage and kill it, its notebook's kernel too, so many seconds after it began; whether it had not ended by itself."""
        running = subprocess.Popen(["dvc", "repro", "--force", "--single-item", stage], cwd=self.folder, env=self.env,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        for line in running.stdout:
            if line.startswith(">"):
                break
        try:
            running.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            time.sleep(2)  # the kernel leads a group of its own, and ends when it sees that its parent has gone
            return True

    def ran(self) -> list[str]:
        """The stages that `dvc repro` runs now, in order."""
        out = self.run("dvc", "repro").stdout
        return [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")]

    def params(self, change) -> None:
        file = self.folder / "params.yaml"
        content = yaml.safe_load(file.read_text())
        change(content)
        file.write_text(yaml.safe_dump(content, sort_keys=False))

    def results(self) -> dict[str, str]:
        """What the study found, bit by bit: every table, metric and prediction, not what a clock measured and what is advised by it."""
        reports = self.folder / "reports/smoke"
        files = [self.folder / "data/manifest.csv", *sorted(reports.rglob("*.csv")), *sorted((reports / "comparison").glob("*.json"))]
        return {str(f.relative_to(self.folder)): hashlib.sha256(untimed(f)).hexdigest() for f in files
                if f.parent.name not in ("cost", "recommendation", "export")}


def untimed(file: Path) -> bytes:
    """The file's bytes; of the trials' table, without the seconds that each took."""
    if file.name != "trials.csv":
        return file.read_bytes()
    return pd.read_csv(file, dtype=str).drop(columns="seconds").to_csv(index=False).encode()


def only(p: dict, *networks: str) -> None:
    """Leave these networks in the parameters; the first is tuned. The notebooks' own tests run all."""
    notebooks = p["networks"] | {"vgg16": "06a_vgg16"}
    p.update(profile="smoke", networks={name: notebooks[name] for name in networks}, tune_on=networks[0])
    for value in p["smoke"]["train"].values():
        if isinstance(value, dict):
            for other in set(value) - {*networks, "others"}:
                del value[other]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    folder = tmp_path_factory.mktemp("a place with spaces") / "deep tumor net"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if name != "dvc.lock" and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    made = Project(folder)
    made.params(lambda p: only(p, "resnet50", "vgg16"))
    ignored = folder / ".gitignore"
    ignored.write_text(ignored.read_text().replace("/reports/smoke/\n", ""))
    made.run("git", "init", "-q")
    made.run("git", "add", "-A")
    made.run("git", "-c", "user.name=test", "-c", "user.email=test@test.invalid", "commit", "-qm", "a copy")
    made.seconds = made.repro()
    return made


def test_it_runs_from_end_to_end(project):
    reports = project.folder / "reports/smoke"
    metrics = json.loads((reports / "comparison/metrics.json").read_text())
    assert {"holdout", "grouped", "published"} <= set(metrics["protocols"])
    for results in metrics["protocols"].values():
        assert {"resnet50", "vgg16", "majority", "metadata", "thumbnail"} <= set(results)
        for metric in results.values():
            assert metric["n"] > 0 and metric["n_groups"] > 0
            assert metric["auc"]["value"] is None or metric["auc"]["low"] <= metric["auc"]["value"] <= metric["auc"]["high"]
    assert (project.folder / "models/champion/card.json").is_file()
    executed = sorted(p.name for p in (reports / "notebooks").iterdir())
    assert len(executed) == 17 and all(p.endswith(".ipynb") and not p.startswith(".") for p in executed)
    assert "## What it is not" in (project.folder / "README.md").read_text()


def test_nothing_changed_nothing_runs(project):
    took = []
    while not took or (took[-1] >= 5 and len(took) < 9):  # other tests run beside this one
        start = time.monotonic()
        assert project.ran() == []
        took.append(time.monotonic() - start)
    assert took[-1] < 5


def test_dvc_commands_are_of_use(project):
    assert "holdout.resnet50.auc" in project.run("dvc", "metrics", "show").stdout
    assert "compare" in project.run("dvc", "dag").stdout
    assert Path(project.run("dvc", "plots", "show").stdout.strip().removeprefix("file://").replace("%20", " ")).is_file()
    project.params(lambda p: p["smoke"]["explain"].update(slices=3))
    assert "smoke.explain.slices" in project.run("dvc", "params", "diff").stdout
    project.params(lambda p: p["smoke"]["explain"].update(slices=2))


@pytest.mark.parametrize(("what", "file", "text", "expected"), [
    ("a notebook's line", "nbs/06a_vgg16.ipynb", ("\"## Training it\\n\"", "\"## Training it now\\n\""), {"train@vgg16"}),
    ("a module's line", "deeptumornet/explanation.py", ("import annotations", "import annotations  # changed"), {"explain", "export"}),
    ("a stage's parameter", "params.yaml", ("tolerance: 0.01", "tolerance: 0.02"), {"check", "export"}),
    ("a data file", "data/raw/adenocarcinoma/notes.txt", ("A note", "Another note"),
     {"collect", "preprocess", "controls", "explain", "growing"}),
])
def test_a_changed_line_reruns_what_it_must(project, what, file, text, expected):
    path = project.folder / file
    before = path.read_text()
    assert text[0] in before, f"{file} no longer has {text[0]}"
    path.unlink()
    path.write_text(before.replace(*text))
    try:
        assert set(json.loads(project.run("dvc", "status", "--json").stdout)) == expected
    finally:
        path.unlink()
        path.write_text(before)
    assert project.ran() == []


def test_kill_9_in_every_stage_then_repro_gives_the_same_bits(project):
    before = project.results()
    for stage in reversed(STAGES):  # what a stage reads is whole until those that read it have been killed
        middle = project.seconds[stage] / 2
        while not project.killed_after(stage, middle):  # it was slower when the other tests ran beside it
            middle /= 2
    project.run("dvc", "repro")
    assert project.results() == before and project.ran() == []
    half = [p for p in (project.folder / "reports").rglob("*") if p.name.startswith(".")]
    assert all(p.is_dir() and p.name.count(".") > 1 for p in half), "only the temporary folder of the killed stage may be left"


COMMIT = ("-c", "user.name=test", "-c", "user.email=test@test.invalid", "commit", "-qm")


@pytest.fixture(scope="module")
def committed(project) -> Project:
    """The project as a team shares it: dvc.lock and the reports are git's."""
    project.run("git", "add", "-A")
    project.run("git", *COMMIT, "results")
    return project


def test_a_colleagues_clone_pulls_data_models_and_reports(committed, s3, tmp_path):
    address, keys = s3
    committed.run("dvc", "remote", "add", "--local", "--default", "team", "s3://team/study")
    committed.run("dvc", "remote", "modify", "--local", "team", "endpointurl", address)
    committed.env |= keys
    committed.run("dvc", "push")
    committed.run("git", "clone", "-q", str(committed.folder), str(tmp_path / "theirs"))
    theirs = Project(tmp_path / "theirs")
    theirs.env |= keys
    shutil.copy(committed.folder / ".dvc/config.local", theirs.folder / ".dvc/config.local")
    theirs.run("dvc", "pull")
    assert "up to date" in theirs.run("dvc", "status").stdout, "every output has the hash that dvc.lock names"
    for folder in ("data", "models", "reports/smoke"):
        files = [p for p in (committed.folder / folder).rglob("*") if p.is_file() and "notebooks" not in p.parts]
        assert files
        for name in (file.relative_to(committed.folder) for file in files):
            assert (theirs.folder / name).read_bytes() == (committed.folder / name).read_bytes(), name


def test_repeats_of_the_folds_wait_in_a_queue_and_give_the_same_numbers(committed):
    predictions = "reports/smoke/networks/resnet50/predictions.csv"
    for repeat in (0, 1):
        committed.run("dvc", "exp", "run", "--queue", "--name", f"repeat-{repeat}", "-S", f"smoke.train.repeats=[{repeat}]",
                      "-S", "smoke.train.published_repeats=0", "-S", "smoke.train.seeds=0", "train@resnet50")
    committed.run("dvc", "queue", "start", "-j", "2")
    refs, status = [], ""
    while len(refs) < 2 and "Failed" not in status:  # pytest's own time-out ends it
        time.sleep(5)
        status = committed.run("dvc", "queue", "status").stdout
        refs = committed.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/repeat-*").stdout.split()
    assert len(refs) == 2, status + committed.run("dvc", "queue", "logs", "repeat-0", check=False).stdout[-3000:]
    tables = {ref.rsplit("/", 1)[1]: committed.run("git", "show", f"{ref}:{predictions}").stdout for ref in refs}
    grouped = {e: pd.read_csv(StringIO(table)).query("protocol == 'grouped'") for e, table in tables.items()}
    assert {e: sorted(set(table["repeat"])) for e, table in grouped.items()} == {"repeat-0": [0], "repeat-1": [1]}
    alone = pd.read_csv(committed.folder / predictions).query("protocol == 'grouped'")
    pd.testing.assert_frame_equal(grouped["repeat-0"].reset_index(drop=True), alone.reset_index(drop=True))
    assert len(grouped["repeat-1"]) == len(alone)


def test_a_challenger_from_feedback_to_its_branch(committed):
    """Last, for the project has other parameters and another champion then. One network is enough."""
    folder = committed.folder
    before = committed.run("git", "status", "--porcelain").stdout
    committed.params(lambda p: only(p, "resnet50"))  # no commit holds that, and the challenger's branch has to
    study = open_study("smoke", root=folder)
    (folder / "kept").mkdir()
    log, statistics = PredictionLog(folder / "log.sqlite", pause=60), image_statistics(np.zeros((8, 8), np.uint8))
    for k in range(4):
        slice_ = folder / "kept" / f"{k}.png"
        Image.fromarray(window(slice_hu(draw_patient(900 + k, bool(k % 2), 5), 0.0)[0])).save(slice_)
        one = log.record("v", read_slice(slice_, slice_.name).image_id, dict.fromkeys(study.classes, 0.5), statistics)
        log.feedback(one, study.classes[k % 2], "A", study.classes)
    log.close()
    (folder / "monitoring").mkdir()
    (folder / "monitoring/candidate.json").write_text('{"why": "the accuracy fell", "opened": "2026-11-25"}')
    said = committed.run("deeptumornet", "retrain", "--log", "log.sqlite", "--slices", "kept").stdout
    assert "4 of 4 verified slices used" in said and "the accuracy fell (since 2026-11-25)" in said
    version = said.split("challenger/")[1].split()[0].rstrip(";")
    made = Project(folder / ".retraining")
    assert "up to date" in made.run("dvc", "status", "export").stdout and made.run("git", "status", "--porcelain").stdout == ""
    assert f"{before} M params.yaml\n" == committed.run("git", "status", "--porcelain", "--untracked-files=no").stdout
    registry = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert version in {entry.tags["version"] for entry in registry.search_model_versions("name = 'deeptumornet'")}
    champion = folder / "models/champion"
    if "a new champion" not in said:
        against = read_json(champion / "card.json")["version"]
        promote(champion, folder / "models/challengers" / version, {"passes": True, "why": "a test", "against": against})
    committed.run("git", "checkout", "-q", "--", "params.yaml")
    committed.run("git", *COMMIT[:4], "merge", "-q", f"challenger/{version}")
    committed.run("dvc", "checkout")
    assert read_json(champion / "card.json")["version"] == version
    assert "up to date" in committed.run("dvc", "repro", "export").stdout and read_json(champion / "card.json")["version"] == version
    assert (pd.read_csv(folder / "data/manifest.csv")["source"] == "feedback").sum() == 4 == len(list((folder / FEEDBACK).glob("*/*.png")))
