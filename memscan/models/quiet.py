"""This module loads models without the libraries' bars and tables.

The adapters check the important messages and raise them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Let transformers and diffusers show no progress bars and log only errors inside the block.

    The settings are restored afterwards.

    Nor does transformers ask on standard input whether it may run a folder's code: where nobody set
    `trust_remote_code` (diffusers does not for a pipeline's parts), the question raises ValueError at once.
    """
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    before = [(module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
    for module in modules:
        module.set_verbosity_error()
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, (verbosity, bars) in zip(modules, before, strict=True):
            module.set_verbosity(verbosity)
            if bars:
                module.enable_progress_bar()
