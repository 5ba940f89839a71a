"""Fixtures of several test files, and how the tests share a machine."""

import atexit
import os
import shutil
import tempfile
from multiprocessing import forkserver

# Before torch is imported, and for the processes that tests start. The tests' tensors are so small that several threads
# only wait for each other, many times longer than the work takes where another process has the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there are several nonetheless, as under `accelerate launch`, they sleep while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before huggingface_hub is imported: every process of the tests has caches of its own. Several would write the same
# files into the user's, such as the modules of pipelines that are loaded with their code.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ncsn_diffusers-tests-")
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("HF_MODULES_CACHE", None)

import pytest  # and nothing that imports torch: pytest's first process, which hands out the tests, needs none

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

MAX_WORKERS = 4  # each holds its own torch


def pytest_xdist_auto_num_workers(config):
    """`pytest` alone uses several cores; tests that are named run in this process, where a debugger reaches them."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session", autouse=True)
def a_cpu_without_bfloat16():
    """The tests compute in float32 on every machine, except in processes of their own."""
    from ncsn_diffusers import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def seconds_of_forked_processes_count():
    """The server of tests/forked.py ends with the tests, so that its seconds are among those of pytest."""
    yield
    forkserver._forkserver._stop()


@pytest.fixture
def quick_pictures():
    """Training draws samples of 2 steps, not of 50, and no curve: in a run of few steps they take most of the time."""
    from ncsn_diffusers.training import Trainer, trainer

    draw = Trainer._draw

    def draw_quickly(trainer, pipeline):  # which is not the one that is saved
        pipeline.register_to_config(num_inference_steps=2)
        return draw(trainer, pipeline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_draw", draw_quickly)
        patch.setattr(trainer, "save_loss_curve", lambda losses, weighting, path: path.touch())
        yield


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """
    A Hub of one's own, logged in as ann, and huggingface_hub's client led there.

    The client reads its endpoint when it is imported: what it has read is replaced.
    """
    import huggingface_hub
    from hub_server import TOKEN, HubServer
    from huggingface_hub import constants

    from ncsn_diffusers.hub import upload

    with HubServer() as server:
        server.users = {TOKEN: ("ann", ["lab"]), "hf_bobsSecretToken0123456789": ("bob", [])}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, huggingface_hub.file_download):  # before huggingface_hub 1.0 the latter has a copy
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # 0.30 has none
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(upload, "_FIRST_WAIT", 0.01)
        yield server
