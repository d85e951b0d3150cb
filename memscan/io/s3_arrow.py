"""pyarrow's way to S3, through s3fs and not pyarrow's own client: both doors have the same credentials."""

from __future__ import annotations

from typing import Any

from pyarrow import PythonFile
from pyarrow.fs import FSSpecHandler

from memscan.io.s3 import Told, one_line


class ArrowHandler(FSSpecHandler):  # type: ignore[misc]
    """Opens files whose failures are one line, and otherwise does what pyarrow's handler does."""

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        with one_line(f"s3://{path}", "read"):
            return PythonFile(Told(self.fs.open(path, mode="rb"), f"s3://{path}", "read"), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        with one_line(f"s3://{path}", "write"):
            return PythonFile(Told(self.fs.open(path, mode="wb"), f"s3://{path}", "write"), mode="w")

    def get_file_info(self, paths: Any) -> Any:
        with one_line(f"s3://{paths[0] if paths else ''}", "read"):
            return super().get_file_info(paths)
