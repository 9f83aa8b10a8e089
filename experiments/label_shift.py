"""Methods trained on pairs that one mixture of people's ratings labels, judged on held-out pairs that others label.

HelpSteer2 (arXiv 2406.08673) has two answers a prompt, rated by people. Pairs are labelled by alpha r1 + (1 - alpha) r2 of
two attributes, standardised: for training at one alpha, and the same held-out pairs by --eval_mixture at several.

Shapes: P held-out pairs, S seeds, B draws of the bootstrap, A values of alpha.
"""

import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from parts import ROOT, Command, Experiment, Part, borrow, run_experiment, wrapper
from scipy.special import stdtrit

from drdpo.assets.download import split_helpsteer_turns
from drdpo.chat import Tokenizer, answer_token_ids, load_tokenizer, prompt_token_ids
from drdpo.cli import check_bounds, flag, require
from drdpo.config.data import PreferencesConfig
from drdpo.errors import DataError, UsageError, one_line
from drdpo.evaluation.statistics import Array, Layout, estimate
from drdpo.folder import atomic_file, lock_folder, read_json_object
from drdpo.objectives import flag_name
from drdpo.pairing import generate_preferences
from drdpo.records import SPLITS, Completion, read_rows, write_records

RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
METHODS = {
    "DPO": [],
    "cDPO": ["--label_smoothing=0.1"],
    "Dr. DPO": ["--drdpo_beta=1"],
    "KLDPO": ["--kldpo_tau=1"],
    "CVaR": ["--method=cvar:0.5"],
    "WDPO": ["--wdpo_rho=0.002", "--wdpo_prompt=once"],
}
"""With the strengths of docs/methods.md."""
ALPHAS, BETA, DRAWS = (0.0, 0.25, 0.5, 0.75, 1.0), 0.1, 2000
MEASURES = {"loss": (lambda signed: np.logaddexp(0, -signed), np.max), "accuracy": (lambda signed: signed > 0, np.min)}


@dataclass(frozen=True)
class LabelShiftConfig(Experiment):
    """The study of docs/label_shift.md: methods under a shift of people's preferences. Finished runs are skipped; after the
    last one the script writes <results>.json and <results>.png."""

    data: str = flag("folder with HelpSteer2's train.jsonl and validation.jsonl, or its id on the hub", "nvidia/HelpSteer2")
    output_path: str = flag("folder for pairs and finished runs", "outputs/label_shift")
    results: str = flag("path without extension for the results", str(ROOT / "docs" / "label_shift"))
    model_path: str = flag("policy", str(ROOT / "models" / "SmolLM2-135M"))
    first: str = flag("attribute r1, of weight alpha", "helpfulness")
    second: str = flag("attribute r2, of weight 1 - alpha", "verbosity")
    alpha: float = flag("of the training labels", 0.1, at_least=0, at_most=1)
    max_tokens: int = flag("largest number of tokens of a prompt and its two answers", 350, at_least=1)
    train_pairs: int = flag("rated pairs to train on, ties included", 28, at_least=2)
    test_pairs: int = flag("rated pairs to hold out; up to half are ordered differently by r1 and r2", 24, at_least=2)
    methods: list[str] = flag("DPO and others", list(METHODS))
    seeds: list[int] = flag("of the training runs", [1, 2, 3], at_least=0)
    max_steps: int = flag("optimizer steps", 3, at_least=1)
    train_batch_size: int = flag("pairs per optimizer step", 6, at_least=1)
    seconds: float = flag("start no run after this time; rerunning continues", 1e9, at_least=0)
    sbatch: str = flag("options of the jobs", "--gres=gpu:1 --time=4:00:00")

    def __post_init__(self) -> None:
        check_bounds(self)
        for name, value in (("first", self.first), ("second", self.second)):
            require(value in RATINGS, f"--{name}={value} is not one of {', '.join(RATINGS)}")
        require(self.first != self.second, f"--first and --second are both {self.first}; pass two attributes")
        wanted = self.methods[:1] == ["DPO"] and len({*self.methods} & {*METHODS}) == len(self.methods)
        require(wanted, f"--methods: pass DPO first, then any of {', '.join(METHODS)}, each once")
        require(len({*self.seeds}) == len(self.seeds) > 1, "--seeds: pass at least two, each once")
        require(Path(self.results).parent.is_dir(), f"--results={self.results}: no folder {Path(self.results).parent}")

    def weights(self, alpha: float) -> dict[str, float]:
        """{objective: weight} of a mixture."""
        return {f"helpsteer-{self.first}": alpha, f"helpsteer-{self.second}": 1 - alpha}


