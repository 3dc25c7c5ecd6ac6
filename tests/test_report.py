"""The report page and what stands on it: self-contained, readable by everybody, and no kinder than the files it is read from."""

import re
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from selenium import webdriver
from test_page import CHROMIUM, DRIVER, FLAGS

from deeptumornet.controls import by_lot, permuted, subgroups
from deeptumornet.paper import cliques
from deeptumornet.report import CLAIM, NOT, TRIPOD, checklist, figure, provenance, render, table
from deeptumornet.study import Study, StudyError, open_study, run_notebook, save_figure, write_json

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "reports/demo/index.html"

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


@pytest.fixture
def page(tmp_path):
    wide = table(pd.DataFrame({f"a column with a long name {k}": [0.123456] for k in range(20)}), 'a "wide" table').data
    table_text = "\n".join("|" + f" {cell} |" * 12 for cell in ("a number", "--", "1,234,567"))
    cells = [new_markdown_cell("# The report\n\n> One line\n\n" + table_text),
             new_code_cell("2 * 21", outputs=[new_output("execute_result", {"text/plain": "42"})], metadata={"tags": []}),
             new_code_cell("profile = 'secret'", outputs=[new_output("stream", text="unseen")], metadata={"tags": ["injected-parameters"]}),
             new_code_cell("wide", outputs=[new_output("execute_result", {"text/html": wide})]),
             new_code_cell("dot", outputs=[new_output("execute_result", {"image/png": DOT}, metadata={"image/png": {"alt": "one dot"}})])]
    nbformat.write(new_notebook(cells=cells), tmp_path / "executed.ipynb")
    return render(tmp_path / "executed.ipynb", tmp_path / "index.html", "A <title>")


def test_the_page_needs_no_other_host_and_folds_its_code(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text) and "<script" not in text and "@import" not in text
    assert text.count("<details><summary>code</summary>") == 3 and "42" in text and "unseen" not in text
    assert 'alt="one dot"' in text and "A &lt;title&gt;" in text and 'a "wide" table' in text and "0.12<" in text


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: install Debian's chromium and chromium-driver to run this")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["a page of wide tables", "the demo's report"])
def test_the_page_fits_its_window(page, width, which, tmp_path):
    shown = page if which == "a page of wide tables" else REPORT
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
        browser.get(shown.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
        pictures = browser.execute_script("return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt, i.width])")
        assert pictures and all(whole and alt and wide <= width for whole, alt, wide in pictures), "each picture is there, fits and is told"
    finally:
        browser.quit()


@pytest.mark.parametrize("profile", ["demo", "paper"])
def test_each_artefact_of_a_checklist_is_in_the_repository(profile):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    study = open_study(profile, ROOT)
    for items in (CLAIM, TRIPOD):
        for row in checklist(items, study).to_dict("records"):
            assert row["answer"] == NOT or any(name == row["answer"] or name.startswith(f"{row['answer']}/") for name in tracked), row


def test_only_figures_that_show_slices_stay_out_of_the_repository():
    pictures = {f"reports/paper/figures/{name}.{kind}" for name in ("before_after", "examples", "heat_maps", "worst_errors")
                for kind in ("png", "pdf")}
    files = [*(ROOT / "reports/demo/figures").glob("*.png"), *(ROOT / "reports/demo/figures").glob("*.pdf")]
    drawn = {f"reports/paper/figures/{file.name}" for file in files} | pictures
    told = subprocess.run(["git", "check-ignore", "--no-index", *drawn], cwd=ROOT, capture_output=True, text=True)
    assert len(drawn) > 20 and set(told.stdout.split()) == pictures


def test_the_readme_is_what_the_reports_say(tmp_path):
    run_notebook("index", "demo", tmp_path)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run `dvc repro readme`, and commit README.md"


def test_a_figure_is_told_by_what_it_found(tmp_path):
    study = Study("smoke", tmp_path, tmp_path, {})
    drawn = Figure()
    drawn.subplots(1, 2)[1].set_title("p ≤ 0.05")
    drawn.suptitle("No network\nis better")
    save_figure(drawn, study, "two")
    assert figure(study, "two", "AUCs").alt == "AUCs. No network is better p ≤ 0.05"
    assert figure(study, "three", "AUCs").data == "*Not drawn in this run: AUCs.*"


def test_the_provenance_names_each_weights_file_by_its_sum(tmp_path):
    study = Study("smoke", tmp_path, tmp_path, {"smoke": {"collect": {"source": "a/folder"}}})
    write_json(study.report("networks", "resnet50", "card.json"), {"weights": "a.h5 (0123)", "weights_sha256": "0123" * 16})
    write_json(study.report("finetuned", "vgg16", "card.json"), {"weights": "none", "weights_sha256": None})
    result = {"data_sha256": "ab" * 32, "weights": {"resnet50": "", "finetuned/vgg16": ""}, "titles": {"resnet50": "ResNet50"}}
    text = provenance(study, result)
    assert f"| ResNet50 | a.h5 (0123) | {'0123' * 16} |" in text and "| finetuned/vgg16 | none | no file |" in text
    assert "a/folder" in text and "ab" * 32 in text


def test_a_notebook_that_was_not_run_is_no_report(tmp_path):
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "empty.ipynb")
    with pytest.raises(StudyError, match="holds no output"):
        render(tmp_path / "empty.ipynb", tmp_path / "index.html", "")
    assert not (tmp_path / "index.html").exists()


