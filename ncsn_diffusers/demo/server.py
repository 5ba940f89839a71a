"""
The server of the page: where it listens, what it refuses to read, and what it leaves behind.

Nothing goes to other hosts: no statistics, no public link, no fonts. Uploads are deleted as they are read. Until then
they lie in a folder that is emptied by age and goes with the server.
"""

import os
import shutil
import signal
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..hub.loading import NCSNPipeline
from ..pretrained import pretrained
from ..sampling import cast, load_pipeline
from .chains import check_limits
from .page import STYLE, import_gradio, make_page

PREFIX = "ncsn-demo-"  # of the folder
MAX_FILE_SIZE = 10 * 2**20  # bytes of an upload
MAX_BODY_SIZE = 2**20  # bytes of any other request


class SmallRequests:
    """
    Middleware that answers requests of more bytes than the page sends with status 413, before they are in memory.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = (MAX_FILE_SIZE if scope["path"].endswith("/upload") else 0) + MAX_BODY_SIZE
        declared = dict(scope["headers"]).get(b"content-length", b"")
        size = 0
        if declared.isdigit() and int(declared) > limit:
            while (await receive()).get("more_body"):  # browsers read the answer when they have sent everything
                pass
            message = f"A request may have {limit:,} bytes, not {int(declared):,}.".encode()
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 413, "headers": headers})
            await send({"type": "http.response.body", "body": message})
            return

        async def receive_little():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= limit else {"type": "http.disconnect"}

        await self.app(scope, receive_little, send)


@contextmanager
def _make_folder() -> Iterator[str]:
    """
    A temporary folder that goes at the end. Those of servers that were killed go now: a server that lives holds a lock
    on a file in its folder.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), open(folder / ".lock", "rb") as file:
            if _lock(file):
                shutil.rmtree(folder, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder,
        open(Path(folder, ".lock"), "xb") as file,
    ):
        _lock(file)
        yield folder


def _lock(file: Any) -> bool:
    """Whether nobody else holds the lock on the file, which is then held until the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows, where a folder with an open file cannot be removed anyway
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
    with _make_folder() as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            page = make_page(pipe, **limits)
            try:
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
                    app_kwargs={"middleware": [(SmallRequests, (), {})]},
                )
                yield url
            finally:
                page.opening.close()
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
    """SIGTERM ends the program as Ctrl+C does, so that the folder of uploads goes then, too."""
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
