"""Reads an untrusted file in bounds: no more than is in it, and no more than a budget."""

import io
from dataclasses import dataclass

# The most that a pickle may cost. A read costs its bytes and READ_COST, as one byte (an empty dict)
# can take a hundred bytes of memory. This allows four million reads, or as many bytes of
# module_src; a training state needs less than a million.
BUDGET = 2**27
READ_COST = 32
LINE_BYTES = 256  # a GLOBAL's module or name


class Refused(Exception):
    """A file is refused; `rdm_jax.interop.torch_files` turns this into an InputError.

    Attributes:
      problem: what is wrong with the file ("it"); without a final stop.
      fix: what to do instead, one imperative sentence; '' for the default of the file's kind.
    """

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A byte string that stays in the file: its start and its length, which is within the file."""

    file: io.BufferedIOBase
    start: int
    length: int

    def read(self, start: int, count: int) -> bytes:
        """Some of its bytes. Raises Refused, before anything is allocated, if some are outside."""
        if not 0 <= count <= self.length - start:
            raise Refused("it ends early")
        self.file.seek(self.start + start)  # other regions of the file are read in between
        data = self.file.read(count)
        if len(data) != count:
            raise Refused("it ends early")
        return data


def quoted(text: str) -> str:
    """A text from the file for use in a message: escaped, and cut if it is long."""
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


class ByteReader:
    """A region read in order.

    Raises:
      Refused: a read beyond the region's end or beyond the budget, before anything is allocated.
    """

    def __init__(self, region: Region, budget: int = BUDGET):
        self._region, self._position, self._budget = region, 0, budget

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        self._budget -= count + READ_COST
        if self._budget < 0 and count <= self._region.length - self._position:
            raise Refused("it has too much data beside its tensors")
        data = self._region.read(self._position, count)
        self._position += count
        return data

    def readline(self) -> bytes:
        """The next line, of at most LINE_BYTES."""
        line = b""
        while not line.endswith(b"\n"):
            if len(line) == LINE_BYTES:
                raise Refused(f"it has a name of more than {LINE_BYTES} bytes")
            line += self.read(1)
        return line

    def skip(self, count: int) -> Region:
        """The region of the next `count` bytes, which are not read."""
        if not 0 <= count <= self._region.length - self._position:
            raise Refused("it ends early")
        self._position += count
        return Region(self._region.file, self._region.start + self._position - count, count)

    def rest(self) -> Region:
        """The region of everything that is not read yet."""
        return self.skip(self._region.length - self._position)
