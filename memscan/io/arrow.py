"""This module lets pyarrow read a store through its fsspec driver, so that both use the same credentials."""

from __future__ import annotations

from typing import Any

from pyarrow import PythonFile
from pyarrow.fs import FSSpecHandler

from memscan.io.faults import ToldFile, one_line


class ArrowHandler(FSSpecHandler):  # type: ignore[misc]
    """This opens files whose failures are one line, and otherwise does what pyarrow's handler does.

    Args:
        fs: an fsspec file system.
        scheme: of the paths, for messages.
    """

    def __init__(self, fs: Any, scheme: str) -> None:
        super().__init__(fs)
        self._scheme = scheme

    def _named(self, path: str) -> str:
        return f"{self._scheme}://{path.lstrip('/')}"

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        with one_line(self._named(path), "read"):
            return PythonFile(ToldFile(self.fs.open(path, mode="rb"), self._named(path), "read"), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        with one_line(self._named(path), "write"):
            return PythonFile(ToldFile(self.fs.open(path, mode="wb"), self._named(path), "write"), mode="w")

    def get_file_info(self, paths: Any) -> Any:
        with one_line(self._named(paths[0] if paths else ""), "read"):
            return super().get_file_info(paths)
