"""The data of preference_shift.sh: prompts for training and for choosing, flipped labels, two populations of raters.

    python experiments/shift_data.py split COMPLETIONS OUTPUT --share=0.5 --seed=1
    python experiments/shift_data.py flip PAIRS OUTPUT --share=0.25 --seed=1 --test_pairs=16
    python experiments/shift_data.py mix MANY FEW OUTPUT --share=0.15 --seed=1 --test_pairs=16

`split` deals the prompts of COMPLETIONS/train.jsonl to OUTPUT/train.jsonl and, a share of them, to OUTPUT/test.jsonl:
step 2 then makes training pairs and validation pairs of them. `flip` swaps chosen and rejected in a share of the training
pairs. `mix` takes a share of the training pairs from FEW and the others from MANY, the same prompts labelled by other
objectives. The test pairs, which the trainer evaluates on, are those of the target, the first so many of them: as they are
after `flip`, half from either after `mix`. `split` also writes the held-out prompts to OUTPUT/prompts. OUTPUT appears whole
or not at all.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from drdpo.errors import DataError, UsageError, one_line_errors
from drdpo.files import atomic_folder
from drdpo.manifest import fingerprint, write_manifest
from drdpo.records import SPLITS, Completion, Preference, Prompt, read_records, write_records

Pairs = dict[str, list[Preference]]


def split_prompts(completions: list[Completion], share: float, seed: int) -> dict[str, list[Completion]]:
    """{"train", "test": completions}: round(share x prompts) prompts, drawn by the seed, go to "test".

    Raises:
        DataError: one side would be empty.
    """
    prompt_ids = sorted({row.prompt_id for row in completions})
    held_out = {prompt_ids[row] for row in _drawn(len(prompt_ids), share, seed)}
    if not 0 < len(held_out) < len(prompt_ids):
        raise DataError(f"{share:g} of {len(prompt_ids)} prompts leaves one side empty; sample more")
    return {
        "train": [row for row in completions if row.prompt_id not in held_out],
        "test": [row for row in completions if row.prompt_id in held_out],
    }


def flip_pairs(pairs: list[Preference], share: float, seed: int) -> list[Preference]:
    """The pairs in their order, chosen and rejected (texts, ids and scores) swapped in round(share x pairs) of them."""
    flipped = set(_drawn(len(pairs), share, seed))
    return [_swapped(pair) if row in flipped else pair for row, pair in enumerate(pairs)]


def mix_pairs(many: list[Preference], few: list[Preference], share: float, seed: int) -> list[Preference]:
    """The prompts that both have, in the order of `many`: round(share x prompts) pairs of `few`, the others of `many`.

    Raises:
        DataError: no prompt in common.
    """
    of_few = {pair.prompt_id: pair for pair in few}
    common = [pair for pair in many if pair.prompt_id in of_few]
    if not common:
        raise DataError("the two sets of pairs have no prompt in common")
    drawn = set(_drawn(len(common), share, seed))
    return [of_few[pair.prompt_id] if row in drawn else pair for row, pair in enumerate(common)]


def _drawn(count: int, share: float, seed: int) -> list[int]:
    return [int(row) for row in np.random.default_rng(seed).permutation(count)[: round(share * count)]]


def _swapped(pair: Preference) -> Preference:
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_score=pair.rejected_score,
        rejected_score=pair.chosen_score,
        chosen_token_ids=pair.rejected_token_ids,
        rejected_token_ids=pair.chosen_token_ids,
    )


def _pairs(folder: str) -> Pairs:
    return {split: read_records(Path(folder, f"{split}.jsonl"), Preference.from_row) for split in SPLITS}


def make(words: argparse.Namespace) -> dict[str, list[Completion]] | Pairs:
    """{split: records} of the command."""
    if words.command == "split":
        completions = read_records(Path(words.inputs[0], "train.jsonl"), Completion.from_row)
        return split_prompts(completions, words.share, words.seed)
    first = _pairs(words.inputs[0])
    if words.command == "flip":
        return {"train": flip_pairs(first["train"], words.share, words.seed), "test": first["test"][: words.test_pairs]}
    second = _pairs(words.inputs[1])
    return {
        "train": mix_pairs(first["train"], second["train"], words.share, words.seed),
        "test": mix_pairs(first["test"], second["test"], 0.5, words.seed)[: words.test_pairs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count in (("split", 1), ("flip", 1), ("mix", 2)):
        command = commands.add_parser(name)
        command.add_argument("inputs", nargs=count)
        command.add_argument("output")
        command.add_argument("--share", type=float, required=True)
        command.add_argument("--seed", type=int, required=True)
        if name != "split":
            command.add_argument("--test_pairs", type=int, required=True)
    words = parser.parse_args()
    if not 0 <= words.share <= 1:
        raise UsageError(f"--share={words.share:g} must lie in [0, 1]")
    for name, least in (("seed", 0), ("test_pairs", 1)):
        if getattr(words, name, least) < least:
            raise UsageError(f"--{name}={getattr(words, name)} must be at least {least}")
    output = Path(words.output)
    files = [Path(folder, f"{split}.jsonl") for folder in words.inputs for split in SPLITS]
    flags = {name: value for name, value in vars(words).items() if name not in ("inputs", "output")}
    made_by = flags | {"inputs": [fingerprint(file) for file in files if file.is_file()]}
    records = make(words)
    with atomic_folder(output) as aside:
        counts = {split: write_records(aside / f"{split}.jsonl", rows) for split, rows in records.items()}
        if words.command == "split":
            prompts = {row.prompt_id: Prompt(row.prompt_id, row.prompt) for row in records["test"]}
            (aside / "prompts").mkdir()
            write_records(aside / "prompts" / "test.jsonl", prompts.values())
        write_manifest(aside, "shift_data", made_by, counts=counts)
    print(f"{output}: {counts['train']} train, {counts['test']} test")


if __name__ == "__main__":
    with one_line_errors():
        main()
