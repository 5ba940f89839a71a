"""
A brush for masks: an image of whole pixels on the page, and what is painted on it.

gradio's editor sends images, which the server has to decode, and lets anybody fill the server's memory with layers.
Here, the page sends a character for each pixel of the image.
"""

from types import ModuleType
from typing import Any

HTML = """
<div class="painter">
  <div class="paper" style="aspect-ratio: ${columns} / ${rows}">
    <img src="${image}" alt="" draggable="false">
    <canvas width="${columns}" height="${rows}" role="img" aria-label="The image, to be painted on"></canvas>
  </div>
  <div class="tools">
    <label><input type="radio" name="painter" value="paint" checked> Paint</label>
    <label><input type="radio" name="painter" value="erase"> Erase</label>
    <label>Brush <input type="range" min="1" max="${largest}" value="${brush}" aria-label="Width of the brush"></label>
    <button type="button">Clear</button>
  </div>
</div>
"""

# `value` is the mask, a character for each pixel, row by row: 1 where it is painted.
SCRIPT = """
const columns = props.columns, rows = props.rows;
const canvas = element.querySelector('canvas'), context = canvas.getContext('2d');
const brush = element.querySelector('input[type=range]'), erase = element.querySelector('input[value=erase]');
let mask = [], last = null;

function show() {
  const pixels = context.createImageData(columns, rows);
  mask.forEach((painted, i) => { if (painted === '1') pixels.data.set([249, 115, 22, 255], 4 * i); });
  context.putImageData(pixels, 0, 0);
}
function take() {
  mask = Array.from({length: columns * rows}, (_, i) => (props.value || '')[i] === '1' ? '1' : '0');
  show();
}
function locate(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * columns, (event.clientY - box.top) / box.height * rows];
}
function dab([x, y]) {
  const radius = brush.value / 2;
  for (let row = Math.max(0, Math.floor(y - radius)); row <= Math.min(rows - 1, y + radius); row++)
    for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(columns - 1, x + radius); column++) {
      const inside = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= Math.max(radius, 0.71);
      if (inside) mask[row * columns + column] = erase.checked ? '0' : '1';
    }
}
function stroke(event) {
  const next = locate(event), steps = Math.ceil(2 * Math.hypot(next[0] - last[0], next[1] - last[1])) || 1;
  for (let i = 1; i <= steps; i++) dab(last.map((value, k) => value + (next[k] - value) * i / steps));
  last = next;
  show();
}
function end() {
  if (last) props.value = mask.join('');
  last = null;
}
canvas.addEventListener('pointerdown', event => {
  canvas.setPointerCapture(event.pointerId);
  last = locate(event);
  stroke(event);
});
canvas.addEventListener('pointermove', event => { if (last) stroke(event); });
canvas.addEventListener('pointerup', end);
canvas.addEventListener('pointercancel', end);
element.querySelector('button').addEventListener('click', () => {
  mask.fill('0');
  show();
  props.value = mask.join('');
});
watch(['value', 'image'], take);
take();
"""

STYLE = """
.painter .paper { position: relative; max-width: 360px; touch-action: none; cursor: crosshair; }
.painter .paper > * { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; image-rendering: pixelated; }
.painter canvas { opacity: 0.8; touch-action: none; }
.painter .tools { display: flex; flex-wrap: wrap; gap: 0.4em 1em; align-items: center; margin-top: 0.6em; }
.painter .tools label { display: flex; gap: 0.4em; align-items: center; }
.painter .tools input { accent-color: var(--color-accent); }
.painter .tools input[type=radio] { appearance: auto; }
.painter .tools input[type=range] { width: 4.5em; }
.painter .tools button { padding: 0.2em 0.9em; border: 1px solid var(--border-color-primary); border-radius: 6px; }
"""

BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def _describe(shape: tuple[int, int, int], image: str, mask: str) -> dict[str, Any]:
    """Value and properties of the field. gradio replaces all of them when one changes."""
    _, height, width = shape
    side = min(height, width)
    brush = {"brush": max(1, side // 8), "largest": max(2, side // 3)}
    return {"value": mask, "image": image, "columns": width, "rows": height, **brush}


def make_painter(gr: ModuleType, shape: tuple[int, int, int]) -> Any:
    """
    The field to paint on.

    Args:
        gr: gradio.
        shape (`tuple[int, int, int]`): `(channels, height, width)` of the image.

    Returns:
        `gradio.HTML`: its value is the mask, as of [`read_mask`].
    """
    return gr.HTML(html_template=HTML, js_on_load=SCRIPT, apply_default_css=False, **_describe(shape, BLANK, ""))


def paint_on(gr: ModuleType, shape: tuple[int, int, int], image: str, mask: str) -> dict[str, Any]:
    """
    Another image and mask for the field.

    Args:
        gr, shape: As of [`make_painter`].
        image (`str`): The image's address.
        mask (`str`): What is painted, as of [`read_mask`].
    """
    return gr.update(**_describe(shape, image, mask))
