"""
The demo page in a real browser, Debian's packages chromium and chromium-driver, with the shipped digits.

`NCSN_SCREENSHOTS=docs/images pytest -m slow tests/test_demo_in_browser.py` takes the screenshots of docs/demo.md.
"""

import io
import os
import shutil
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ncsn_diffusers import NCSNPipeline, pretrained
from ncsn_diffusers.demo import serve
from ncsn_diffusers.images import make_grid
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
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1200,900"
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
def url(pipe):
    with serve(pipe) as url:
        yield url


@pytest.fixture
def page(url, tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        driver.get(url)
        page = Page(driver)
        page.wait(lambda: page.buttons("Draw"))
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
        self.buttons(text)[-1].click()  # the tab of the same name comes before

    def fill(self, label, value):
        field = next(field for field in self.find("label") if field.text.startswith(label))
        entry = field.find_element("css selector", "input")
        self.driver.execute_script("arguments[0].select()", entry)
        entry.send_keys(str(value))
        self.driver.execute_script("arguments[0].blur()", entry)  # the next field, by the tab key, may open a list

    def status(self):
        texts = [element.text.strip() for element in self.find(".status")]
        return max(texts, key=len, default="")  # an element and what surrounds it

    def image(self, element):
        with urllib.request.urlopen(element.get_attribute("src")) as response:
            return np.asarray(Image.open(io.BytesIO(response.read())))

    def images(self, selector):
        return [self.image(element) for element in self.find(selector)]

    def screenshot(self, name):
        if "NCSN_SCREENSHOTS" in os.environ:
            time.sleep(1)
            self.driver.save_screenshot(Path(os.environ["NCSN_SCREENSHOTS"], name))


def draw(pipe, levels, num_images=1):
    """What the page draws from seed 0 on, with the classes in turn."""
    arguments = {"class_labels": list(range(num_images)), "generator": make_generators(0, range(num_images))}
    images = pipe(batch_size=num_images, num_inference_steps=levels, **arguments).images
    return np.asarray(make_grid(images)).astype(int)


def is_idle(evaluations):
    number = len(evaluations)
    time.sleep(3)  # during which a chain would go on
    return len(evaluations) == number


def test_a_digit_is_drawn_a_run_stopped_a_bad_number_refused(page, pipe, evaluations):
    page.fill("Evaluations", 12)
    page.click("Draw")
    page.wait(lambda: page.status() == "Done.")
    page.wait(lambda: len(page.find(".image-frame img")) == 2)
    denoised, noisy = page.images(".image-frame img")
    np.testing.assert_allclose(denoised, draw(pipe, 12, num_images=4), atol=1)
    assert noisy.shape == (56, 56)

    slider = page.find("input[type=range]")[0]
    assert slider.get_attribute("max") == "12"
    slider.send_keys(*[webdriver.Keys.LEFT] * 5)
    page.wait(lambda: "After step 7 of 12." in page.text())
    page.screenshot("demo_draw.png")
    slider.send_keys(webdriver.Keys.HOME)
    page.wait(lambda: "After step 1 of 12." in page.text())
    page.wait(lambda: np.std(page.images(".image-frame img")[1]) > 100)  # noise, clipped to black and white
    assert np.std(page.images(".image-frame img")[0]) < 80  # the means of the classes, about

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

    page.fill("Evaluations", 0)
    page.click("Draw")
    sentence = "Evaluations must be a whole number from 1 to 200, not 0."
    page.wait(lambda: sentence in page.text())

    before = len(evaluations)
    page.fill("Evaluations", 200)
    page.click("Draw")
    page.wait(lambda: page.status().startswith("Step "))
    assert not is_idle(evaluations)
    page.driver.get("about:blank")  # who leaves ends the run, too
    page.wait(lambda: is_idle(evaluations))
    assert len(evaluations) - before < 200


def test_a_mask_is_painted(page, pipe):
    page.click("Inpaint")
    page.click("Draw example")
    canvas = page.wait(lambda: page.find("canvas"))[0]
    example = draw(pipe, pipe.config.num_inference_steps)
    page.wait(lambda: not page.find(".placeholder") and "processing" not in page.text())
    time.sleep(3)  # until the image is on the canvas
    mouse = webdriver.ActionChains(page.driver, duration=30)
    mouse.move_to_element_with_offset(canvas, -110, 60).click_and_hold()
    for _ in range(3):
        mouse.move_by_offset(220, 12).move_by_offset(-220, 12)
    mouse.release().perform()
    page.fill("Noise levels", 15)
    page.buttons("Inpaint")[-1].click()
    page.wait(lambda: page.status() == "Done.")
    page.screenshot("demo_inpaint.png")
    completions = page.images(".grid-container img")
    assert len(completions) == 3
    changed = np.stack([np.abs(completion - example) > 1 for completion in map(np.int64, completions)])
    assert not changed[:, :14].any()  # above the stroke, which keeps to the lower half
    assert changed[:, 14:].any((1, 2)).all()
    assert (completions[0] != completions[1]).any()


def test_the_browser_asks_nobody_else(page, url):
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names
    assert [name for name in names if not name.startswith((url, "data:", "blob:"))] == []