# Pairs -------------------------------------------------------------------------------------------------------------------


def rated_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of HelpSteer2's two splits."""
    for split in ("train", "validation"):
        if Path(source).is_dir():
            path = Path(source) / f"{split}.jsonl"
            yield from ((f"{path}, row {number}", row) for number, row in read_rows(path))
            continue
        import datasets

        try:
            rows = datasets.load_dataset(source, split=split)
        except Exception as error:  # The hub client raises errors of a dozen libraries.
            raise DataError(f"--data={source}: neither a folder nor on the hub ({one_line(str(error), 200)})") from error
        yield from ((f"{source}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, start=1))


def read_pairs(config: LabelShiftConfig, tokenizer: Tokenizer) -> list[tuple[Completion, Completion]]:
    """The two rated answers of every prompt, of one turn, whose tokens are within --max_tokens, in a fixed random order."""
    pairs, seen = list[tuple[Completion, Completion]](), set[str]()
    for text, rows in itertools.groupby(rated_rows(config.data), key=lambda found: found[1].get("prompt")):
        both = []
        for number, (where, row) in enumerate(rows):
            try:
                prompt = split_helpsteer_turns(text) if isinstance(text, str) else text
                answer = [{"role": "assistant", "content": row.get("response")}]
                scores = {f"helpsteer-{name}": row.get(name) for name in RATINGS}
                facts = {"prompt_id": len(seen), "sample_id": number, "prompt": prompt, "completion": answer}
                both.append(Completion.from_row({**facts, "token_ids": [], "finish_reason": "stop", "scores": scores}))
            except ValueError as error:
                raise DataError(f"{where}: not a rated answer as in HelpSteer2: {error}") from error
        texts = {one.completion[0]["content"].strip() for one in both} - {""}
        if text in seen or len(both) != 2 or len(texts) != 2 or len(both[0].prompt) > 1:
            continue
        seen.add(text)
        tokens = len(prompt_token_ids(tokenizer, both[0].prompt))
        tokens += sum(len(answer_token_ids(tokenizer, one.completion, one.prompt)) for one in both)
        if tokens <= config.max_tokens:
            pairs.append((both[0], both[1]))
    random.Random(0).shuffle(pairs)
    return pairs


def prepare(config: LabelShiftConfig, folder: Path) -> dict[str, Any]:
    """Write scored completions in this project's format, and pairs by the training mixture; returns facts of the ratings."""
    pairs = read_pairs(config, load_tokenizer(config.model_path))
    changes_PK = np.array([[one.scores[name] - other.scores[name] for name in one.scores] for one, other in pairs])
    signs_PK = np.sign(changes_PK)
    opposed_P = signs_PK[:, RATINGS.index(config.first)] * signs_PK[:, RATINGS.index(config.second)] < 0
    places = {split: [i for i in range(config.train_pairs, len(pairs)) if opposed_P[i] == split] for split in (False, True)}
    held = places[True][: config.test_pairs // 2]
    held += places[False][: config.test_pairs - len(held)]
    if len(held) < config.test_pairs:
        which = f"{len(pairs)} rated pairs have at most {config.max_tokens} tokens"
        raise DataError(f"{config.data}: {which}, too few for --train_pairs and --test_pairs; increase --max_tokens")
    (folder / "completions").mkdir(exist_ok=True)
    for split, part in zip(SPLITS, (pairs[: config.train_pairs], [pairs[i] for i in held]), strict=True):
        write_records(folder / "completions" / f"{split}.jsonl", itertools.chain.from_iterable(part))
    weights = {flag_name(name): weight for name, weight in config.weights(config.alpha).items()}
    paths = (str(folder / name) for name in ("completions", "pairs"))
    generate_preferences(PreferencesConfig(*paths, **weights, standardize_by="train", overwrite=True))
    both_KK, net_KK = np.abs(signs_PK).T @ np.abs(signs_PK), signs_PK.T @ signs_PK
    return {
        "rated_pairs": len(pairs),
        "correlations": np.nan_to_num(np.corrcoef(changes_PK.T)).round(3).tolist(),
        "disagree": ((both_KK - net_KK) / 2).astype(int).tolist(),
        "both_differ": both_KK.astype(int).tolist(),
        "pairs": {split: len(list(read_rows(folder / "pairs" / f"{split}.jsonl"))) for split in SPLITS},
    }


# Runs --------------------------------------------------------------------------------------------------------------------


def train(config: LabelShiftConfig, folder: Path, save: Path, method: str, seed: int) -> Command:
    """The command of one run."""
    mixed = [",".join(f"{name}:{weight:g}" for name, weight in config.weights(alpha).items()) for alpha in ALPHAS]
    return wrapper(
        "train_alignment.sh", *config.given("model_path train_batch_size max_steps"), f"--dataset_path={folder / 'pairs'}",
        f"--save_path={save}", f"--beta={BETA}", "--lora_rank=16", "--lora_merge=false", "--learning_rate=2e-3",
        "--warmup_ratio=0", f"--micro_batch_size={config.train_batch_size}", "--max_epochs=99",
        f"--max_len={2 * config.max_tokens}", "--gradient_checkpointing=false", "--log=none", "--eval_steps=0",
        "--save_steps=0", "--save_resume=false", f"--seed={seed}", *METHODS[method], "--eval_mixture",
        *(f"alpha_{100 * alpha:g}={mixture}" for alpha, mixture in zip(ALPHAS, mixed, strict=True)),
    )  # fmt: skip


def result_of(save: Path) -> dict[str, Any]:
    """What is kept of a run: the trainer's metrics and the held-out margins beta h."""
    lines, pairs = [line for _, line in read_rows(save / "metrics.jsonl")], read_json_object(save / "eval_pairs.json")
    rewards = zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True)
    return {
        "train_loss": [line["loss"] for line in lines], "prompt_ids": pairs["prompt_id"],
        "margins": [round(chosen - rejected, 7) for chosen, rejected in rewards],
        "metrics": {name: value for name, value in lines[-1].items() if name.startswith("eval_")},
    }  # fmt: skip


# Results -----------------------------------------------------------------------------------------------------------------


def labels(config: LabelShiftConfig, folder: Path) -> tuple[list[int], Array]:
    """Ids of the held-out pairs, and [A, P] labels at ALPHAS: 1 as the training mixture's, -1 the opposite, 0 none."""
    rows = [row for _, row in read_rows(folder / "pairs" / "test.jsonl")]
    changes_PN = np.array([[row["chosen_scores"][x] - row["rejected_scores"][x] for x in config.weights(0)] for row in rows])
    weights_AN = [list(config.weights(alpha).values()) for alpha in ALPHAS]
    return [row["prompt_id"] for row in rows], np.sign((weights_AN @ changes_PN.T).round(12))


def resampled(values_SP: Array, labelled_P: Array, counts_BP: Array) -> Array:
    """[1 + B + S]: the mean over labelled pairs and seeds, its draws over the pairs, and the mean of every seed."""
    counts_BP = counts_BP * labelled_P
    draws_B = counts_BP @ values_SP.mean(axis=0) / np.maximum(counts_BP.sum(axis=1), 1)
    means_S = values_SP[:, labelled_P > 0].mean(axis=1)
    return np.concatenate([[means_S.mean()], draws_B, means_S])


def summarise(labels_AP: Array, margins: dict[str, Array]) -> dict[str, dict[str, Any]]:
    """DPO's loss and the accuracy of every method at ALPHAS, the worst of them, and their differences from DPO's.

    Args:
        labels_AP: from `labels`.
        margins: {method: [S, P] beta h under the training mixture's labels}, DPO first.

    Returns:
        {method: {measure: {"alphas": [A], "worst": ..; and of the differences, the worst's last, "against_dpo": [A + 1] of
        [value, low, high], "detectable": [A + 1], see that function}}}
    """
    seeds, pairs = margins["DPO"].shape
    layout = Layout(pairs, DRAWS, (seeds,))
    counts_BP = np.random.default_rng(0).multinomial(pairs, [1 / pairs] * pairs, size=DRAWS)
    tables: dict[tuple[str, str], Array] = {}
    found: dict[str, dict[str, Any]] = {method: {} for method in margins}
    for method, margins_SP in margins.items():
        for measure, (of_signed, worst) in MEASURES.items():  # Of beta h under a label, and over alpha.
            entries = [resampled(of_signed(row_P * margins_SP), np.abs(row_P), counts_BP) for row_P in labels_AP]
            tables[method, measure] = table = np.stack([*entries, worst(entries, axis=0)])
            found[method][measure] = shown = {"alphas": table[:-1, 0].tolist(), "worst": table[-1, 0]}
            if method != "DPO":
                changes = table - tables["DPO", measure]
                shown["against_dpo"] = [list(asdict(estimate(row, layout)).values()) for row in changes]
                shown["detectable"] = [detectable(row, layout) for row in changes]
    return found


def detectable(entries: Array, layout: Layout) -> float:
    """The smallest true difference whose interval of `estimate` excludes 0 in about 80% of studies."""
    _, draws_B, means_S = np.split(entries, np.cumsum([1, layout.draws]))
    spreads = (draws_B.var(), layout.prompts - 1), (means_S.var(ddof=1) / len(means_S), len(means_S) - 1)
    half = math.sqrt(sum(stdtrit(degrees, 0.975) ** 2 * variance for variance, degrees in spreads))
    return half + 0.84 * math.sqrt(sum(variance for variance, _ in spreads))


def draw(config: LabelShiftConfig, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss and accuracy over alpha, a line a method, and the differences of the worst loss from DPO's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    grey = {"color": "#999999", "linewidth": 1}
    for number, (method, row) in enumerate(found.items()):
        for panel, measure in zip(axes, MEASURES, strict=False):
            panel.plot(ALPHAS, row[measure]["alphas"], "o-", markersize=4, linewidth=1.3, color=f"C{number}", label=method)
        if method != "DPO":
            value, low, high = row["loss"]["against_dpo"][-1]
            axes[2].plot([low, high], [number, number], color=f"C{number}", linewidth=2)
            axes[2].plot(value, number, "o", color=f"C{number}")
    for panel, measure, chance in zip(axes, MEASURES, (math.log(2), 0.5), strict=False):
        panel.axvline(config.alpha, linestyle=":", **grey)
        panel.axhline(chance, linestyle="--", **grey)
        panel.set(xlabel=f"weight alpha of {config.first}; the rest is {config.second}", ylabel=f"held-out {measure}")
    axes[0].legend(fontsize=8)
    axes[2].axvline(0, linestyle="--", **grey)
    axes[2].set(yticks=range(1, len(found)), yticklabels=list(found)[1:], xlabel="worst loss over alpha, minus DPO's, 95%")
    axes[2].invert_yaxis()
    with atomic_file(path, "wb") as stream:
        figure.savefig(stream, dpi=120, format="png", metadata={"Software": None})


def finish(config: LabelShiftConfig, study: dict[str, Any], folder: Path, runs: dict[tuple[str, int], dict]) -> None:
    """Write <results>.json and <results>.png, if the margins give the trainer's own accuracies under every mixture."""
    ids, labels_AP = labels(config, folder)
    margins = {method: np.array([runs[method, seed]["margins"] for seed in config.seeds]) for method in config.methods}
    for (method, seed), done in runs.items():
        for alpha, labels_P in zip(ALPHAS, labels_AP, strict=True):
            ours = (labels_P * done["margins"] > 0)[labels_P != 0].mean()
            theirs = done["metrics"][f"eval_accuracy.alpha_{alpha * 100:g}"]
            if done["prompt_ids"] != ids or abs(ours - theirs) > 1e-6:
                raise DataError(f"{folder}: {method}, seed {seed}: accuracy {ours} at alpha {alpha}, the trainer's {theirs}")
    found = summarise(labels_AP, margins)
    counts = {"labelled": (labels_AP != 0).sum(axis=1).tolist(), "as_in_training": (labels_AP > 0).sum(axis=1).tolist()}
    stored = {f"{method}, seed {seed}": done for (method, seed), done in runs.items()}
    settings = {name: value for name, value in study["settings"].items() if name not in ("data", "model_path")}
    settings |= {"seeds": config.seeds, "beta": BETA}
    with atomic_file(Path(config.results + ".json")) as stream:
        json.dump({"settings": settings, "ratings": study["ratings"] | counts, "methods": found, "runs": stored}, stream)
    draw(config, found, Path(config.results + ".png"))
    print(f"{config.results}.json and .png")


def parts_of(config: LabelShiftConfig, further: Command) -> Iterator[Part]:
    folder, started = Path(config.output_path).resolve(), time.perf_counter()
    free = ("output_path", "results", "seconds", "methods", "seeds", "slurm", "sbatch", "part")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    every = itertools.product(config.seeds, config.methods)
    paths = {(method, seed): folder / "runs" / f"{method}, seed {seed}.json" for seed, method in every}

    def make_data() -> None:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        with lock_folder(folder):
            if not (folder / "study.json").is_file():
                ratings = prepare(config, folder)
                with atomic_file(folder / "study.json") as stream:
                    json.dump({"settings": settings, "ratings": ratings}, stream)
        if read_json_object(folder / "study.json")["settings"] != settings:
            raise UsageError(f"--output_path={folder} contains results from a different configuration; choose another")

    def run(method: str, seed: int) -> Iterator[Command]:
        path, save = paths[method, seed], paths[method, seed].with_suffix("")
        if not path.is_file() and time.perf_counter() - started <= config.seconds:
            # WDPO's forward passes are float32: its reference is another.
            borrow(save, [paths["WDPO" if method == "WDPO" else "DPO", config.seeds[0]].with_suffix("")])
            # A micro-batch is the whole step: one process, however many GPUs there are.
            yield ["env", "DRDPO_PROCESSES=1", *train(config, folder, save, method, seed), *further]
            done = json.dumps(result_of(save))
            with atomic_file(path) as stream:
                stream.write(done)

    def report() -> None:
        runs = {run: read_json_object(path) for run, path in paths.items() if path.is_file()}
        if len(runs) < len(paths):
            print(f"{len(runs)} of {len(paths)} runs are finished; rerun the same command")
        else:
            finish(config, read_json_object(folder / "study.json"), folder, runs)

    yield Part("data", [], [make_data])
    for method, seed in paths:
        yield Part(f"{method}/{seed}", ["data"], run(method, seed))
    yield Part("report", [f"{method}/{seed}" for method, seed in paths], [report])


if __name__ == "__main__":
    run_experiment(LabelShiftConfig, parts_of)
