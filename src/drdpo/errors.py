"""Errors that a user can cause, as one line and an exit status; and text of unknown origin made safe for a terminal.

A wrong command ends with status 2; unusable data or a failed helper process with status 1. Bugs keep their traceback.
"""

import errno
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STOPPED = os.EX_TEMPFAIL
"""Exit status of a run that a signal stopped and that can be resumed: 75, "temporary failure" of sysexits.h."""
_ORDINARY = "\n\u200c\u200d"
"""Control and format characters that ordinary text needs: joiners in Persian, in Indic scripts, in emoji."""


class UsageError(Exception):
    """The command line requests something impossible. Ends the process with status 2."""


class DataError(Exception):
    """An input or output file is not usable; the message names file, row and field. Ends the process with status 1."""


class ProcessError(Exception):
    """A helper process of this step died or failed. Ends the process with status 1."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that a user can cause into one line on stderr and an exit status; bugs keep their traceback."""
    try:
        yield
    except (UsageError, DataError, ProcessError) as error:
        _stop(str(error), 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop(f"the disk is full while writing {error.filename or 'a file'}; nothing half written was kept", 1)
        if error.errno in (errno.EACCES, errno.EROFS):
            _stop(f"no permission to read or write {error.filename or 'a file'}: {error.strerror}", 1)
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR) and error.filename:
            _stop(_misplaced(error), 1)
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP) and error.filename:
            _stop(f"{os.fsdecode(error.filename)[:200]}: {error.strerror}", 2)
        raise


def _misplaced(error: OSError) -> str:
    """The message for a file where a folder must be, or the reverse. os.replace's target is the second file name."""
    path = Path(os.fsdecode(error.filename2 or error.filename))
    if error.errno == errno.EISDIR:
        return f"{path} is a folder, where a file must be; move it away or pass another path"
    files = [place for place in (path, *path.parents) if place.is_file()]
    why = "is a file, where a folder must be; move it away or pass another path"
    return f"{files[0]} {why}" if files else f"{path}: {error.strerror}"


def _stop(message: str, status: int) -> None:
    # A message may quote data that contains escape sequences.
    print("error: " + one_line(message), file=sys.stderr, flush=True)
    sys.exit(status)


# Text of unknown origin.


def is_text(content: str) -> bool:
    """Is it text that UTF-8 and tokenizers can encode? JSON can spell half of a surrogate pair, which is not."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def harmless(text: str) -> str:
    """Text that a terminal displays instead of interpreting it.

    Control characters (escape sequences move the cursor, set colours or the window's title), characters that change the
    writing direction or are invisible, and lone surrogates become escapes such as \\x1b. Line feeds stay, tabs become
    spaces."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text.replace("\r\n", "\n").replace("\t", "    ")))


def one_line(text: str, most: int | None = None) -> str:
    """The same on one line, for names and messages; cut to `most` characters, then ending in an ellipsis."""
    line = harmless(" ".join(text.split()))
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


def reason(error: BaseException) -> str:
    """What another library's error says, on one line of at most 200 characters; its type if it says nothing."""
    return one_line(str(error), 200) or type(error).__name__


def shortened(text: str, width: int, lines: int) -> list[str]:
    """The same, wrapped to at most `width` columns; of a text of more than `lines` lines, at least 3, the beginning and the
    end."""
    # Cut first: wrapping a megabyte on one line would take seconds.
    room = width * lines
    parts = [text.strip()] if len(text) <= 2 * room else [text[:room].lstrip(), text[-room:].rstrip()]
    wrapped = [
        line
        for part in parts
        for paragraph in harmless(part).split("\n")
        for line in textwrap.wrap(paragraph, width) or [""]
    ]
    if len(wrapped) <= lines and len(parts) == 1:
        return wrapped
    tail = (lines - 1) // 3
    return [*wrapped[: lines - 1 - tail], f"[... of {len(text):,} characters ...]", *wrapped[len(wrapped) - tail :]]


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _escaped(character: str) -> str:
    steers = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _ORDINARY
    return character.encode("unicode_escape").decode() if steers else character
