"""The page as a visitor meets it: a real browser, a real server on loopback, and the tiny champion."""

import base64
import shutil
import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest
import requests
from conftest import encoded
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from werkzeug.serving import make_server

from deeptumornet.dicom import window, write_dicom
from deeptumornet.serving import create_app

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: install Debian's chromium and "
                                "chromium-driver to run these")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("log") / "log.sqlite"


@pytest.fixture(scope="module")
def address(champion, log):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPTUMORNET_PREDICTION_LOG", str(log))
        patch.setenv("DEEPTUMORNET_FEEDBACK_TOKEN", "page's token")
        server = make_server("127.0.0.1", 0, create_app(champion), threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["1280", "390"])
def browser(request, address, tmp_path):
    width, scheme = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    driver.get(address)
    yield driver
    driver.quit()


def shown(browser, name: str):
    """The element with this id, once it is visible."""
    return WebDriverWait(browser, 60).until(
        lambda b: next((e for e in b.find_elements(By.ID, name) if e.is_displayed()), None))


def upload(browser, path, pixels: np.ndarray | bytes) -> None:
    path.write_bytes(pixels if isinstance(pixels, bytes) else encoded(pixels))
    browser.find_element(By.ID, "file").send_keys(str(path))


def until(browser, holds) -> None:
    WebDriverWait(browser, 60).until(lambda _: holds())


def complaints(browser) -> list[str]:
    """What the browser's console says, less the line that Chromium writes for every answer over 399."""
    return [e["message"] for e in browser.get_log("browser") if "api/v1/predict" not in e["message"]]


def test_a_slice_gets_its_answer(browser, address, phantoms, tmp_path):
    upload(browser, tmp_path / "a slice.png", window(phantoms[1]))
    shown(browser, "result")
    assert shown(browser, "class").text in ("normal", "adenocarcinoma")
    assert shown(browser, "probability").text.endswith("%")
    assert "threshold of 30.0 %" in shown(browser, "decision").text
    assert "of 100 slices" in shown(browser, "meaning").text
    assert "drawn phantoms" in shown(browser, "warnings").text
    for name in ("picture", "heat"):
        WebDriverWait(browser, 20).until(lambda b, n=name: b.execute_script(
            "return document.getElementById(arguments[0]).naturalWidth", n) > 0)
    box = [browser.find_element(By.ID, name).rect for name in ("picture", "heat")]
    assert all(abs(box[0][k] - box[1][k]) < 1 for k in box[0]), "the heat map lies on the slice"

    browser.execute_script("const o = document.getElementById('opacity'); o.value = 20;"
                           "o.dispatchEvent(new Event('input', {bubbles: true}))")
    assert browser.find_element(By.ID, "heat").value_of_css_property("opacity") == "0.2"
    assert browser.find_element(By.ID, "opacity-value").text == "20 %"

    limits = shown(browser, "model").text
    for told in ("0.910 (95 % interval 0.840 to 0.960)", "90 slices of 30 patients", "thumbnail: 0.700", "Tiny"):
        assert told in limits
    assert "drawn phantoms" in shown(browser, "trained").text
    assert "no medical device" in browser.find_element(By.CSS_SELECTOR, ".notice").text

    upload(browser, tmp_path / "another.png", window(phantoms[0]))
    WebDriverWait(browser, 60).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#history li")) == 2)
    browser.find_elements(By.CSS_SELECTOR, "#history button")[1].click()
    assert browser.find_element(By.ID, "caption").text == "a slice.png"

    assert complaints(browser) == []
    asked = browser.execute_script("return performance.getEntries().map(e => e.name).filter(n => /^(https?|wss?):/.test(n))")
    assert asked and all(name.startswith(f"{address}/") for name in asked)
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "nothing to scroll sideways"


def test_an_unreadable_file_gets_its_sentence(browser, phantoms, tmp_path):
    upload(browser, tmp_path / "note.png", b"a note")
    assert "not a PNG, JPEG or DICOM picture" in shown(browser, "error").text
    assert not browser.find_element(By.ID, "result").is_displayed()
    upload(browser, tmp_path / "black.png", np.zeros((99, 99), np.uint8))
    WebDriverWait(browser, 60).until(lambda b: "lung field" in b.find_element(By.ID, "error").text)
    upload(browser, tmp_path / "good.png", window(phantoms[0]))
    shown(browser, "result")
    assert not browser.find_element(By.ID, "error").is_displayed()
    assert complaints(browser) == []


