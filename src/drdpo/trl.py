"""TRL's forms of a preference, conversational or plain, with the prompt apart or inside, as a row of our own."""

from typing import Any


def own_form(row: dict[str, Any], number: int) -> dict[str, Any]:
    """A row in one of TRL's forms as a row that Preference.from_row reads.

    Args:
        row: prompt, chosen and rejected as message lists or texts, or chosen and rejected with the shared prompt inside.
        number: the prompt_id of a row that has none.

    Raises:
        ValueError: naming the field, when the row has none of these forms.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise ValueError(f'field "{name}" is missing (the row has {", ".join(sorted(row)) or "no fields"})')
    prompt, chosen, rejected = row.get("prompt"), _turns(row["chosen"]), _turns(row["rejected"])
    if prompt is None:
        if not isinstance(row["chosen"], list) or not isinstance(row["rejected"], list):
            raise ValueError('field "prompt" is missing, and the texts of "chosen" and "rejected" do not hold it')
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        # Some data sets repeat the given prompt before each answer.
        chosen, rejected = (
            answer[-1:] if isinstance(answer, list) and answer[:-1] == prompt else answer for answer in (chosen, rejected)
        )
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, list) and len(answer) != 1:
            raise ValueError(f'field "{name}" must hold one assistant turn after the prompt, not {len(answer)}')
    own = {name: row.get(name) for name in ("chosen_token_ids", "rejected_token_ids", "chosen_score", "rejected_score")}
    prompt_id = row.get("prompt_id")
    own["prompt_id"] = prompt_id if isinstance(prompt_id, int) else number
    return {**own, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _turns(answer: Any) -> Any:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
