"""A pipeline with the scheduler that a command line names: what the scripts that draw pictures share."""

import difflib
import inspect
import json
from collections.abc import Sequence
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .pipeline_ncsn import NCSNPipeline
from .scheduling_annealed_langevin import AnnealedLangevinScheduler


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """
    `name=value` pairs, whose values are JSON or else strings, and JSON objects, as one dictionary.

    Raises:
        ValueError: an item is neither.
    """
    settings = {}
    for item in items:
        if item.lstrip().startswith("{"):
            try:
                settings |= json.loads(item)
            except json.JSONDecodeError as error:
                raise ValueError(f"`scheduler_config`: {item} is not a JSON object: {error}.") from error
            continue
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"`scheduler_config` must be name=value pairs or a JSON object, not {item!r}.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return settings


def find_scheduler(name: str) -> type[SchedulerMixin]:
    """
    The scheduler class of that name.

    Raises:
        ValueError: diffusers has none.
    """
    scheduler_class = getattr(diffusers, name, None)
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin):
        return scheduler_class
    names = ["AnnealedLangevinScheduler", *AnnealedLangevinScheduler._compatibles]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"`scheduler`={name!r} is no scheduler of diffusers; {', '.join(names)} fit.{hint}")


def check_settings(scheduler_class: type[SchedulerMixin], settings: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the scheduler has no such setting; `from_config` would drop it without a word.
    """
    known = set(inspect.signature(scheduler_class.__init__).parameters) - {"self"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(
            f"`scheduler_config`: {scheduler_class.__name__} has no setting {', '.join(unknown)}, but "
            f"{', '.join(sorted(known))}."
        )


def load_pipeline(
    name: str, scheduler_class: type[SchedulerMixin] | None = None, settings: dict[str, Any] | None = None
) -> NCSNPipeline:
    """
    A pipeline from a folder or the Hub.

    Args:
        name (`str`): the folder, or the repository's id.
        scheduler_class (`type`, *optional*): the scheduler to sample with; the pipeline's own when not given.
        settings (`dict`, *optional*): settings of the scheduler that replace those of the pipeline's config.

    Raises:
        ValueError: there is no such pipeline, or the scheduler has no such setting.
    """
    try:
        pipe = NCSNPipeline.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"`pipeline`={name!r} cannot be loaded, as a folder or from the Hub: {error}") from error
    scheduler_class, settings = scheduler_class or type(pipe.scheduler), settings or {}
    check_settings(scheduler_class, settings)
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    return pipe
