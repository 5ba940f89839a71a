"""Which number format, layout of images in memory and kernel of attention the device computes fast with."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

DESCRIPTIONS = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def cpu_has_bfloat16() -> bool:
    """
    Whether this CPU multiplies bfloat16 by instructions of its own: AVX512-BF16 or AMX.

    Without them bfloat16 is emulated, and several times slower than float32. torch before 2.6 does not tell, and is
    taken to have none.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    # before torch 2.10 by these names
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))


def fast_memory_format(device: torch.device, dtype: torch.dtype, num_dims: int) -> torch.memory_format:
    """
    The layout for a network's weights and data of `num_dims` dimensions: for images channels last, except for a CPU's
    convolutions in bfloat16. Signals have no such layout, and for volumes it has not been measured.
    """
    on_cpu_in_bf16 = device.type == "cpu" and dtype == torch.bfloat16
    return torch.contiguous_format if on_cpu_in_bf16 or num_dims != 2 else torch.channels_last


def fast_attention(device: torch.device, dtype: torch.dtype, num_tokens: int) -> AbstractContextManager:
    """
    A context to train in, in which attention to this number of tokens is computed by its fused kernel or, where that is
    faster, by products of matrices.

    The latter is so on a CPU in bfloat16 for few tokens. One thread of an EPYC core, 64 channels, forward and backward:

    | samples × tokens | 32 × 49 | 32 × 64 | 16 × 256 |
    | --- | --- | --- | --- |
    | fused kernel, ms | 5.3 | 5.7 | 13.8 |
    | products, ms | 2.9 | 3.7 | 19.8 |
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and num_tokens <= 64:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
