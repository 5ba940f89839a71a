"""The processes of a run: how they start, fail and are interrupted together."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, gather_object, parse_flag_from_env

from .. import precision
from . import checkpoints
from .config import TrainingConfig

# Each process holds the whole network
_REPLICATED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
)


# Variables by which `accelerate launch` asks for a network that is cut into parts
_SHARDING = (
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """
    The processes of a run. Of what `accelerate launch` leaves in the environment, the device and the precision hold,
    and the settings replace the rest.

    Raises:
        ValueError: `logger` needs a package that is not installed, or the environment asks for a sharded network or for
            a precision that there is not.
    """
    for name in _SHARDING:
        if parse_flag_from_env(name):
            raise ValueError(
                f"{name}={os.environ[name]} shards the network, but training needs a whole copy in each process: "
                "choose multi-GPU without it in `accelerate config`."
            )
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device  # as the Accelerator chooses it
    mixed_precision, reason = choose_mixed_precision(config, device)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()  # it would hold a process to the precision of its first run
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # unlike the bare numbers, these replace the environment's
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        dynamo_backend="no",
        log_with=_check_logger(config.logger),
        project_dir=config.output_dir,
    )
    if accelerator.distributed_type not in _REPLICATED:
        raise ValueError(
            f"{accelerator.distributed_type} shards the network, but training needs a whole copy in each process: "
            "choose multi-GPU without it in `accelerate config`."
        )
    if accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        # `accelerate launch` gives a CPU process one thread, and leaves the other cores idle
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    accelerator.print(f"The network computes in {precision.DESCRIPTIONS[mixed_precision]}: {reason}.")
    for line in describe_environment(config):
        accelerator.print(line)
    return accelerator


def describe_environment(config: TrainingConfig) -> list[str]:
    """Which of accelerate's variables would change the run, and what becomes of them, a sentence each."""
    lines = []
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps is not None and steps != str(config.gradient_accumulation_steps):
        lines.append(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} is ignored: `gradient_accumulation_steps`="
            f"{config.gradient_accumulation_steps} holds."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        lines.append(
            f"ACCELERATE_DYNAMO_BACKEND={backend} is ignored: `compile` decides whether the network is compiled."
        )
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING")
    if clipping is not None and clipping != str(config.max_grad_norm):
        lines.append(
            f"ACCELERATE_GRADIENT_CLIPPING={clipping} is ignored: `max_grad_norm`={config.max_grad_norm} holds."
        )
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):
        value = os.environ.get(name, "")
        if value.lower() not in ("", "false", "0"):
            lines.append(f"{name}={value} chooses the device.")
    return lines


def choose_mixed_precision(config: TrainingConfig, device: torch.device) -> tuple[str, str]:
    """
    What the config says, or else the checkpoint to resume from, or `accelerate launch`, or else what is fast on this
    device; and in words, why.
    """
    if config.mixed_precision is not None:
        return config.mixed_precision, "`mixed_precision` says so"
    checkpoint = checkpoints.find(config.resume_from_checkpoint, config.output_dir)
    if checkpoint is not None and checkpoints.is_complete(checkpoint):
        return checkpoints.read_manifest(checkpoint)["config"]["mixed_precision"], "the run that resumes did"
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # "no" also if nobody chose it
    if launched not in precision.DESCRIPTIONS:
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={launched}: the network computes in {', '.join(precision.DESCRIPTIONS)} only, "
            "as `accelerate config` or `mixed_precision` may say."
        )
    if launched != "no":
        return launched, "accelerate's settings say so"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "this GPU supports it"
    if device.type == "cpu" and precision.cpu_has_bfloat16():
        return "bf16", "this CPU has instructions for it"
    return "no", f"no faster format is known for this {device.type.upper()}"


def _check_logger(logger: str | None) -> str | None:
    available = sorted(map(str, get_available_trackers()))
    if logger not in (None, "all", *available):
        raise ValueError(
            f"`logger`={logger!r} needs a package that is not installed; available are: "
            f"{', '.join(available) or 'none'}."
        )
    return logger


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """
    Make an error in one process an error in all. Otherwise the others would wait for it forever in the next
    collective operation. The block itself must not contain any.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    kind = FloatingPointError if isinstance(failure, FloatingPointError) else OSError
    failures = gather_object([None if failure is None else (kind, str(failure))])
    if failure is not None:
        raise failure
    for kind, message in filter(None, failures):
        raise kind(message)


@contextmanager
def interrupts(message: str) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, with this message; a second one has its usual effect."""
    interrupt = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield interrupt
        return

    def handle(number, _):
        signal.signal(number, previous[number])
        interrupt.set()
        if message:
            os.write(2, f"\n{message}\n".encode())  # print may be running, and cannot be called a second time

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
