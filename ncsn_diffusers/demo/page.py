"""
The page: the fields, buttons and images around [`Chains`], made with gradio.

Images are part of the page's text, as data URLs: there are no files that a browser could find half written, or that two
visitors could share. Values come as the page, or anybody, has sent them, and [`Chains`] checks them.
"""

import base64
import html
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ..hub.loading import NCSNPipeline
from .chains import (
    ANY_CLASS,
    DAMAGES,
    IN_TURN,
    LARGEST_NOISE,
    MAX_COMPARED,
    NUM_RESAMPLINGS,
    Chains,
    FieldError,
    Frame,
    Images,
    Opening,
    Run,
    check_limits,
    largest_blur,
    list_blocks,
    name_scheduler,
    read_upload,
)
from .fields import NUM_SHOWN, FieldChains, FieldOpening
from .painter import STYLE as PAINTER_STYLE
from .painter import make_painter, paint_on

MAX_WAITING = 32  # runs in the queue
DISK_SECONDS = (60, 600)  # how often uploads that nobody has read are looked for, and the age at which they go
SESSION_SECONDS = 600  # after which a visitor who has left is forgotten
LARGEST_ROLL = 100_000  # of the dice
WITHOUT_SENTENCE = ("image", "mask")  # fields that have no place for one, which is in the status then
STYLE = (
    PAINTER_STYLE
    + """
.html-container { padding: 0 !important; }
.figures { display: grid; gap: 16px; grid-template-columns: repeat(var(--across), minmax(0, 1fr)); }
.figures figure { margin: 0; min-width: 0; }
.figures figcaption { padding-top: 4px; text-align: center; color: var(--body-text-color); }
.sheet { display: grid; gap: 2px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
.sheet img { width: 100%; margin: 0; image-rendering: pixelated; background: var(--background-fill-secondary); }
.plots .sheet img { image-rendering: auto; }
.empty { display: grid; place-items: center; min-height: 12em; border: 1px dashed var(--border-color-primary);
  border-radius: 8px; color: var(--body-text-color-subdued); }
.examples { display: flex; flex-wrap: wrap; gap: 6px; }
.examples button { padding: 2px; border: 1px solid var(--border-color-primary); border-radius: 6px; cursor: pointer; }
.examples button:hover, .examples button:focus { border-color: var(--color-accent); }
.examples img { width: 42px; margin: 0; image-rendering: pixelated; }
.chosen img { width: 100%; max-width: 240px; margin: 0; image-rendering: pixelated; }
.dice { align-self: end; height: 3.4em; }
.status { min-height: 1.4em; }
.status progress { appearance: none; width: 100%; height: 0.5em; border: 0; border-radius: 0.3em; }
.status progress, .status progress::-webkit-progress-bar { background: var(--background-fill-secondary); }
.status progress::-webkit-progress-bar { border-radius: 0.3em; }
.status progress::-webkit-progress-value { background: var(--color-accent); border-radius: 0.3em; }
.status progress::-moz-progress-bar { background: var(--color-accent); border-radius: 0.3em; }
.status .error { margin: 0; padding: 0.4em 0.8em; border-left: 4px solid #dc2626; }
@media (max-width: 640px) {
  .figures { grid-template-columns: minmax(0, 1fr); }
  .figures .sheet { max-width: 300px; margin: auto; }
  .plots .figures .sheet { max-width: none; }
  .tab-container button { padding: 0 8px; }
}
"""
)
# Clicks on the images of `_Picker`.
PICK_SCRIPT = """
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});
"""


