"""
The demo page in a real browser, Debian's packages chromium and chromium-driver, with the shipped digits and in color.

`NCSN_SCREENSHOTS=docs/images pytest -m slow tests/test_demo_in_browser.py` takes the screenshots of docs/demo.md.
"""

import base64
import io
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from networks import quiet_pipeline, small_unet
from PIL import Image

from ncsn_diffusers import NCSNPipeline, pretrained
from ncsn_diffusers.demo import serve
from ncsn_diffusers.sampling import make_generators

pytest.importorskip("selenium")
pytest.importorskip("gradio")
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,900"
)
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def pipe():
    pipe = NCSNPipeline.from_pretrained(pretrained("mnist"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def evaluations(pipe):
    """A list that grows with each evaluation of the network."""
    found = []
    pipe.unet.register_forward_hook(lambda *_: found.append(None))
    return found


@pytest.fixture(scope="module")
def url(pipe, evaluations):
    with serve(pipe) as url:
        while not (evaluations and is_idle(evaluations)):  # what the page opens with
            pass
        yield url


def open_browser(folder, width=1280):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={folder}"):
        options.add_argument(flag)
    if width < 500:
        metrics = {"width": width, "height": 900, "pixelRatio": 1.0, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    return webdriver.Chrome(options, Service(DRIVER))


@pytest.fixture
def page(url, tmp_path):
    driver = open_browser(tmp_path / "profile")
    try:
        driver.get(url)
        page = Page(driver)
        page.wait(lambda: page.find(".figures"))
        yield page
    finally:
        driver.quit()


class Page:
    def __init__(self, driver):
        self.driver = driver

    def wait(self, condition):
        end = time.monotonic() + PATIENCE
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < end, self.text()
            time.sleep(0.2)

    def text(self):
        return self.driver.find_element("css selector", "body").text

    def find(self, selector):
        """What is visible, and so of the open tab."""
        return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

    def buttons(self, text):
        return [button for button in self.find("button") if button.text.strip() == text]

    def click(self, text):
        self.wait(lambda: self.buttons(text))[-1].click()  # the tab of the same name comes before

    def open_tab(self, text):
        self.wait(lambda: [tab for tab in self.find("button[role=tab]") if tab.text.strip() == text])[0].click()

    def field(self, label):
        return next(field for field in self.find("label") if field.text.startswith(label))

    def fill(self, label, value):
        entry = self.field(label).find_element("css selector", "input")
        self.driver.execute_script("arguments[0].select()", entry)
        entry.send_keys(str(value))
        self.driver.execute_script("arguments[0].blur()", entry)  # the next field, by the tab key, may open a list

    def status(self):
        texts = [element.text.strip() for element in self.find(".status")]
        return max(texts, key=len, default="")  # an element and what surrounds it

    def images(self, selector=".figures img"):
        """What the browser shows there, each as an array."""
        arrays = []
        for element in self.find(selector):
            assert self.driver.execute_script("return arguments[0].naturalWidth", element) > 0
            data = element.get_attribute("src").partition("base64,")[2]
            arrays.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int))
        return arrays

    def captions(self):
        return [element.text for element in self.find("figcaption")]

    def screenshot(self, name):
        if "NCSN_SCREENSHOTS" in os.environ:
            time.sleep(1)
            self.driver.save_screenshot(Path(os.environ["NCSN_SCREENSHOTS"], name))


def draw(pipe, levels, num_images=1):
    """What the page draws from seed 0 on, with the classes in turn."""
    labels = {} if pipe.num_classes is None else {"class_labels": list(range(num_images))}
    generators = make_generators(0, range(num_images))
    images = pipe(batch_size=num_images, num_inference_steps=levels, generator=generators, **labels).images
    return np.stack(images).astype(int)


def is_idle(evaluations):
    number = len(evaluations)
    time.sleep(3)  # during which a chain would go on
    return len(evaluations) == number


def test_the_page_opens_with_images_and_draws_goes_back_stops_and_refuses(page, pipe, evaluations):
    levels = pipe.config.num_inference_steps
    assert page.captions() == ["denoised", "noisy"]
    np.testing.assert_allclose(page.images()[:9], draw(pipe, levels, 9), atol=1)

    page.fill("Evaluations", 12)
    page.fill("Images", 4)
    page.click("Draw")
    page.wait(lambda: page.status() == "Done.")
    assert len(page.images()) == 8
    np.testing.assert_allclose(page.images()[:4], draw(pipe, 12, num_images=4), atol=1)

    slider = page.find("input[type=range]")[0]
    page.wait(lambda: slider.get_attribute("max") == "12")
    slider.send_keys(*[webdriver.Keys.LEFT] * 5)
    page.wait(lambda: "After step 7 of 12." in page.text())
    page.screenshot("demo_draw.png")
    slider.send_keys(webdriver.Keys.HOME)
    page.wait(lambda: "After step 1 of 12." in page.text())
    page.wait(lambda: np.std(page.images()[4:]) > 100)  # noise, clipped to black and white
    assert np.std(page.images()[:4]) < 80  # the means of the classes, about

    page.fill("Evaluations", 200)
    page.click("Draw")
    page.wait(lambda: page.status().startswith("Step "))
    page.click("Stop")
    page.wait(lambda: page.status().startswith("Stopped at step "))
    stopped = int(page.status().split()[3])
    assert 1 <= stopped < 200
    assert is_idle(evaluations)
    assert page.status() == f"Stopped at step {stopped} of 200."
    # the server is free again at once
    page.fill("Evaluations", 3)
    page.click("Draw")
    page.wait(lambda: page.status() == "Done.")

    # one sentence, at the field that is wrong, which goes with the next action
    page.fill("Evaluations", 0)
    sentence = "Evaluations must be a whole number from 1 to 200, not 0."
    for _ in range(2):
        page.click("Draw")
        page.wait(lambda: sentence in page.field("Evaluations").text)
    assert page.text().count("must be") == 1
    page.fill("Evaluations", 4)
    page.wait(lambda: "must be" not in page.text())
    seed = page.field("Seed").find_element("css selector", "input")
    page.click("🎲")
    page.wait(lambda: seed.get_attribute("value") != "0")

    page.click("Only class 9")
    page.wait(lambda: page.status() == "Done." and len(page.images()) == 18)
    assert page.field("Evaluations").find_element("css selector", "input").get_attribute("value") == str(levels)

    before = len(evaluations)
    page.fill("Evaluations", 200)
    page.click("Draw")
    page.wait(lambda: page.status().startswith("Step "))
    assert not is_idle(evaluations)
    page.driver.get("about:blank")  # who leaves ends the run, too
    page.wait(lambda: is_idle(evaluations))
    assert len(evaluations) - before < 200


def paint(page, *path):
    """A stroke on the painter, from one pair of shares of its width and height to the next."""
    canvas = page.wait(lambda: page.find("canvas"))[0]
    width, height = canvas.size["width"], canvas.size["height"]
    points = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in path]
    mouse = webdriver.ActionChains(page.driver, duration=30)
    mouse.move_to_element_with_offset(canvas, *points[0]).click_and_hold()
    for a, b in itertools.pairwise(points):
        mouse.move_by_offset(b[0] - a[0], b[1] - a[1])
    mouse.release().perform()


