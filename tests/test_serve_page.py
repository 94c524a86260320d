"""The page to try a server with, in a headless Chromium that is told what to do through its driver."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastdiff.benchmarks.server_process import REAL, server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine")
PAGE = Path(__file__).parent.parent / "fastdiff" / "serve" / "page.html"


def test_the_page_fetches_nothing_from_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert "http:" not in text and "https:" not in text and "//" not in text.replace("data://", "")


class Browser:
    """As much of WebDriver as is needed here (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, port):
        self.base = f"http://127.0.0.1:{port}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=900,900"]
        options = {"browserName": "chrome", "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
                   "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        made = self.call("POST", "", {"capabilities": {"alwaysMatch": options}})
        self.base += "/" + made["sessionId"]

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.base + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()[:2000]) from None

    def run(self, script):
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, script, seconds=30.0):
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < end, (script, self.run("return document.body.innerText"))
            time.sleep(0.05)
        return found

    def complaints(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@pytest.fixture(scope="module")
def driver():
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = next(line for line in process.stdout if "started successfully on port" in line)
        yield int(line.rstrip(".\n").rsplit(" ", 1)[1])
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.fixture
def browser(driver):
    made = Browser(driver)
    yield made
    made.call("DELETE", "")


@needs_chromium
def test_a_picture_is_drawn_in_the_browser(browser):
    with server(REAL, "--backend", "eager", FASTDIFF_MEASURE="0") as live:
        browser.call("POST", "/url", {"url": live.url})
        assert browser.until("document.forms[0].elements.sampler.length") > 30
        assert "digits, 28x28 pixels" in browser.run("return document.body.innerText")
        browser.run(
            "const f = document.forms[0].elements; f.class_label.value = '3'; f.seed.value = '7'; f.n.value = '2'"
        )
        browser.run("document.getElementById('go').click()")
        browser.until("document.querySelectorAll('figure.done').length == 2")
        sizes = browser.run("return [...document.images].map((i) => [i.naturalWidth, i.complete, i.alt])")
        assert sizes == [[28, True, "image with seed 7"], [28, True, "image with seed 8"]]
        body = json.dumps({"class_label": 3, "seed": 7}).encode()
        with urlopen(
            Request(live.url + "/v1/images/generations", body, {"content-type": "application/json"})
        ) as answer:
            expected = json.load(answer)["data"][0]["b64_json"]
        assert browser.run("return document.images[0].src").endswith(expected), "the API's image, bit for bit"
        if folder := os.environ.get("FASTDIFF_SCREENSHOTS"):
            shot = browser.call("GET", "/screenshot")
            (Path(folder) / "page.png").write_bytes(base64.b64decode(shot))
        browser.run("document.forms[0].elements.sampler.replaceChildren(new Option('magic', 'magic'))")
        browser.run("document.getElementById('go').click()")
        browser.until("document.getElementById('problem').textContent.includes('magic')")
        assert [line for line in browser.complaints() if "400 (Bad Request)" not in line] == []


@needs_chromium
def test_the_page_asks_for_a_key_where_one_is_needed_and_stops_when_told(browser):
    with server(REAL, "--backend", "eager", "--api-key-env", "KEY", KEY="secret", FASTDIFF_MEASURE="0") as live:
        browser.call("POST", "/url", {"url": live.url})
        browser.until("!document.getElementById('key-row').hidden")
        browser.run("document.forms[0].elements.key.value = 'secret'; document.getElementById('go').click()")
        browser.until("document.querySelectorAll('figure.done').length == 4")
        browser.run(
            "const f = document.forms[0].elements; f.num_inference_steps.value = '200'; f.sampler.value = 'rk4';"
            "document.getElementById('go').click()"
        )
        browser.until("document.querySelectorAll('figure.done').length == 0 && document.images.length == 4")
        browser.run("document.getElementById('stop').click()")
        browser.until("document.getElementById('state').textContent == 'stopped'")
        end = time.monotonic() + 30
        while 'outcome="Cancelled"' not in live.get("/metrics"):
            assert time.monotonic() < end
            time.sleep(0.1)


@needs_chromium
def test_the_page_asks_for_a_prompt_where_the_model_takes_one(browser, tmp_path):
    pytest.importorskip("transformers", reason="text encoders need transformers (pip install 'fastdiff[text]')")
    pytest.importorskip("diffusers", reason="tiny models are made by diffusers (pip install 'fastdiff[test]')")
    import tiny_pipelines as tiny

    tiny.stable_diffusion(tmp_path).save_pretrained(tmp_path / "model")
    with server(REAL, "--model", str(tmp_path / "model"), "--size", "16x24", "16x16", "--backend", "eager") as live:
        browser.call("POST", "/url", {"url": live.url})
        browser.until("document.forms[0].elements.sampler.length")
        hidden = browser.run("return ['label-row', 'size-row'].map((row) => document.getElementById(row).hidden)")
        assert hidden == [True, False]
        browser.run(
            "const f = document.forms[0].elements; f.prompt.value = 'a fox'; f.negative_prompt.value = 'fog';"
            "f.seed.value = '7'; f.size.value = '16x16'; f.num_inference_steps.value = '3';"
            "document.getElementById('go').click()"
        )
        browser.until("document.querySelectorAll('figure.done').length == 1")
        asked = {"prompt": "a fox", "negative_prompt": "fog", "seed": 7, "size": "16x16", "num_inference_steps": 3}
        body = Request(
            live.url + "/v1/images/generations", json.dumps(asked).encode(), {"content-type": "application/json"}
        )
        with urlopen(body) as answer:
            expected = json.load(answer)["data"][0]["b64_json"]
        assert browser.run("return document.images[0].src").endswith(expected)
        assert browser.complaints() == []