def test_several_slices_and_one_that_is_none(browser, phantoms, tmp_path):
    names = ["one.png", "two.png", "note.png"]
    for name, content in zip(names, [encoded(window(phantoms[0])), encoded(window(phantoms[1])), b"a note"], strict=True):
        (tmp_path / name).write_bytes(content)
    browser.find_element(By.ID, "file").send_keys("\n".join(str(tmp_path / name) for name in names))
    assert "Note.png: the uploaded file is not a PNG" in shown(browser, "error").text
    assert shown(browser, "caption").text == "two.png"
    assert [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#history .name")] == ["two.png", "one.png"]
    assert complaints(browser) == []


def test_a_series_is_walked_through_by_keyboard(browser, champion, phantoms, tmp_path):
    client = create_app(champion).test_client()
    places = [7.5, -2.5, 2.5]
    for k, place in enumerate(places):
        write_dicom(tmp_path / f"{k}.dcm", phantoms[k], "Doe^Jane", place, 1.4, "one")
    browser.find_element(By.ID, "file").send_keys("\n".join(str(tmp_path / f"{k}.dcm") for k in range(3)))
    assert shown(browser, "series-said").text.startswith("3 slices, ")
    told = [client.post("/api/v1/predict", data=(tmp_path / f"{k}.dcm").read_bytes()).json["probability"] for k in (1, 2, 0)]
    top = int(np.argmax(told))
    assert f"slice {top + 1}; mean: {100 * np.mean(told):.1f} %" in browser.find_element(By.ID, "series-said").text
    walk = browser.find_element(By.ID, "walk")
    assert walk.get_property("value") == str(top + 1)
    walk.send_keys(Keys.HOME)
    for k, name in enumerate(("1.dcm", "2.dcm", "0.dcm")):
        until(browser, lambda n=name: browser.find_element(By.ID, "caption").text == n)
        assert f"slice {k + 1} of 3, {sorted(places)[k]} mm, " in walk.get_attribute("aria-valuetext")
        assert browser.find_element(By.ID, "walk-value").text == f"{k + 1} of 3"
        walk.send_keys(Keys.RIGHT)
    assert complaints(browser) == []


def test_by_keyboard_and_by_name(browser, phantoms, tmp_path):
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.get_attribute("id") == "file"
    for name in ("b.png", "a.png"):
        upload(browser, tmp_path / name, window(phantoms[1]))
        until(browser, lambda n=name: shown(browser, "caption").text == n)
    reached = []
    for _ in range(4):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.switch_to.active_element)
    assert reached[0].get_attribute("id") == "opacity" and [e.text.split()[0] for e in reached[1:]] == ["Tell", "a.png", "b.png"]
    reached[3].send_keys("\n")
    until(browser, lambda: shown(browser, "caption").text == "b.png")
    nodes = [n for n in browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"] if not n["ignored"]]
    roles = ("button", "slider", "image", "heading")
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if n["role"]["value"] in roles]
    assert len(named) > 8 and all(name for _, name in named), named


def test_the_true_class_is_told_and_corrected(browser, log, phantoms, tmp_path):
    upload(browser, tmp_path / "a.png", window(phantoms[1]))
    shown(browser, "feedback").find_element(By.TAG_NAME, "summary").click()
    kept = browser.find_element(By.ID, "kept")
    def tell(label: str, token: str) -> None:
        Select(shown(browser, "label")).select_by_visible_text(label)
        shown(browser, "token").clear()
        shown(browser, "token").send_keys(token, Keys.ENTER)
    shown(browser, "who").send_keys("A reader")
    tell("normal", "a guess")
    until(browser, lambda: "needs the header" in kept.text)
    for label in ("normal", "adenocarcinoma"):
        tell(label, "page's token")
        until(browser, lambda said=label: kept.text.startswith(f"Kept: {said}."))
    with closing(sqlite3.connect(log)) as file:
        said = file.execute("SELECT who, label FROM feedback ORDER BY number").fetchall()
    assert said[-2:] == [("A reader", "normal"), ("A reader", "adenocarcinoma")]