def test_a_mask_is_painted(page, pipe):
    example = draw(pipe, pipe.config.num_inference_steps)[0]
    page.open_tab("Inpaint")
    page.wait(lambda: page.captions() == ["completion 1", "completion 2", "completion 3"])
    changed = np.stack([np.abs(completion - example) > 1 for completion in page.images()])
    assert not changed[:, :14].any() and changed[:, 14:].any((1, 2)).all()  # the lower half is painted at first

    page.screenshot("demo_inpaint.png")
    page.click("Clear")
    page.click("Inpaint")
    page.wait(lambda: page.status().startswith("Nothing is painted: paint over"))
    paint(page, (0.1, 0.3), (0.9, 0.3))
    page.fill("Noise levels", 15)
    page.click("Inpaint")
    page.wait(lambda: page.status() == "Done." and page.captions()[0] == "completion 1")
    completions = page.images()
    changed = np.stack([np.abs(completion - example) > 1 for completion in completions])
    assert not changed[:, 12:].any() and not changed[:, :4].any()  # what lies outside of the stroke
    assert changed[:, 4:12].any((1, 2)).all()
    assert (completions[0] != completions[1]).any()


def test_the_fields_of_the_damage(page):
    page.open_tab("Restore")
    page.wait(lambda: page.captions() == ["image", "pixelated", "restored", "restored", "restored"])
    for damage, shown in (("pixelated", "Block"), ("blurred", "Blur"), ("noisy", None)):
        next(label for label in page.find("label") if label.text.strip() == damage).click()
        names = ("Block, in pixels", "Blur, in pixels")
        page.wait(
            lambda shown=shown, names=names: (
                [n for n in names if n in page.text()] == [n for n in names if shown and n.startswith(shown)]
            )
        )
    before = page.images(".chosen img")[0]
    page.find(".examples button")[3].click()
    page.wait(lambda: (page.images(".chosen img")[0] != before).any())
    page.click("Restore")
    page.wait(lambda: page.status() == "Done." and page.captions()[1] == "noisy")
    np.testing.assert_array_equal(page.images()[0], page.images(".chosen img")[0])


