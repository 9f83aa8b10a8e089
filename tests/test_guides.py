"""The guides in docs/: their numbers, flags, quoted messages, code and commands."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import readme
import torch
import tuning_numbers
from fit_reward_heads import FitConfig

from drdpo import config
from drdpo.cli import parse
from drdpo.records import Preference, Prompt
from drdpo.training.losses import drdpo_weights, kl_weights, pair_losses

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# Quoted messages


def templates(source: str) -> set[str]:
    """Every text of a Python source, an f-string's values as <>."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "<>" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Texts of the package, and the wrappers' lines with their variables as <>."""
    python = [text for path in (ROOT / "src").rglob("*.py") for text in templates(path.read_text(encoding="utf-8"))]
    bash = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("src/env.sh", "setup.sh"))
    return [*python, *re.sub(r"\$(\{[^}]*\}|\w+)", "<>", bash).splitlines()]


QUOTED = re.findall(r"^ +error: (?:\.\.\. )?(.+)$", page("troubleshooting.md"), re.MULTILINE)
"""The fragments that identify a message; the rest of it may change."""


def blank(message: str) -> str:
    return re.sub(r"<\w+>", "<>", message)


@pytest.mark.parametrize("message", QUOTED)
def test_every_quoted_message_is_in_the_source(message, sources):
    assert any(blank(message) in text for text in sources), "the message has changed: mend docs/troubleshooting.md"


def test_messages_are_read_from_the_source_and_a_wrong_one_is_noticed():
    assert len(QUOTED) >= 10
    source = 'raise DataError(f"{path}: holds {a + b} rows, " "not one" f"; give --x={x}")'
    assert templates(source) >= {"<>: holds <> rows, not one; give --x=<>"}
    assert blank("<file>: holds <n> rows") in "<>: holds <> rows, not one; give --x=<>"
    assert blank("<file>: has <n> rows") not in "<>: holds <> rows, not one; give --x=<>"


# Flags and commands

OTHER_PROGRAMS = (
    "torch_index dev pairs rounds only_checkpointing steps longest_double_backward "  # setup.sh, benchmarks/, experiments/
    "signal nodes gpus nnodes hostfile no require".split()  # sbatch, torchrun, deepspeed, pip
)


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_exists(name):
    known = {
        flag.name for cls in (getattr(config, name) for name in config.__all__) for flag in cls.__dataclass_fields__.values()
    }
    known |= {"cvar_share", "help"} | set(FitConfig.__dataclass_fields__)
    for flag in re.findall(r"--([a-z]\w+)", page(name)):
        assert flag in known or flag in OTHER_PROGRAMS, f"docs/{name}: --{flag}"


def test_commands_of_own_md_parse():
    classes = {
        "src/inspect_data.py": config.InspectConfig, "train_alignment.sh": config.TrainConfig,
        "experiments/fit_reward_heads.py": FitConfig,
    }  # fmt: skip
    found = readme.commands(page("own.md"))
    assert {words[1] for words in found} == set(classes)
    for words in found:
        parse(classes[words[1]], "", words[2:])


# Tuning


@pytest.mark.parametrize("name", ["margins", "kldpo", "sample sizes"])
def test_tables_are_computed(name):
    assert tuning_numbers.tables()[name] in page("tuning.md"), "run: PYTHONPATH=src python experiments/tuning_numbers.py"


def test_numbers_of_the_text():
    def loss(margin: float) -> float:
        return float(pair_losses(torch.tensor([margin], dtype=torch.float64), 0.01))

    assert loss(0) - loss(10) == pytest.approx(0.049, abs=5e-4)
    for tau, times in ((0.05, 21), (0.005, 201)):
        assert (1 + tau) / tau == pytest.approx(times)
    # Two or so nats behind the mean reach the cap at tau 0.005.
    assert (loss(-2.31) - loss(0)) / 0.005 == pytest.approx(math.log(10), rel=0.01)


def minimum(weights, losses_of, chance: float) -> float:
    """beta h where the weighted pull of the label and of its opposite cancel, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(200):
        middle = (low + high) / 2
        losses = torch.tensor([losses_of(middle), losses_of(-middle)], dtype=torch.float64)
        w = weights(losses, losses)
        right, wrong = 1 / (1 + math.exp(middle)), 1 / (1 + math.exp(-middle))
        pull = chance * float(w[0]) * right - (1 - chance) * float(w[1]) * wrong
        low, high = (middle, high) if pull > 0 else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("chance", [0.6, 0.9])
def test_where_a_temperature_puts_the_margin(chance):
    odds = math.log(chance / (1 - chance))

    def dpo(u: float) -> float:
        return math.log1p(math.exp(-u))

    for tau in (0.5, 2.0):
        found = minimum(lambda b, p, tau=tau: kl_weights(b, p, tau, cap=math.inf), dpo, chance)
        assert found == pytest.approx(tau / (1 + tau) * odds)
    assert minimum(lambda b, p: drdpo_weights(b, p, 3.0), dpo, chance) == pytest.approx(1.5 * odds)
    assert minimum(lambda b, p: drdpo_weights(b, p, 1.0), dpo, chance) > 29, "no finite margin"


def test_sample_sizes_are_those_of_a_normal_distribution():
    # E[w]^2 / E[w^2] of w = exp(x), x normal with deviation s: exp(-s^2).
    for ratio in (0.3, 1.0):
        losses = tuning_numbers.normal_losses(ratio)
        weights = kl_weights(losses, losses, 1.0, normalize=True)
        share = float(weights.sum() ** 2 / (weights**2).sum()) / len(losses)
        assert share == pytest.approx(math.exp(-(ratio**2)), rel=0.01)


def test_what_rho_buys():
    """The adversary's gains, and the strength at which root and squared form have one gradient."""
    gradients = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    rho, squares = 0.1, gradients.square().sum(dim=1)
    moves = 2 * rho * gradients
    assert torch.allclose((gradients * moves).sum(1) - moves.square().sum(1) / (4 * rho), rho * squares)
    root = rho * squares.mean().sqrt()
    moves = rho * gradients / squares.mean().sqrt()
    assert moves.square().sum(1).mean().sqrt().item() == pytest.approx(rho)
    assert (gradients * moves).sum(1).mean().item() == pytest.approx(root.item())
    values = gradients.clone().requires_grad_()
    penalty = values.square().sum(dim=1).mean()
    (of_root,) = torch.autograd.grad(2 * penalty.detach().sqrt() * rho * penalty.sqrt(), values, retain_graph=True)
    (of_square,) = torch.autograd.grad(rho * penalty, values)
    assert torch.allclose(of_root, of_square)


# Own


def test_the_example_is_the_file():
    (code,) = re.findall(r"```python\n(.*?)```", page("own.md"), re.DOTALL)
    assert code.strip() in (ROOT / "experiments" / "own_method.py").read_text(encoding="utf-8")


def test_the_rows_of_own_md_are_read():
    (block,) = re.findall(r"```json\n(.*?)```", page("own.md"), re.DOTALL)
    pairs = [Preference.from_trl(json.loads(line), 1) for line in block.splitlines()]
    assert len(pairs) == 3
    assert pairs[0] == pairs[1] == pairs[2]
    (prompt,) = re.findall(r'`(\{"prompt_id".*?\})`', page("own.md"))
    assert Prompt.from_row(json.loads(prompt)).prompt_id == 0