def import_gradio() -> ModuleType:
    """
    Raises:
        ImportError: gradio is not installed; the message says how to install it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # which gradio reads when it is imported, too
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"The demo page needs gradio, which cannot be imported ({error}): pip install 'ncsn_diffusers[demo]'."
        ) from error
    return gradio


def make_page(pipe: NCSNPipeline, max_evaluations: int = 200, max_images: int = 16, num_parallel: int = 1) -> Any:
    """
    The page of a pipeline. The images that it opens with are drawn meanwhile.

    Args:
        pipe ([`NCSNPipeline`]): The pipeline, on its device.
        max_evaluations (`int`), max_images (`int`): As of [`Chains`].
        num_parallel (`int`): Runs at a time; further ones wait in a queue.

    Returns:
        `gradio.Blocks`: the page, to be launched by [`serve`]. Its attribute `opening` is an [`Opening`].

    Raises:
        ImportError: gradio is not installed.
        ValueError: a limit is below 1.
    """
    gr = import_gradio()
    check_limits(num_parallel=num_parallel)
    of_images = pipe.draws_images
    chains = (Chains if of_images else FieldChains)(pipe, max_evaluations, max_images)
    source = str(pipe.config.get("_name_or_path") or "")
    name = os.path.basename(source) or "NCSN"

    class Page(gr.Blocks):
        async def preprocess_data(self, block_fn, *args, **kwargs):
            try:
                return await super().preprocess_data(block_fn, *args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:  # values of a shape that the page does not send, and gradio has no words for
                names = ", ".join(filter(None, (field.label for field in block_fn.inputs))) or "none"
                raise gr.Error(
                    f"The request must hold one value for each field, as the page sends it. Fields: {names}.",
                    print_exception=False,
                ) from error

    with Page(title=f"{name}: ncsn_diffusers", analytics_enabled=False, delete_cache=DISK_SECONDS) as page:
        gr.Markdown(f"# {name}\n{_introduce(source, chains)}")
        page.opening = (Opening if of_images else FieldOpening)(chains)
        middle = [("Inpaint", _inpaint), ("Restore", _restore)] if of_images else [("Measure", _measure)]
        for title, fill in (("Draw", _draw), *middle, ("Compare", _compare)):
            with gr.Tab(title):
                fill(gr, page, chains)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=num_parallel)


def _introduce(source: str, chains: Chains) -> str:
    """A sentence and links, as Markdown."""
    links = [line.split(", ", 1) for line in metadata("ncsn_diffusers").get_all("Project-URL") or []]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists():
        links.append(("Model", f"https://huggingface.co/{source}"))
    drawn = chains.things.lower()
    sentence = f"A noise conditional score network turns noise into {drawn}, one noise level at a time."
    if not chains.of_images and chains.part:
        sentence += f" {chains.part}"
    return sentence + "\n\n" + " · ".join(f"[{name}]({url})" for name, url in links)


# Images, as HTML


def _to_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _show(figures: Sequence[tuple[Images | Image.Image, str]], across: int | None = None) -> str:
    """Images, or groups of images, beside one another, each with its caption; on narrow screens in one column."""
    parts = []
    for images, caption in figures:
        images = images if isinstance(images, list) else [images]
        text = html.escape(caption)
        tags = "".join(
            f'<img src="{_to_url(image)}" alt="{text}{f" ({i} of {len(images)})" if len(images) > 1 else ""}">'
            for i, image in enumerate(images, 1)
        )
        columns = math.ceil(math.sqrt(len(images)))
        parts.append(
            f'<figure><div class="sheet" style="--columns: {columns}">{tags}</div>'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<div class="figures" style="--across: {across or len(parts)}">{"".join(parts)}</div>'


def _show_frame(chains: Chains, run: Run, frame: Frame) -> str:
    """Both under the same colors, and all frames of a run that is over, too."""
    limits = run.limits or chains.find_limits(frame.denoised)
    kinds = {"denoised": frame.denoised, "noisy": frame.noisy}
    return _show(
        [(chains.to_pictures(samples, limits), kind) for kind, samples in kinds.items()],
        across=None if chains.of_images else 1,
    )


def _make_place(gr: ModuleType, chains: Chains) -> Any:
    """Where a tab shows images or plots."""
    classes = None if chains.of_images else "plots"
    return gr.HTML(_show_captioned(None, chains.things), elem_classes=classes, apply_default_css=False)


def _show_captioned(
    result: Sequence[tuple[Images | Image.Image, str]] | None, things: str = "Images", across: int | None = None
) -> str:
    return _show(result, across) if result else f'<div class="empty">The {things.lower()} come here.</div>'


def _status(frame: Frame | None, text: str = "") -> str:
    """A progress bar and a sentence."""
    if frame is None:
        return text
    text = text or f"Step {frame.step} of {frame.num_steps}, σ = {frame.sigma:.3g}"
    return f'<progress value="{frame.step}" max="{frame.num_steps}"></progress><br>{text}'


def _end(run: Run) -> str:
    """The status of a run that is over."""
    last = run.frames[-1] if run.frames else None
    if run.stopped:
        return _status(last, "Stopped." if last is None else f"Stopped at step {last.step} of {last.num_steps}.")
    return _status(last, "Done.")


def _refuse(error: Exception) -> str:
    """The status that says what is wrong."""
    return f'<p class="error" role="alert">{html.escape(str(error))}</p>'


# What the tabs share


class _Form:
    """
    The fields and buttons of a tab, and its results.

    Args:
        gr: gradio.
        page: The page.
        tab (`str`): The name of the tab in the opening, and of its runs for programs.
        begin (`Callable[..., Run]`): The method of [`Chains`] that makes a run of the values of the fields.
        show (`Callable[[Run, Frame | None], list]`):
            What there is to see of a run, the values of `outputs`: while it lasts, with the newest frame, and, without
            one, at its end.
    """

    def __init__(self, gr: ModuleType, page: Any, tab: str, begin: Callable[..., Run], show: Callable):
        self.gr, self.page, self.tab, self.begin, self.show = gr, page, tab, begin, show
        self.run = gr.State(None, time_to_live=SESSION_SECONDS)

    def add_buttons(self, name: str) -> None:
        with self.gr.Row():
            self.start = self.gr.Button(name, variant="primary", min_width=80)
            self.stop = self.gr.Button("Stop", min_width=80)
        self.status = self.gr.HTML(elem_classes="status", apply_default_css=False)

    def wire(self, fields: dict[str, Any], outputs: list) -> None:
        """
        Args:
            fields: The components, by the names of the arguments of `begin`, in their order.
            outputs: The components that show a run.
        """
        gr, self.fields, self.outputs = self.gr, list(fields.values()), outputs
        names = list(fields)

        def check(*values):
            """The sentence at the field that is wrong, before the run waits in the queue."""
            results = [None] * len(names)
            try:
                self.begin(*values)
            except FieldError as error:
                if error.field not in WITHOUT_SENTENCE:
                    results[names.index(error.field)] = gr.validate(False, str(error))
            return results

        def answer(*values):
            nothing = [gr.skip()] * len(outputs)
            try:
                run = self.begin(*values).start()
                yield [run, *self.show(run, None), "Starting."]
                for frame in run.steps():
                    yield [run, *self.show(run, frame), _status(frame)]
                yield [run, *self.show(run, None), _end(run)]
            except (ValueError, FloatingPointError) as error:
                yield [gr.skip(), *nothing, _refuse(error)]

        def end(run):
            if run is None or run.done:
                return [gr.skip()] * (1 + len(outputs))
            run.stop()
            run.wait()
            return [*self.show(run, None), _end(run)]

        def open_tab():
            try:
                run = self.page.opening.wait(self.tab)
            except (ValueError, FloatingPointError) as error:
                return [gr.skip()] * (1 + len(outputs)) + [_refuse(error)]
            return [run, *self.show(run, None), ""]

        self.listen = lambda event, **settings: event(
            answer,
            self.fields,
            [self.run, *outputs, self.status],
            validator=check,
            preprocess=False,
            show_progress="minimal",
            show_progress_on=self.status,
            concurrency_id="run",
            **settings,
        )
        started = self.listen(self.start.click, api_name=self.tab)
        # `cancels` is for a run that waits in the queue: gradio forgets it. One that has begun ends by its own signal.
        self.stop.click(
            end,
            self.run,
            [*outputs, self.status],
            api_name=f"stop_{self.tab}",
            queue=False,
            show_progress="hidden",
            cancels=started,
        )
        # gradio takes the sentence away from a field when something begins that reads the field
        visible = [field for name, field in fields.items() if name not in WITHOUT_SENTENCE]
        gr.on(
            [field.change for field in visible],
            lambda *_: None,
            visible,
            None,
            preprocess=False,
            queue=False,
            api_visibility="private",
            show_progress="hidden",
            trigger_mode="always_last",
        )
        self.page.load(
            open_tab,
            None,
            [self.run, *outputs, self.status],
            api_name=f"open_{self.tab}",
            show_progress="minimal",
            show_progress_on=self.status,
            concurrency_id="open",
            concurrency_limit=None,
        )

    def add_examples(self, examples: list[tuple[str, list]]) -> None:
        """Buttons that fill in the fields, and begin."""
        for name, values in examples:
            button = self.gr.Button(name, size="sm", min_width=140)
            filled = button.click(
                lambda values=values: values, None, self.fields, queue=False, api_visibility="private"
            )
            self.listen(filled.then, api_visibility="private")


def _class_field(gr, chains: Chains, first: str = ANY_CLASS):
    """The choice of the class, with `first` as the default. A network without classes has no choice."""
    choices = list(dict.fromkeys([first, *chains.classes])) if chains.classes else [ANY_CLASS]
    return gr.Dropdown(choices, value=choices[0], label="Class", visible=bool(chains.classes), min_width=140)


def _seed_field(gr, chains: Chains):
    with gr.Row():
        seed = gr.Number(0, label="Seed", info=f"The same seed draws the same {chains.thing}.", min_width=160, scale=1)
        dice = gr.Button("🎲", elem_classes="dice", min_width=48, scale=0)
    dice.click(None, None, seed, js=f"() => Math.floor({LARGEST_ROLL} * Math.random())")
    return seed


def _evaluations_field(gr, chains: Chains, value: int):
    return gr.Number(value, label="Evaluations", info=f"Of the network, up to {chains.max_evaluations}.", min_width=120)


def _images_field(gr, chains: Chains, value: int):
    return gr.Number(value, label=chains.things, info=f"Up to {chains.max_images}.", min_width=120)


def _levels_field(gr, chains: Chains, evaluations_each: int):
    info = f"Up to {chains.max_levels(evaluations_each)}, of {evaluations_each} evaluations each."
    return gr.Number(chains.levels, label="Noise levels", info=info, min_width=140)


def _name_choices(chains: Chains) -> list[tuple[str, str]]:
    return [(name_scheduler(name), name) for name in chains.schedulers]


def _image_field(gr, form: _Form, chains: Chains, target: Any, show: Callable[[Image.Image, Any], Any]):
    """
    Examples to click and a button to upload, which bring an image into the state that is returned, and onto the page as
    `show(image, value)`, an update of `target`, with its value if that is to stay.
    """
    image = gr.State(None, time_to_live=SESSION_SECONDS)
    gr.Markdown("Choose an image, or upload your own:")
    picker = gr.HTML(js_on_load=PICK_SCRIPT, apply_default_css=False)
    upload = gr.UploadButton("Upload", size="sm", file_types=["image"], type="filepath")
    opening, api_name = form.page.opening, form.tab

    def choose(index):
        images = opening.list_examples()
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(images):
            raise gr.Error(f"The example must be a whole number from 0 to {len(images) - 1}.", print_exception=False)
        return images[index], show(images[index], None), ""

    def choose_clicked(event: gr.EventData):
        return choose(event.index)

    def read(file, before, value):
        try:
            if file is None:
                raise ValueError("No file has come: upload a PNG, JPEG or WebP file.")
            fitted = read_upload(file["path"], chains.pipe.sample_shape)
        except ValueError as error:
            # no `gr.skip()` for the target: it would take the properties of the painter away
            return before, gr.skip() if before is None else show(before, value), _refuse(error)
        return fitted, show(fitted, None), ""

    def open_images():
        try:
            images = opening.list_examples()
        except (ValueError, FloatingPointError):  # which the tab Draw shows
            return gr.skip(), gr.skip(), gr.skip()
        buttons = "".join(
            f'<button type="button" data-index="{i}" aria-label="example {i + 1}"><img src="{_to_url(image)}" alt="">'
            "</button>"
            for i, image in enumerate(images)
        )
        return f'<div class="examples">{buttons}</div>', images[0], show(images[0], None)

    picker.click(choose_clicked, None, [image, target, form.status], queue=False, api_visibility="private")
    number = gr.Number(visible=False)  # for programs
    number.submit(choose, number, [image, target, form.status], preprocess=False, api_name=f"example_{api_name}")
    upload.upload(
        read,
        [upload, image, target],
        [image, target, form.status],
        preprocess=False,
        api_name=f"upload_{api_name}",
        concurrency_id="read",
    )
    form.page.load(
        open_images,
        None,
        [picker, image, target],
        api_visibility="private",
        show_progress="hidden",
        concurrency_id="open",
        concurrency_limit=None,
    )
    return image


# The tabs


def _draw(gr, page, chains: Chains) -> None:
    def show(run, frame):
        if frame is not None:
            return [_show_frame(chains, run, frame), gr.skip(), gr.skip()]
        if not run.frames:
            return [gr.skip(), gr.skip(), gr.skip()]
        number, last = len(run.frames), run.frames[-1]
        if run.result is not None:
            last.denoised = run.result
            run.limits = run.limits or chains.find_limits(run.result)
        slider = gr.Slider(1, max(number, 2), value=number, interactive=number > 1)
        return [_show_frame(chains, run, last), slider, describe(last)]

    def describe(frame):
        return f"After step {frame.step} of {frame.num_steps}. Noise level: σ = {frame.sigma:.3g}"

    def go_back(run, position):
        if run is None or not run.done:
            raise gr.Error("There is no chain to go back through yet: draw first.", print_exception=False)
        number = len(run.frames)
        if isinstance(position, bool) or not isinstance(position, int | float) or not 1 <= position <= number:
            raise gr.Error(f"The chain has positions from 1 to {number}, and no other.", print_exception=False)
        frame = run.frames[int(position) - 1]
        return _show_frame(chains, run, frame), describe(frame)

    form = _Form(gr, page, "draw", chains.draw, show)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            label = _class_field(gr, chains, IN_TURN)
            scheduler = gr.Dropdown(_name_choices(chains), value=chains.schedulers[0], label="Scheduler")
            with gr.Row():
                evaluations = _evaluations_field(gr, chains, chains.evaluations)
                number = _images_field(gr, chains, chains.num_images)
            seed = _seed_field(gr, chains)
            form.add_buttons("Draw")
        with gr.Column(scale=2):
            images = _make_place(gr, chains)
            back = gr.Slider(1, 2, value=1, step=1, label="Back through the chain", interactive=False)
            level = gr.Markdown()
            examples = gr.Column()
    fields = {"label": label, "evaluations": evaluations, "scheduler": scheduler, "seed": seed, "num_images": number}
    form.wire(fields, [images, back, level])
    with examples:
        gr.Markdown("Examples:")
        with gr.Row():
            form.add_examples(_list_drawings(chains))
    back.input(
        go_back,
        [form.run, back],
        [images, level],
        preprocess=False,
        api_name="go_back",
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )


def _list_drawings(chains: Chains) -> list[tuple[str, list]]:
    """Examples of the tab Draw: a name, and the values of the fields."""
    own, number = chains.schedulers[0], chains.num_images
    examples = [("Another seed", [IN_TURN, chains.evaluations, own, 100, number])]
    if chains.classes:
        label = chains.classes[-1]
        examples.insert(0, (f"Only class {label}", [label, chains.evaluations, own, 0, number]))
    fast = "DPMSolverMultistepScheduler"
    if fast in chains.schedulers and chains.max_evaluations >= 10:
        examples.append(("10 evaluations", [IN_TURN, 10, fast, 0, number]))
    examples.append((f"One {chains.thing}", [IN_TURN, chains.evaluations, own, 3, 1]))
    return [(name, [value if i or chains.classes else ANY_CLASS for i, value in enumerate(v)]) for name, v in examples]


def _inpaint(gr, page, chains: Chains) -> None:
    shape = chains.pipe.sample_shape

    def show(run, frame):
        if frame is not None:
            return [_show([(image, "denoised") for image in frame.denoised])]
        return [
            _show([(image, f"completion {i}") for i, image in enumerate(run.result, 1)]) if run.result else gr.skip()
        ]

    form = _Form(gr, page, "inpaint", chains.inpaint, show)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            painter = make_painter(gr, shape)
            chooser = gr.Column()
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                label = _class_field(gr, chains)
                levels = _levels_field(gr, chains, 1 + NUM_RESAMPLINGS)
            seed = _seed_field(gr, chains)
            form.add_buttons("Inpaint")
            completions = _make_place(gr, chains)
    with chooser:

        def put(image, mask):
            return paint_on(gr, shape, _to_url(image), page.opening.mask if mask is None else mask)

        image = _image_field(gr, form, chains, painter, put)
    form.wire({"image": image, "mask": painter, "label": label, "levels": levels, "seed": seed}, [completions])


def _restore(gr, page, chains: Chains) -> None:
    opening, shape = page.opening, chains.pipe.sample_shape
    blocks = list_blocks(shape)

    def show(run, frame):
        restored = [(image, "denoised") for image in frame.denoised] if frame and not run.done else []
        return [_show_captioned([*run.result, *restored])]

    def choose_fields(damage):
        return gr.update(visible=damage == "pixelated"), gr.update(visible=damage == "blurred")

    form = _Form(gr, page, "restore", chains.restore, show)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            chosen = gr.HTML(elem_classes="chosen", apply_default_css=False)
            chooser = gr.Column()
        with gr.Column(scale=2, min_width=300):
            damage = gr.Radio(DAMAGES if blocks else DAMAGES[1:], value=opening.damage, label="Damage")
            with gr.Row():
                block = gr.Dropdown(
                    blocks or [1], value=opening.block or 1, label="Block, in pixels", visible=bool(blocks)
                )
                blur = gr.Number(
                    opening.blur,
                    label="Blur, in pixels",
                    info=f"0.3 to {largest_blur(shape):g}.",
                    visible=opening.damage == "blurred",
                )
                noise_std = gr.Number(
                    opening.noise_std, label="Noise", info=f"Up to {LARGEST_NOISE:g}; black is 0, white 1."
                )
            with gr.Row():
                label = _class_field(gr, chains)
                levels = _levels_field(gr, chains, 2)
            seed = _seed_field(gr, chains)
            form.add_buttons("Restore")
            restored = _make_place(gr, chains)
    damage.change(choose_fields, damage, [block, blur], queue=False, api_visibility="private", show_progress="hidden")
    with chooser:
        image = _image_field(gr, form, chains, chosen, lambda image, _: f'<img src="{_to_url(image)}" alt="the image">')
    fields = {"image": image, "damage": damage, "block": block, "blur": blur, "noise_std": noise_std}
    form.wire({**fields, "label": label, "levels": levels, "seed": seed}, [restored])


def _measure(gr, page, chains: FieldChains) -> None:
    def show(run, frame):
        example = run.result
        figures = list(example.figures) if example else []
        if example is None or example.samples is None:  # under way, or stopped
            frame = frame or (run.frames[-1] if run.frames else None)
            names = ["truth"] if example is None else [f"sample {i + 1}" for i in range(NUM_SHOWN)]
            if frame is not None and len(frame.denoised) >= len(names):  # not the truth's last frame once more
                pairs = zip(names, frame.denoised, strict=False)
                figures += [(chains.plot_one(field, run.limits), f"{name}, denoised") for name, field in pairs]
        return [_show_captioned(figures, chains.things, across=3), example.summary if example else ""]

    form = _Form(gr, page, "measure", chains.measure, show)
    unit = (chains.unit and f"in {chains.unit}") if chains.has_one_scale else "relative"
    noise = "Standard deviation" if chains.has_one_scale else "In standard deviations of each channel"
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            gr.Markdown("A field that the network draws is measured at random points, its stations.")
            label = _class_field(gr, chains)
            with gr.Row():
                most = f"Up to {chains.num_points - 1} of {chains.num_points} points."
                stations = gr.Number(chains.num_stations, label="Stations", info=most, min_width=120)
                noise_std = gr.Number(
                    chains.noise_std,
                    label=f"Noise, {unit}" if unit else "Noise",
                    info=f"{noise}, up to {chains.largest_noise:g}.",
                    min_width=140,
                )
            with gr.Row():
                number = gr.Number(
                    chains.num_samples, label="Samples", info=f"From 2 to {chains.max_samples}.", min_width=120
                )
                levels = _levels_field(gr, chains, 2)
            seed = _seed_field(gr, chains)
            form.add_buttons("Measure")
        with gr.Column(scale=2, min_width=300):
            summary = gr.Markdown()
            place = _make_place(gr, chains)
    fields = {"label": label, "num_stations": stations, "noise_std": noise_std, "num_samples": number}
    form.wire({**fields, "levels": levels, "seed": seed}, [place, summary])


def _compare(gr, page, chains: Chains) -> None:
    opening = page.opening

    def show(run, frame):
        figures = list(run.result)
        if frame is not None and not run.done:
            figures.append((chains.to_pictures(frame.denoised, run.limits), "denoised"))
        across = min(3, max(2, len(figures))) if chains.of_images else 1
        return [_show(figures, across) if figures else gr.skip()]

    form = _Form(gr, page, "compare", chains.compare, show)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            label = _class_field(gr, chains, IN_TURN)
            schedulers = gr.Dropdown(
                _name_choices(chains),
                value=opening.compared,
                multiselect=True,
                label="Schedulers",
                info=f"Up to {MAX_COMPARED}.",
            )
            with gr.Row():
                evaluations = _evaluations_field(gr, chains, opening.evaluations)
                number = _images_field(gr, chains, opening.num_compared)
            seed = _seed_field(gr, chains)
            form.add_buttons("Compare")
        with gr.Column(scale=2):
            images = _make_place(gr, chains)
    fields = {"label": label, "evaluations": evaluations, "schedulers": schedulers, "seed": seed, "num_images": number}
    form.wire(fields, [images])
