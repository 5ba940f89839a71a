"""
Python programs in processes of their own, forked from one that has imported torch and diffusers already: starting
takes a tenth of a second, not five. The server has not imported this package, so whatever a program imports of it runs
anew, in an environment that the program has to itself. What depends on how Python starts is tested with `subprocess`.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

PRELOADED = [
    *("accelerate", "datasets", "diffusers.models.unets.unet_2d", "diffusers.schedulers", "diffusers.training_utils"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "tyro"),
]
# libraries of Hugging Face read this one as they are imported
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def _main(command: list[str], cwd: str | None, environment: dict[str, str], outputs: list[str]) -> None:
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


class Forked:
    """A running program, with what `subprocess.Popen` has of it; its output goes to files."""

    def __init__(self, *command, cwd=None, **environment):
        with mock.patch.dict(os.environ, ENVIRONMENT):
            multiprocessing.set_forkserver_preload(PRELOADED)
            forkserver.ensure_running()
        self._folder = tempfile.TemporaryDirectory()
        outputs = [str(Path(self._folder.name) / name) for name in ("stdout", "stderr")]
        environment = {**os.environ, **ENVIRONMENT, **environment}
        arguments = ([str(part) for part in command], cwd and str(cwd), environment, outputs)
        self.process = multiprocessing.get_context("forkserver").Process(target=_main, args=arguments)
        with (
            mock.patch.object(sys.modules["__main__"], "__spec__", None),
            mock.patch.object(sys.modules["__main__"], "__file__", None, create=True),
        ):  # pytest's own main program is none of the child's
            self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; what was printed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return tuple(
            path.read_text() if (path := Path(self._folder.name) / name).exists() else ""
            for name in ("stdout", "stderr")
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_forked(*command, cwd=None, **environment) -> subprocess.CompletedProcess:
    """As `subprocess.run` of Python with this command: `-m` and a module, `-c` and a program, or a script's path."""
    program = Forked(*command, cwd=cwd, **environment)
    try:
        stdout, stderr = program.communicate()
    finally:
        program.kill()
    return subprocess.CompletedProcess(command, program.poll(), stdout, stderr)


def run_two_forked(*command, cwd=None, **environment) -> subprocess.CompletedProcess:
    """The same of two processes that work together, as torchrun starts them; the output of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    programs = [Forked(*command, cwd=cwd, RANK=rank, LOCAL_RANK=rank, **environment) for rank in ("0", "1")]
    deadline = time.monotonic() + 300
    try:
        while any(program.poll() is None for program in programs) and time.monotonic() < deadline:
            if any(program.poll() for program in programs):
                break  # the other would wait for it
            time.sleep(0.05)
    finally:
        for program in programs:
            program.kill()
    outputs = [program.communicate() for program in programs]
    code = next((program.poll() for program in programs if program.poll()), 0)
    return subprocess.CompletedProcess(command, code, *map("".join, zip(*outputs, strict=True)))