def test_a_checklist_answers_with_what_is_there(tmp_path):
    study = Study("smoke", tmp_path, tmp_path, {})
    assert {NOT} == set(checklist(CLAIM, study)["answer"]) == set(checklist(TRIPOD, study)["answer"]), "nothing made, nothing claimed"
    (tmp_path / "reports/smoke/audit").mkdir(parents=True)
    (tmp_path / "reports/smoke/audit/audit.json").write_text("{}")
    answers = checklist(CLAIM, study).set_index("item")["answer"]
    assert answers[answers != NOT].to_dict() == {"20 Level at which partitions are disjoint": "reports/smoke/audit/audit.json"}


def test_shuffled_labels_find_a_leak_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"group": np.arange(120).astype(str), "label": np.where(np.arange(120) % 2, "cancer", "normal")})
    x = rng.normal(size=(120, 8)).astype(np.float32) + (rows["label"] == "cancer").to_numpy()[:, None]
    found = permuted(x[:80], x[80:], rows[:80], rows[80:], "cancer", 100, 0)
    assert found["auc"] > 0.9 and found["p"] < 0.02 and abs(found["mean"] - 0.5) < 0.15
    noise = rng.normal(size=(120, 8)).astype(np.float32)
    assert permuted(noise[:80], noise[80:], rows[:80], rows[80:], "cancer", 100, 0)["p"] > 0.02


@given(copies=st.integers(1, 6), seed=st.integers(0, 50))
@settings(max_examples=6, deadline=None)
def test_what_the_lot_scores_grows_with_copies_under_the_published_protocol_only(copies, seed):
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(60).astype(str), copies)
    manifest = pd.DataFrame({"image_id": names, "group": names})
    score = by_lot(manifest, np.repeat(rng.normal(size=(60, 16)), copies, axis=0), 3, 10, seed).set_index("protocol")["accuracy"]
    assert abs(score["grouped"] - 0.5) < 0.2
    assert score["published"] > 0.85 or copies < 4
    assert score["published"] < 0.7 or copies > 1


def test_subgroups_say_why_where_there_is_no_auc():
    names = list("abcdef")
    rows = pd.DataFrame({"image_id": names, "group": names, "label": ["cancer"] * 3 + ["normal"] * 3})
    rows = rows.assign(format=["PNG"] * 3 + ["DICOM"] * 3, source="folder", window_center="", width=100, height=100, noise=1.0)
    rows["sharpness"] = range(6)
    found = subgroups(pd.DataFrame({"image_id": names, "p_cancer": [0.9, 0.8, 0.4, 0.5, 0.2, 0.1]}), rows, "cancer", 100, 0)
    of = found.set_index(["by", "part"])
    assert of.loc[("source", "folder"), "auc"] == pytest.approx(8 / 9)
    assert np.isnan(of.loc[("file type", "PNG"), "auc"]) and of.loc[("file type", "PNG"), "why"] == "one class has no slices"
    assert (found.groupby("by")["n"].sum() == 6).all()


@given(st.sets(st.frozensets(st.sampled_from("abcdef"), min_size=2, max_size=2)))
def test_bars_join_only_what_no_test_tells_apart(apart):
    runs = cliques("abcdef", apart)
    assert all(frozenset((a, b)) not in apart for run in runs for k, a in enumerate(run) for b in run[k + 1:])
    joined = {frozenset(pair) for run in runs for pair in zip(run, run[1:], strict=False)}
    assert joined == {frozenset(pair) for pair in zip("abcde", "bcdef", strict=True)} - apart
