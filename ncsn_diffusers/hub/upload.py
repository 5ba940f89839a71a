"""
Publishing a pipeline on the Hub, with a model card and with the code that loads it where this package is not installed.

One commit takes all files, so that a connection that is cut leaves the repository as it was.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..pipeline_ncsn import UploadedNCSNPipeline
from .files import check_folder, collect_files, read_content, without_secrets
from .modules import is_module
from .space import PACKAGE, collect_space_files
from .weights import WEIGHTS

_ATTEMPTS = 5
_FIRST_WAIT = 2.0  # seconds before the second attempt; each further wait is twice as long

logger = logging.get_logger(__name__)


def push_to_hub(
    pipeline: UploadedNCSNPipeline | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    variants: Sequence[str] = (),
    license: str | None = None,
    dataset: str | None = None,
    training_dir: str | Path | None = None,
    commit_message: str | None = None,
    space: bool = False,
) -> CommitInfo:
    """
    Upload a pipeline as one commit. Whatever can be wrong with the arguments, the folder or the token is found before
    anything is created or uploaded; an upload that is cut off is tried again.

    Args:
        pipeline ([`NCSNPipeline`], `str` or `Path`): the pipeline, or the folder that it was saved in.
        repo_id (`str`): `"user/name"`, `"organisation/name"`, or `"name"` among one's own.
        private (`bool`, *optional*):
            Whether a new repository is private; the account's default when not given. True refuses a public one.
        revision (`str`, *optional*): the branch, made from `main` if there is none of that name; `main` by default.
        tag (`str`, *optional*): a new tag for the commit, such as `"v1"`.
        token (`str`, *optional*): the one that `hf auth login` or HF_TOKEN left by default.
        variants (`Sequence[str]`):
            Weights beside the usual ones: `"fp16"`, in half precision; `"ema"`, those of a training run that has
            averaged them, under that name too. Variants that are in the folder are uploaded in any case; those of an
            earlier upload to the branch that this one does not replace are removed, with a warning.
        license (`str`, *optional*): of the weights, an identifier of the Hub such as `"apache-2.0"`, for the card.
        dataset (`str`, *optional*):
            Name on the Hub of the data set, for the card; that of the training's settings by default.
        training_dir (`str` or `Path`, *optional*):
            The folder that [`~training.train`] wrote to, whose samples, settings and log the card shows; that of the
            pipeline, if `pipeline` is one. A README.md there is uploaded instead of a new card.
        commit_message (`str`, *optional*): the commit's summary.
        space (`bool`, defaults to False):
            Also publish the page of `ncsn-diffusers demo` as a Gradio Space of the same name, which shows the pipeline
            of the branch `main`. A private pipeline has a private Space, which needs a token of yours as its secret
            HF_TOKEN.

    Returns:
        `CommitInfo`: of the new commit, or of the last one where nothing has changed.

    Raises:
        ValueError: an argument or a file cannot be uploaded as it is, or the tag exists already.
        FileNotFoundError: the folder holds no complete pipeline.
        PermissionError: the token is missing, invalid, or may not write there.
        OSError: the Hub could not be reached, or failed, several times.
    """
    if isinstance(pipeline, str | Path):
        check_folder(Path(pipeline))
    api = HfApi(token=token)
    repo_id = _check_access(api, repo_id, private, tag)
    if space:
        if revision not in (None, "main"):
            raise ValueError(f"`space`: a Space shows the branch main, and `revision` is {revision!r}: leave one out.")
        is_private = private or (_retry(lambda: api.repo_exists(repo_id)) and _is_private(api, repo_id))
        _check_access(api, repo_id, is_private, repo_type="space")
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(pipeline, str | Path):
            folder = Path(pipeline)
            training_dir = training_dir or folder
        else:
            folder = Path(scratch) / "pipeline"
            pipeline.save_pretrained(folder)
        files = collect_files(folder, repo_id, variants, license, dataset, training_dir)
        info = _upload(api, files, repo_id, private, revision, tag, commit_message)
    if space:
        files = collect_space_files(repo_id, license)
        _upload(api, files, repo_id, _is_private(api, repo_id), None, None, commit_message, repo_type="space")
    return info


class BackgroundPush:
    """
    Uploads during a training run, which neither waits for them nor fails with them: what goes wrong is warned of.

    One upload runs at a time. What is pushed meanwhile waits, and gives way to what is pushed after it.

    ```python
    uploads = BackgroundPush("user/name", training_dir)  # wrong names and tokens are found here
    uploads.create_repository()
    uploads.push(pipeline, "Step 500")
    uploads.push(pipeline, "End of training")
    uploads.finish()
    ```

    Args:
        repo_id (`str`): as of [`push_to_hub`].
        training_dir (`str` or `Path`): as of [`push_to_hub`].
        private (`bool`, *optional*), token (`str`, *optional*): as of [`push_to_hub`].
        license (`str`, *optional*), dataset (`str`, *optional*): as of [`push_to_hub`].

    Raises:
        ValueError, PermissionError, OSError: as [`push_to_hub`].
    """

    def __init__(
        self,
        repo_id: str,
        training_dir: str | Path,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        dataset: str | None = None,
    ):
        self._api = HfApi(token=token)
        self.repo_id = _check_access(self._api, repo_id, private)
        self._private = private
        self._card = {"license": license, "dataset": dataset, "training_dir": Path(training_dir)}
        self._lock = threading.Lock()
        self._waiting: tuple[Future, Any, dict, str] | None = None
        self._thread: threading.Thread | None = None
        self._last: Future | None = None

    def create_repository(self) -> None:
        """
        Create the repository unless it exists, so that a token that may not is found before the first upload.

        Raises:
            PermissionError, OSError: as [`push_to_hub`].
        """
        _create_repository(self._api, self.repo_id, self._private, None)

    def push(self, pipeline: UploadedNCSNPipeline, commit_message: str) -> Future:
        """
        Save the pipeline as it is now, and upload it when its turn comes.

        Returns:
            `Future`: of the `CommitInfo`, or of None where the upload has failed or given way to a later one.
        """
        future, scratch = Future(), None
        try:
            scratch = tempfile.TemporaryDirectory()
            folder = Path(scratch.name)
            pipeline.save_pretrained(folder)
            files = collect_files(folder, self.repo_id, **self._card)
            # the training folder's images may change while they wait
            files = {name: read_content(file) if name.endswith(".png") else file for name, file in files.items()}
        except Exception as error:  # a full disk, for example
            if scratch is not None:
                scratch.cleanup()
            self._warn(error)
            future.set_result(None)
            return future
        with self._lock:
            self._last = future
            if self._waiting is not None:
                self._waiting[0].set_result(None)
                self._waiting[1].cleanup()
            self._waiting = (future, scratch, files, commit_message)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="push_to_hub")
                self._thread.start()
        return future

    def finish(self) -> CommitInfo | None:
        """Wait for the last upload; its commit, or None where it has failed."""
        return None if self._last is None else self._last.result()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = None
                    return
                (future, scratch, files, message), self._waiting = self._waiting, None
            result = None
            try:
                result = _upload(self._api, files, self.repo_id, self._private, None, None, message)
            except Exception as error:
                self._warn(error)
            finally:
                scratch.cleanup()
                future.set_result(result)

    def _warn(self, error: Exception) -> None:
        logger.warning(
            f"The upload to {self.repo_id} has failed: {without_secrets(str(error), self._api)} The training goes on, "
            "and `ncsn-diffusers push` uploads its folder afterwards."
        )


# The Hub


def _check_access(
    api: HfApi, repo_id: str, private: bool | None, tag: str | None = None, repo_type: str | None = None
) -> str:
    """The full name of the repository, if the token may write there and nothing stands against it."""
    validate_repo_id(repo_id)  # raises a ValueError that says what is accepted
    user = _retry(api.whoami)
    if "/" not in repo_id:
        repo_id = f"{user['name']}/{repo_id}"
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if owner not in owners:
        raise PermissionError(f"`repo_id`={repo_id!r}: the token is of {', '.join(owners)}, and not of {owner}.")
    if _retry(lambda: api.repo_exists(repo_id, repo_type=repo_type)):
        if private and not _is_private(api, repo_id, repo_type):
            kind = "the Space " if repo_type == "space" else ""
            raise ValueError(
                f"`private`: {kind}{repo_id} exists and is public. Change that in its settings, or choose another name."
            )
        if tag is not None and tag in (ref.name for ref in _retry(lambda: api.list_repo_refs(repo_id)).tags):
            raise ValueError(f"`tag`={tag!r} exists already in {repo_id}: choose another one.")
    return repo_id


def _is_private(api: HfApi, repo_id: str, repo_type: str | None = None) -> bool:
    return _retry(lambda: api.repo_info(repo_id, repo_type=repo_type)).private


def _create_repository(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, repo_type: str | None = None
) -> None:
    kind = {"repo_type": repo_type, "space_sdk": "gradio" if repo_type == "space" else None}
    _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True, **kind))
    if revision not in (None, "main"):
        _retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


def _upload(
    api: HfApi,
    files: dict[str, bytes | Path],
    repo_id: str,
    private: bool | None,
    revision: str | None,
    tag: str | None,
    commit_message: str | None,
    repo_type: str | None = None,
) -> CommitInfo:
    # ModelCard.validate, which calls this one, asks huggingface.co wherever HF_ENDPOINT leads, before version 2
    _retry(lambda: api._validate_yaml(read_content(files["README.md"]).decode(), repo_type=repo_type))
    _create_repository(api, repo_id, private, revision, repo_type)

    def commit() -> CommitInfo:
        # Anew for each attempt. A commit whose answer was lost is found to have changed nothing, and not made twice.
        present = api.list_repo_files(repo_id, revision=revision, repo_type=repo_type)
        stale = sorted(path for path in present if path not in files and _is_replaced(path, repo_type))
        if stale:
            logger.warning(
                f"{', '.join(stale)} of {repo_id} are of an earlier upload, which this one replaces, and are removed."
            )
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {'the demo page' if repo_type == 'space' else 'NCSNPipeline'}",
            revision=revision,
            repo_type=repo_type,
        )

    info = _retry(commit)
    if tag is not None:
        _retry(lambda: api.create_tag(repo_id, tag=tag, revision=info.oid))
    return info


def _is_replaced(path: str, repo_type: str | None) -> bool:
    """
    Whether a file in the repository belongs to an earlier upload, and goes if the next one does not have it. A variant
    of the weights that stayed would load as if it were of the new network.
    """
    if repo_type == "space":
        return path.startswith((f"{PACKAGE.name}/", f"{PACKAGE.name}-"))
    return path.startswith(f"unet/{WEIGHTS}") or is_module(path)


def _retry(function: Callable[[], Any]) -> Any:
    """
    What the function returns. It is called again, after a while, where the Hub or the way there has failed.

    Raises:
        OSError: it has failed each time.
        PermissionError: the token is missing, invalid, or not enough.
        Exception: what the function raises for a reason that will not pass.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return function()
        except Exception as error:
            status = _status(error)
            if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
                raise PermissionError(
                    "The Hub does not let you do that: log in by `hf auth login`, or give a `token` that may write, "
                    "from https://huggingface.co/settings/tokens."
                ) from None
            passing = status in (408, 429) or (status or 0) >= 500 or (status is None and _is_of_the_network(error))
            if not passing:
                raise
            if attempt == _ATTEMPTS - 1:
                raise OSError(f"The Hub has failed {_ATTEMPTS} times, the last time with: {error}") from error
            wait = _FIRST_WAIT * 2**attempt
            logger.warning(f"The Hub has failed ({type(error).__name__}); trying again in {wait:g} seconds.")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _causes(error: BaseException):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error goes back to."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return cause.response.status_code
    return None


def _is_of_the_network(error: BaseException) -> bool:
    # by the module, since the client's versions use different libraries for HTTP
    modules = {type(cause).__module__.split(".")[0] for cause in _causes(error)}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl", "socket"}) or any(
        isinstance(cause, ConnectionError | TimeoutError) for cause in _causes(error)
    )