def test_a_phone(url, tmp_path):
    driver = open_browser(tmp_path / "profile", width=390)
    try:
        driver.get(url)
        page = Page(driver)
        page.wait(lambda: page.find(".figures"))
        for tab in ("Draw", "Inpaint", "Restore", "Compare"):
            page.open_tab(tab)  # all four are there
            figures = page.wait(lambda: page.find("figure"))
            boxes = [figure.rect for figure in figures]
            assert len({box["x"] for box in boxes}) == 1  # one column
            assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
            button = page.buttons(tab)[-1].rect
            assert 0 < boxes[0]["y"] - button["y"] < 200  # near the button
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.quit()


def test_color(tmp_path):
    pipe = quiet_pipeline(small_unet(channels=3, out_channels=3, sample_size=16))
    driver = open_browser(tmp_path / "profile")
    try:
        with serve(pipe) as url:
            driver.get(url)
            page = Page(driver)
            page.wait(lambda: page.find(".figures"))
            assert "Class" not in page.text()
            np.testing.assert_array_equal(page.images()[:9], draw(pipe, 50, 9))
            page.open_tab("Inpaint")
            example = page.wait(lambda: page.images(".paper img"))[0]
            page.click("Clear")
            paint(page, (0.1, 0.1), (0.3, 0.1))
            page.fill("Noise levels", 3)
            page.click("Inpaint")
            page.wait(lambda: page.status() == "Done.")
            changed = np.stack([(np.abs(completion - example) > 1).any(-1) for completion in page.images()])
            assert changed[:, :4, :8].any((1, 2)).all() and not changed[:, 4:].any() and not changed[:, :, 8:].any()
            page.open_tab("Restore")
            page.wait(lambda: len(page.captions()) == 5)
            assert np.abs(np.diff(page.images()[1].reshape(4, 4, 4, 4, 3), axis=1)).max() == 0  # blocks of 4 × 4
            page.open_tab("Compare")
            page.wait(lambda: len(page.captions()) == 3)
    finally:
        driver.quit()


@pytest.mark.parametrize("width", [1280, 390])
def test_fields(width, tmp_path):
    pipe = NCSNPipeline.from_pretrained(pretrained("temperature"))
    pipe.set_progress_bar_config(disable=True)
    driver = open_browser(tmp_path / "profile", width)
    try:
        with serve(pipe) as url:
            driver.get(url)
            page = Page(driver)
            page.wait(lambda: page.captions() == ["denoised", "noisy"])
            page.open_tab("Measure")
            page.wait(lambda: len(page.captions()) == 6)
            if width == 1280:
                page.screenshot("demo_fields.png")
            page.fill("Noise", 100)
            page.click("Measure")
            page.wait(lambda: "Noise must be a number from 0 to 17, not 100." in page.field("Noise, in K").text)
            page.fill("Noise", 0.5)
            page.fill("Stations", 20)
            page.click("Measure")
            page.wait(lambda: page.status() == "Done." and page.captions()[0] == "truth and 20 stations")
            assert "right is 80%" in page.text() and len(page.images()) == 6
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            page.open_tab("Compare")
            page.wait(lambda: len(page.captions()) == 3)
    finally:
        driver.quit()


def test_no_image_is_broken(url, tmp_path):
    """Two visitors at once with the same seeds; `NCSN_VISITS` is the number of visits of each."""
    found, faults = [], []

    def visit(name):
        try:
            for i in range(int(os.environ.get("NCSN_VISITS", 2))):
                driver = open_browser(tmp_path / f"{name}{i}")
                try:
                    driver.get(url)
                    page = Page(driver)
                    page.wait(lambda page=page: page.find(".figures"))
                    page.fill("Evaluations", 10)
                    page.click("Draw")
                    page.wait(lambda page=page: page.status() == "Done.")
                    found.append(len(page.images()))  # which looks whether each is shown
                finally:
                    driver.quit()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=visit, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert set(found) == {18}


def test_the_browser_asks_nobody_else(page, url):
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names
    assert [name for name in names if not name.startswith((url, "data:", "blob:"))] == []
