"""The ways a step says no: the command is wrong (exit status 2); the data is wrong or a helper process died (status 1)."""

import errno
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Text of unknown origin, made fit for a terminal: harmless, wrapped, cut.

_JOINERS = "\u200c\u200d"
"""Format characters that ordinary text needs: in Persian, in Indic scripts, in emoji."""


def is_text(content: str) -> bool:
    """JSON can spell half of a surrogate pair, which neither UTF-8 nor a tokenizer can."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def harmless(text: str) -> str:
    """Text that a terminal shows and does not obey.

    Control characters (an escape sequence moves the cursor, sets colours or the window's title), characters that turn
    the writing direction or are invisible, and lone surrogates become escapes such as \\x1b. Line feeds stay, tabs become
    blanks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text.replace("\r\n", "\n").replace("\t", "    ")))


def one_line(text: str, most: int | None = None) -> str:
    """The same on one line, for names, reasons and messages; of `most` characters, the last an ellipsis where it is cut."""
    line = harmless(" ".join(text.split()))
    return line if most is None or len(line) <= most else line[: most - 1] + "…"


def shortened(text: str, width: int, lines: int) -> list[str]:
    """The same as lines; of a text that has more, the beginning and the end.

    Args:
        text: of any length.
        width: most columns of a line.
        lines: most lines, at least 3.
    """
    # Cut before it is wrapped: a megabyte on one line would take seconds, for nothing.
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
    if character == "\n" or character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode()


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
