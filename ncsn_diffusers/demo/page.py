"""
The page: the fields, buttons and images around [`Chains`], made with gradio.

gradio is an extra, so it is imported where the page is made. Nothing goes to other hosts: no statistics, no public
link, no fonts. Uploads are deleted as they are read, and the images on the page lie in a folder that is emptied by age
and goes with the server.
"""

import functools
import html
import inspect
import os
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from accelerate import PartialState
from PIL import Image

from ..hub.loading import NCSNPipeline
from ..pretrained import pretrained
from ..sampling import cast, load_pipeline
from .chains import (
    ANY_CLASS,
    DAMAGES,
    IN_TURN,
    LARGEST_NOISE,
    MAX_COMPARED,
    NUM_RESAMPLINGS,
    NUM_SAMPLES,
    Chains,
    Frame,
    Run,
    check_limits,
    largest_blur,
    list_blocks,
    read_upload,
)

MAX_FILE_SIZE = "10mb"
MAX_WAITING = 32  # runs in the queue
DISK_SECONDS = (60, 600)  # how often the page's files are looked through, and the age at which they go
SESSION_SECONDS = 600  # after which a visitor who has left is forgotten
CANVAS = 336  # pixels on the screen
STYLE = """
.pixels img, .pixels canvas { image-rendering: pixelated; }
.pixels .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.pixels .caption-label { max-width: 100% !important; white-space: normal !important; }
.status { min-height: 3em; }
.status progress { appearance: none; width: 100%; height: 0.6em; border: 0; background: #ddd; }
.status progress::-webkit-progress-bar { background: #ddd; border-radius: 0.3em; }
.status progress::-webkit-progress-value { background: #f97316; border-radius: 0.3em; }
.status progress::-moz-progress-bar { background: #f97316; border-radius: 0.3em; }
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
    The page of a pipeline.

    Args:
        pipe ([`NCSNPipeline`]): The pipeline, on its device.
        max_evaluations (`int`), max_images (`int`): As of [`Chains`].
        num_parallel (`int`): Runs at a time; further ones wait in a queue.

    Returns:
        `gradio.Blocks`: the page, to be launched by [`serve`].

    Raises:
        ImportError: gradio is not installed.
        ValueError: a limit is not a positive int, or the network's images cannot be shown.
    """
    gr = import_gradio()
    check_limits(num_parallel=num_parallel)
    chains = Chains(pipe, max_evaluations, max_images)
    name = os.path.basename(str(pipe.config.get("_name_or_path") or "")) or "NCSN"
    with gr.Blocks(title=f"{name}: ncsn_diffusers", analytics_enabled=False, delete_cache=DISK_SECONDS) as page:
        gr.Markdown(f"# {name}\nA noise conditional score network draws images by removing noise, level by level.")
        for title, fill in (("Draw", _draw), ("Inpaint", _inpaint), ("Restore", _restore), ("Compare", _compare)):
            with gr.Tab(title):
                fill(gr, chains)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=num_parallel)


