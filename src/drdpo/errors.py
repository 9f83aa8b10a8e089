"""The ways a step says no: the command is wrong (exit status 2); the data is wrong or a helper process died (status 1)."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drdpo.display import one_line


class UsageError(Exception):
    """The command line asks for something that cannot be done. Ends the process with status 2."""


class DataError(Exception):
    """An input or output file is not usable; the message names file, row and field. Ends the process with status 1."""


class ProcessError(Exception):
    """A process that works for this step died or failed. Ends the process with status 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the errors a user can cause into one line on stderr and the right exit status; bugs keep their traceback."""
    try:
        yield
    except UsageError as error:
        _stop(str(error), 2)
    except (DataError, ProcessError) as error:
        _stop(str(error), 1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(f"the disk is full while writing {error.filename or 'a file'}; nothing half written was kept", 1)
        if error.errno in (errno.EACCES, errno.EROFS):
            _stop(f"no permission to write {error.filename or 'a file'}: {error.strerror}", 1)
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR) and error.filename:
            _stop(_misplaced(error), 1)
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and error.filename:
            _stop(f"{os.fsdecode(error.filename)[:200]}: {error.strerror}", 2)
        raise


def _misplaced(error: OSError) -> str:
    """In words: a file is where a folder must be, or the reverse. `error` names a path; os.replace's target comes second."""
    path = Path(os.fsdecode(error.filename2 or error.filename))
    if error.errno == errno.EISDIR:
        return f"{path} is a folder, where a file must be; move it away or give another path"
    file = next((place for place in (path, *path.parents) if place.is_file()), None)
    if file is None:
        return f"{path}: {error.strerror}"
    return f"{file} is a file, where a folder must be; move it away or give another path"


def _stop(message: str, status: int) -> None:
    # A message may quote data, whose escape sequences a terminal would obey.
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    sys.exit(status)
