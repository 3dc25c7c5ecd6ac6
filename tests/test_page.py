"""The page as a visitor meets it: a real browser, a real server on loopback, and the tiny champion."""

import shutil
import threading

import numpy as np
import pytest
from conftest import encoded
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from werkzeug.serving import make_server

from deeptumornet.dicom import window
from deeptumornet.serving import create_app

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: install Debian's chromium and "
                                "chromium-driver to run these")


@pytest.fixture(scope="module")
def address(champion):
    server = make_server("127.0.0.1", 0, create_app(champion), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()


@pytest.fixture(params=[1280, 390])
def browser(request, address, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": request.param, "height": 1000, "deviceScaleFactor": 1, "mobile": False})
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


def test_the_keyboard_reaches_the_file_input(browser):
    browser.find_element(By.TAG_NAME, "body").send_keys("\ue004")
    assert browser.switch_to.active_element.get_attribute("id") == "file"