def drop(browser, *paths) -> None:
    """Files and folders let go over the page, as a visitor's system does it."""
    place = browser.find_element(By.ID, "drop").rect
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    at = {"x": place["x"] + 20, "y": place["y"] + 20, "data": data}
    for kind in ("dragEnter", "dragOver"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **at})
    assert "over" in browser.find_element(By.ID, "drop").get_attribute("class")
    browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": "drop", **at})
    until(browser, lambda: "over" not in browser.find_element(By.ID, "drop").get_attribute("class"))


def test_files_and_a_folder_are_dropped(browser, phantoms, tmp_path):
    series = tmp_path / "a scan"
    (series / "more").mkdir(parents=True)
    for k, place in enumerate((7.5, -2.5, 2.5)):
        write_dicom((series / "more" if k == 2 else series) / f"{k}", phantoms[k], "Doe^Jane", place, 1.4, "one")
    (series / ".DS_Store").write_bytes(b"hidden")
    drop(browser, series)
    assert shown(browser, "series-said").text.startswith("3 slices, ")
    names = [tmp_path / "two.png", tmp_path / "one.png"]
    for path, hu in zip(names, phantoms, strict=False):
        path.write_bytes(encoded(window(hu)))
    drop(browser, *names)
    until(browser, lambda: browser.find_element(By.ID, "status").text == "2 files: done.")
    assert not browser.find_element(By.ID, "error").is_displayed() and complaints(browser) == []


def test_what_a_script_drops_is_read_too(browser, phantoms):
    browser.execute_script("""
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "carried.png"));
        window.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        """, base64.b64encode(encoded(window(phantoms[1]))).decode())
    assert shown(browser, "caption").text == "carried.png"


def test_the_service_explains_itself(browser, address):
    browser.get(f"{address}/docs")
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#calls section"))
    document = requests.get(f"{address}/openapi.json", timeout=60).json()
    told = [f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item if method != "parameters"]
    assert [heading.text for heading in browser.find_elements(By.CSS_SELECTOR, "#calls h2")] == told and len(told) >= 16
    job = next(card for card in browser.find_elements(By.CSS_SELECTOR, "#calls section") if "GET /api/v1/jobs/{job}\n" in card.text)
    assert "job (path)" in job.text and not browser.find_elements(By.CLASS_NAME, "error") and complaints(browser) == []
    asked = browser.execute_script("return performance.getEntries().map(e => e.name).filter(n => /^(https?|wss?):/.test(n))")
    assert all(name.startswith(f"{address}/") for name in asked)
    width = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1], "nothing to scroll sideways"


def test_a_service_with_a_token_asks_for_it(browser, champion, phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPTUMORNET_TOKENS", "of-the-service")
    server = make_server("127.0.0.1", 0, create_app(champion), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser.get(f"http://127.0.0.1:{server.port}")
    for token, told in (("a guess", "not the service's token"), ("of-the-service", "interval")):
        shown(browser, "access").clear()
        shown(browser, "access").send_keys(token, Keys.ENTER)
        until(browser, lambda text=told: text in browser.find_element(By.TAG_NAME, "aside").text)
    until(browser, lambda: not browser.find_element(By.ID, "gate").is_displayed())
    upload(browser, tmp_path / "a.png", window(phantoms[1]))
    assert shown(browser, "probability").text.endswith("%") and not browser.find_element(By.ID, "error").is_displayed()
    assert browser.execute_script("return [localStorage.length, sessionStorage.length, document.cookie.length]") == [0, 0, 0]
    server.shutdown()


CONTRASTS = """
const light = (colour) => {
  const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
return arguments[0].map((name) => {
  const text = document.querySelector(name);
  let ground = text;
  while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const [a, b] = [light(getComputedStyle(text).color), light(getComputedStyle(ground).backgroundColor)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
});"""


def test_text_stands_out_from_its_ground(browser, tmp_path):
    upload(browser, tmp_path / "note.png", b"a note")
    shown(browser, "error")
    shown(browser, "trained")
    texts = ["h1", "header p", "#hint", ".notice", ".button", "dt", "dd", ".quiet", "#error", "#trained"]
    contrasts = browser.execute_script(CONTRASTS, texts)
    assert min(contrasts) >= 4.5, "what WCAG 2.2 asks for, in light and dark"
