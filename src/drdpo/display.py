"""Text of unknown origin, made fit for a terminal: harmless, wrapped, cut."""

import textwrap
import unicodedata

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
