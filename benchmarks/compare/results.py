"""The file of results: one JSON line for each finished run."""

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from benchmarks.compare.errors import CompareError
from benchmarks.compare.settings import key_of


def read(path: Path) -> dict[str, dict]:
    """The finished runs by their keys.

    Raises:
        CompareError: If a line is damaged; the message names file and line, and how to repair it.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise CompareError(f"{path} is no file: results cannot be kept there")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CompareError(f"{path} cannot be read: {error}") from error
    runs = {}
    for i, line in enumerate(lines, start=1):
        if i == len(lines) and not line:
            break
        try:
            run = json.loads(line)
            key = key_of(run["spec"])
            complete = {"loss", "diverged", "curve", "bytes"} <= run.keys()
        except (ValueError, KeyError, TypeError):
            complete = False
        # without its line break a last line may look whole and yet be followed by the next run
        if not complete or i == len(lines):
            raise CompareError(
                f"{path}, line {i}: not a whole result, as if writing it had been cut off ({line[:60]!r}...). Nothing was "
                f"changed. Repair the line, or delete it, and its run is repeated: sed -i '{i}d' {path}"
            )
        runs[key] = run
    return runs


def append(path: Path, run: dict) -> None:
    """Add a run, all of it or nothing.

    Raises:
        CompareError: If it cannot be written, as on a full disk. The file is then as it was, and the message holds the line.
    """
    line = json.dumps(run, allow_nan=False)
    data = line.encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: one write, of which a part may be refused
        with open(path, "ab", buffering=0) as file:
            # another harness may write to the same file
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise CompareError(
            f"{path} cannot be written: {error}. Nothing of this run was kept there. Make room and start again; the runs "
            f"before it are safe. To save this one, add its line:\n{line}"
        ) from error
