"""This module chooses the device of a model."""

from __future__ import annotations

import torch

from memscan.errors import ModelError


def require_device(name: str) -> torch.device:
    """Return the torch device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ModelError: it is no device's name, or there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"no device is called {name!r}", hint="use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name!r} is not available to torch", hint="use device cpu, or install torch for CUDA")
    return device
