"""HelpSteer2's flattened conversations (Wang et al. 2024, arXiv 2406.08673) as messages."""

import re

from drdpo.records import Message

_MARKER = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def split_helpsteer_turns(text: str) -> list[Message]:
    """Split a HelpSteer2 prompt into messages.

    About 29% of HelpSteer2's prompts are conversations, written as one string: the first user turn, then turns opened by
    "\\n<extra_id_1>Assistant\\n" and "\\n<extra_id_1>User\\n".

    Args:
        text: the data set's `prompt` field.

    Returns:
        Messages that alternate user, assistant, ..., user, with outer white space stripped.

    Raises:
        ValueError: the turns do not alternate, one is empty, or the last is not the user's.
    """
    first, *rest = _MARKER.split(text)
    if not first.strip() and rest:  # The text opens with a marker of its own.
        turns = list(zip(rest[0::2], rest[1::2], strict=True))
    else:
        turns = [("User", first), *zip(rest[0::2], rest[1::2], strict=True)]
    messages = [{"role": role.lower(), "content": content.strip()} for role, content in turns]
    for number, message in enumerate(messages):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"turn {number + 1} is the {message['role']}'s where the {expected}'s is due")
        if not message["content"]:
            raise ValueError(f"turn {number + 1} is empty")
    if messages[-1]["role"] != "user":
        raise ValueError("the prompt does not end in a user turn")
    return messages