@contextmanager
def serve(pipe: NCSNPipeline, host: str | None = None, port: int | None = None, **limits: int) -> Iterator[str]:
    """
    Serve the page of a pipeline while the context lasts.

    Args:
        pipe ([`NCSNPipeline`]): The pipeline, on its device.
        host (`str`, *optional*):
            The address to listen at; the variable GRADIO_SERVER_NAME or else 127.0.0.1, this computer alone, when not
            given.
        port (`int`, *optional*): GRADIO_SERVER_PORT, or else the first free one from 7860 on, when not given.
        limits: `max_evaluations`, `max_images` and `num_parallel` of [`make_page`].

    Yields:
        `str`: the page's address.

    Raises:
        ImportError, ValueError: as [`make_page`].
        OSError: the port is taken.
    """
    gr = import_gradio()
    with tempfile.TemporaryDirectory(prefix="ncsn-demo-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            page = make_page(pipe, **limits)
            _, url, _ = page.launch(
                prevent_thread_lock=True,
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                show_error=False,  # of our own mistakes; a visitor's have their sentence anyway
                run_history=False,
                footer_links=["api", "gradio"],
                max_file_size=MAX_FILE_SIZE,
                ssr_mode=False,
                css=STYLE,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            )
            try:
                yield url
            finally:
                page.close(verbose=False)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def launch(
    pipeline: str | None = None,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    **limits: int,
) -> None:
    """
    Load a pipeline and serve its page until the program is interrupted.

    Args:
        pipeline (`str`, *optional*): Folder or id on the Hub; the digits that come with the package when not given.
        host (`str`, *optional*), port (`int`, *optional*): As of [`serve`].
        open_browser (`bool`, defaults to `False`): Open the page in this computer's browser.
        limits: `max_evaluations`, `max_images` and `num_parallel` of [`make_page`].

    Raises:
        ImportError, ValueError, OSError: as [`serve`], or there is no such pipeline.
    """
    import_gradio()  # before a download
    check_limits(**limits)
    pipe = load_pipeline(pipeline or pretrained("mnist")).to(PartialState().device)
    cast(pipe, "float32")
    with suppress(KeyboardInterrupt), _terminable(), serve(pipe, host, port, **limits) as url:
        print(f"The demo page is at {url} (Ctrl+C ends it).", flush=True)
        if open_browser:
            webbrowser.open(url)
        threading.Event().wait()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl+C does, so that the images' folder goes then, too."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set this
        yield
        return

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What the tabs share


def _answer(gr: ModuleType, function: Callable) -> Callable:
    """The function, or generator function, whose ValueErrors become a sentence on the page."""

    def to_sentence(error: Exception):
        return gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def answer(*values):
            try:
                yield from function(*values)
            except (ValueError, FloatingPointError) as error:
                raise to_sentence(error) from error
    else:

        @functools.wraps(function)
        def answer(*values):
            try:
                return function(*values)
            except (ValueError, FloatingPointError) as error:
                raise to_sentence(error) from error

    return answer


def _status(frame: Frame | None, text: str = "") -> str:
    """A progress bar and a sentence, as HTML."""
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


def _wire(gr, buttons, function, inputs, outputs, finish, api_name):
    """
    A start and a stop button. `function(*inputs)` is a generator of the values of [run, *outputs], and `finish(run)` is
    those of `outputs` at the run's end. Returns the state that holds the run.
    """
    start, stop = buttons
    run = gr.State(None, time_to_live=SESSION_SECONDS)

    def end(run):
        if run is None or run.done:
            return [gr.skip()] * len(outputs)
        run.stop()
        run.wait()
        return finish(run) if run.frames else [gr.skip()] * len(outputs)

    started = start.click(
        _answer(gr, function), inputs, [run, *outputs], api_name=api_name, show_progress="minimal", concurrency_id="run"
    )
    # `cancels` is for a run that waits in the queue: gradio forgets it. One that has begun ends by its own signal.
    stop.click(end, run, outputs, api_name=f"stop_{api_name}", queue=False, show_progress="hidden", cancels=started)
    return run


def _wire_gallery(gr, buttons, begin, inputs, gallery, status, api_name) -> None:
    """The buttons of a tab whose run, begun by `begin(*inputs)`, results in the images of a gallery."""

    def finish(run):
        return run.result or gr.skip(), _end(run)

    def function(*values):
        run = begin(*values)
        shown = run.result
        yield run, shown or [], ""
        for frame in run.steps():
            new = run.result is not shown
            shown = run.result
            yield run, shown if new else gr.skip(), _status(frame)
        yield run, *finish(run)

    _wire(gr, buttons, function, inputs, [gallery, status], finish, api_name)


def _class_field(gr, chains: Chains, first: str = ANY_CLASS):
    """The choice of the class, with `first` as the default. A network without classes has no choice."""
    choices = list(dict.fromkeys([first, *chains.classes])) if chains.classes else [ANY_CLASS]
    return gr.Dropdown(choices, value=choices[0], label="Class", visible=bool(chains.classes))


def _seed_field(gr):
    return gr.Number(0, label="Seed", info="The same seed draws the same image.")


def _buttons(gr, name: str):
    with gr.Row():
        return gr.Button(name, variant="primary", min_width=80), gr.Button("Stop", variant="stop", min_width=80)


def _gallery(gr, label: str, columns: int):
    return gr.Gallery(
        label=label,
        show_label=False,  # it would lie on the first image
        columns=columns,
        format="png",
        object_fit="contain",
        interactive=False,
        elem_classes="pixels",
        buttons=["download", "fullscreen"],
    )


def _image_fields(gr, chains: Chains, show: Callable[[Image.Image], Any], shown: Any, api_name: str):
    """Buttons that bring an image, drawn or uploaded, into the state that is returned, and onto the page."""
    image = gr.State(None, time_to_live=SESSION_SECONDS)
    with gr.Row():
        example = gr.Button("Draw example", size="md", min_width=120)
        upload = gr.UploadButton("Upload", size="md", file_types=["image"], type="filepath", min_width=120)
    seed = gr.Number(0, label="Seed of the example")

    def draw(seed):
        run = chains.draw(IN_TURN, chains.evaluations, chains.schedulers[0], seed, 1)
        for _ in run.steps():
            pass
        return run.result, show(run.result)

    def read(path):
        if path is None:
            raise ValueError("No file has come: upload a PNG, JPEG or WebP file.")
        fitted = read_upload(path, chains.pipe.image_shape)
        return fitted, show(fitted)

    example.click(_answer(gr, draw), seed, [image, shown], api_name=f"example_{api_name}", concurrency_id="run")
    upload.upload(_answer(gr, read), upload, [image, shown], api_name=f"upload_{api_name}", concurrency_id="read")
    return image


# The tabs


def _draw(gr, chains: Chains) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            label = _class_field(gr, chains, IN_TURN)
            evaluations = gr.Number(
                chains.evaluations, label="Evaluations", info=f"Of the network, up to {chains.max_evaluations}."
            )
            scheduler = gr.Dropdown(chains.schedulers, value=chains.schedulers[0], label="Scheduler")
            seed = _seed_field(gr)
            number = gr.Number(min(4, chains.max_images), label="Images", info=f"Up to {chains.max_images}.")
            buttons = _buttons(gr, "Draw")
        with gr.Column(scale=3):
            with gr.Row():
                denoised, noisy = (
                    gr.Image(
                        label=text,
                        format="png",
                        height=CANVAS,
                        interactive=False,
                        elem_classes="pixels",
                        buttons=["download", "fullscreen"],
                    )
                    for text in ("Denoised", "Noisy")
                )
            status = gr.HTML(elem_classes="status")
            back = gr.Slider(1, 2, value=1, step=1, label="Back through the chain", interactive=False)
            level = gr.Markdown()

    def finish(run):
        number, last = len(run.frames), run.frames[-1]
        if run.result is not None:
            last.denoised = run.result
        slider = gr.Slider(1, max(number, 2), value=number, interactive=number > 1)
        return last.denoised, last.noisy, _end(run), slider, describe(last)

    def describe(frame):
        return f"After step {frame.step} of {frame.num_steps}. Noise level: σ = {frame.sigma:.3g}"

    def draw(*values):
        run = chains.draw(*values)
        for frame in run.steps():
            yield run, frame.denoised, frame.noisy, _status(frame), gr.skip(), gr.skip()
        yield run, *finish(run)

    def go_back(run, position):
        if run is None or not run.done:
            raise ValueError("There is no chain to go back through yet: draw an image first.")
        if not 1 <= position <= len(run.frames):
            raise ValueError(f"The chain has positions from 1 to {len(run.frames)}, and none at {position}.")
        frame = run.frames[int(position) - 1]
        return frame.denoised, frame.noisy, describe(frame)

    inputs, outputs = [label, evaluations, scheduler, seed, number], [denoised, noisy, status, back, level]
    run = _wire(gr, buttons, draw, inputs, outputs, finish, "draw")
    back.input(
        _answer(gr, go_back),
        [run, back],
        [denoised, noisy, level],
        api_name="go_back",
        queue=False,
        show_progress="hidden",
        trigger_mode="always_last",
    )


def _inpaint(gr, chains: Chains) -> None:
    _, height, width = chains.pipe.image_shape
    scale = max(1, CANVAS // max(height, width))

    def show(image):
        # whole multiples, so that what is painted lies on whole pixels
        large = image.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        return {"background": large, "layers": [], "composite": large}

    with gr.Row():
        with gr.Column(scale=2, min_width=CANVAS + 40):
            editor = gr.ImageEditor(
                label="Paint",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                canvas_size=(width * scale, height * scale),
                fixed_canvas=True,
                brush=gr.Brush(default_size=3 * scale, colors=["#e4572e"], color_mode="fixed"),
                elem_classes="pixels",
                buttons=[],
            )
            image = _image_fields(gr, chains, show, editor, "inpaint")
        with gr.Column(scale=3):
            with gr.Row():
                label = _class_field(gr, chains)
                levels = gr.Number(
                    chains.levels,
                    label="Noise levels",
                    info=f"Up to {chains.max_levels(1 + NUM_RESAMPLINGS)}; {1 + NUM_RESAMPLINGS} evaluations each.",
                )
                seed = _seed_field(gr)
            buttons = _buttons(gr, "Inpaint")
            status = gr.HTML(elem_classes="status")
            gallery = _gallery(gr, "Completions", NUM_SAMPLES)

    def begin(image, painted, *values):
        return chains.inpaint(image, (painted or {}).get("layers"), *values)

    _wire_gallery(gr, buttons, begin, [image, editor, label, levels, seed], gallery, status, "inpaint")


def _restore(gr, chains: Chains) -> None:
    shape, black = chains.pipe.image_shape, f"{chains.pipe.config.data_min:g}"
    blocks = list_blocks(shape)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            shown = gr.Image(
                label="Image", format="png", height=200, interactive=False, elem_classes="pixels", buttons=[]
            )
            image = _image_fields(gr, chains, lambda image: image, shown, "restore")
        with gr.Column(scale=3):
            with gr.Row():
                damage = gr.Radio(DAMAGES if blocks else DAMAGES[1:], value=DAMAGES[0 if blocks else 1], label="Damage")
                block = gr.Dropdown(
                    blocks or [1], value=(blocks or [1])[-1], label="Block, in pixels", visible=bool(blocks)
                )
                blur = gr.Number(
                    min(2, largest_blur(shape)), label="Blur, in pixels", info=f"0.3 to {largest_blur(shape):g}."
                )
                noise_std = gr.Number(
                    0.1,
                    label="Noise",
                    info=f"Up to {LARGEST_NOISE:g}; black is {black}, white 1.",
                )
            with gr.Row():
                label = _class_field(gr, chains)
                levels = gr.Number(
                    chains.levels, label="Noise levels", info=f"Up to {chains.max_levels(2)}; 2 evaluations each."
                )
                seed = _seed_field(gr)
            buttons = _buttons(gr, "Restore")
            status = gr.HTML(elem_classes="status")
            gallery = _gallery(gr, "The damaged image, and restored ones", 1 + NUM_SAMPLES)

    inputs = [image, damage, block, blur, noise_std, label, levels, seed]
    _wire_gallery(gr, buttons, chains.restore, inputs, gallery, status, "restore")


def _compare(gr, chains: Chains) -> None:
    chosen = [name for name in ("DDIMScheduler", "DPMSolverMultistepScheduler") if name in chains.schedulers]
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            label = _class_field(gr, chains, IN_TURN)
            evaluations = gr.Number(
                min(20, chains.max_evaluations),
                label="Evaluations",
                info=f"Of the network, for each scheduler, up to {chains.max_evaluations}.",
            )
            schedulers = gr.Dropdown(
                chains.schedulers,
                value=list(dict.fromkeys([chains.schedulers[0], *chosen])),
                multiselect=True,
                label="Schedulers",
                info=f"Up to {MAX_COMPARED}.",
            )
            seed = _seed_field(gr)
            number = gr.Number(min(4, chains.max_images), label="Images", info=f"Up to {chains.max_images}.")
            buttons = _buttons(gr, "Compare")
        with gr.Column(scale=3):
            status = gr.HTML(elem_classes="status")
            gallery = _gallery(gr, "The same seed under each scheduler", 3)

    inputs = [label, evaluations, schedulers, seed, number]
    _wire_gallery(gr, buttons, chains.compare, inputs, gallery, status, "compare")
