"""This module is a register: a folder of numbered files, of which the highest number is current.

It is changed by compare-and-swap.

    folder/000001.json  000002.json  000003.json      <- the current one

A change reads the highest number, makes the content that follows from it, and creates the next number. Of several
processes that do so at once exactly one creates it (`storage.create_new`: a link on a disk, a conditional put on S3);
the others see that they lost, read again and decide again. So no process makes a change to a state that it has not
seen, whatever stalls, dies or comes back in between, and no clock is used. The highest file is never deleted. Lower
ones may be deleted, and a process that was away until its number had been created and deleted again is told that it
lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from memscan.io import storage

_ENDING = ".json"


@dataclass(frozen=True)
class Register:
    """This is the register of a folder, local or s3://.

    It keeps nothing in memory; every method reads or writes storage.
    """

    folder: str

    def file(self, number: int) -> str:
        """Return the path of a number's content."""
        return storage.join(self.folder, f"{number:06d}{_ENDING}")

    def numbers(self) -> list[int]:
        """Return the numbers that are there, ascending. Raises InputError if the folder cannot be listed."""
        if not storage.is_dir(self.folder):
            return []
        names = [file.rsplit("/", 1)[-1].removesuffix(_ENDING) for file in storage.list_files(self.folder, _ENDING)]
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def latest(self) -> int:
        """Return the number that counts; 0 for none."""
        return max(self.numbers(), default=0)

    def swap(self, seen: int, content: bytes) -> bool:
        """Make `content` the one that counts if `seen` still is the latest number; whether that was so.

        Args:
            seen: the number that the content was made from; it becomes the content of `seen + 1`.
            content: distinct from what any other process would write (a version, a token), for a put whose answer
                was lost is told from another process's put by its bytes.

        Raises:
            MemscanError: the place cannot be written.
        """
        path = self.file(seen + 1)
        if not storage.create_new(path, content) and storage.read_bytes(path) != content:
            return False
        # Numbers are deleted from below: where the one that was seen is gone, ours had been there before and was too.
        numbers = self.numbers()
        return seen in numbers if seen else numbers == [1]

    def keep(self, count: int) -> None:
        """Delete all numbers but the last `count` (at least 2), lowest first."""
        for number in self.numbers()[: -max(2, count)]:
            storage.remove_tree(self.file(number))
