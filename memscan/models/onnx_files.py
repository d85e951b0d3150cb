"""This module opens ONNX files from bytes whose hash was checked."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from memscan.errors import ModelError
from memscan.models.folders import first_line

logger = logging.getLogger(__name__)

# What `onnxruntime` calls the types of floating-point numbers that an exporter writes; bfloat16 has no NumPy type.
_FLOATS: dict[str, npt.DTypeLike] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def float_type(onnx_type: str) -> np.dtype[Any] | None:
    """Return the NumPy type of images that an input of this type takes; None if it takes other values than images."""
    found = _FLOATS.get(onnx_type)
    return None if found is None else np.dtype(found)


def open_session(data: bytes, path: str, device: str, threads: int) -> Any:
    """Open a session of onnxruntime over a file's bytes; no other file is read.

    Args:
        path: where the bytes come from, for messages.
        device: "cpu" or "cuda"; without the CUDA provider the CPU is used, with a warning.
        threads: threads inside one operator.

    Raises:
        ModelError: not an ONNX file that this runtime can run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        else:
            logger.warning("onnxruntime has no CUDA provider: it runs on the CPU (onnxruntime-gpu has one)")
    try:
        return onnxruntime.InferenceSession(data, sess_options=options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class
        what, hint = _reason(error)
        raise ModelError(f"not a loadable ONNX model ({what})", where=path, hint=hint) from error


# The code and the place in C++ that onnxruntime puts before a reason.
_BEFORE = re.compile(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?(/\S+:\d+ .*?\) (?=[A-Z]))?")
_NEWER = "export it for an older version of ONNX, or install a newer onnxruntime"


def _reason(error: Exception) -> tuple[str, str | None]:
    """Return why a file cannot be loaded, and what to do where it is newer than the runtime."""
    text = _BEFORE.sub("", " ".join(str(error).split()))
    if found := re.search(r"Opset (\d+) is under development.*till opset (\d+)", text):
        return f"its opset is {found[1]}, and this onnxruntime knows {found[2]} and older", _NEWER
    return text[:200] or first_line(error), _NEWER if "Unsupported model IR version" in text else None
