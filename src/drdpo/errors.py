"""The ways a step says no: the command is wrong (exit status 2); the data is wrong or a helper process died (status 1)."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
        raise


def _stop(message: str, status: int) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(status)
