"""Fixtures that several rooms share: small models in real Hugging Face folders, with the embedded model's tokenizer."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from harness.forks import Forks
from harness.hosts import hosts, network  # noqa: F401

SHOWN_CHARACTERS = 4000
# What a test starts imports this clone's drdpo, as with src/env.sh.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as src/env.sh; must be there before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # tests/run.sh starts a worker a core: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """torch.compile keeps its code in a folder of this run: it would also use code in the shared folder that was made for
    another CPU or ATEN_CPU_CAPABILITY, which gave numbers that are not finite."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The embedded policy, a real language model of 135M parameters."""
    path = ROOT / "models" / "SmolLM2-135M"
    assert (path / "config.json").is_file(), "the embedded model is missing; run: bash setup.sh --models=embedded"
    return path


def random_llama(folder: Path, tokenizer_of: Path, **sizes: Any) -> Path:
    """A random Llama of 2 layers with the embedded model's tokenizer, in float32."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=64, num_hidden_layers=2, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.2, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 32."""
    path = tmp_path_factory.mktemp("models") / "tiny policy"
    return random_llama(path, smollm, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="session")
def vllm_policy(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads as wide as vLLM's attention on a CPU requires."""
    path = tmp_path_factory.mktemp("models") / "vllm policy"
    return random_llama(path, smollm, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Scripts of the pipeline without the wait for their libraries."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def clone(root: Path, forks: Forks, tmp_path: Path) -> Path:
    """Our tree, but with the environment of `forks`, and a setup.sh that prints its arguments."""
    tree = tmp_path / "my clone"
    tree.mkdir()
    for entry in root.iterdir():
        if entry.name not in (".environment", ".git", "outputs", "setup.sh"):
            (tree / entry.name).symlink_to(entry)
    (tree / ".environment").write_text(str(forks.environment(tmp_path / "an environment")))
    (tree / "setup.sh").write_text('echo "setup.sh $*"\n')
    return tree


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where workers share the tests, files with slow ones come first: begun last, one would leave the other worker idle."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu run where torch sees one."""
    Forks.started.clear()
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no NVIDIA GPU here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its scripts in forks have written."""
    report = yield
    if report.failed:
        for fork in Forks.started:
            text = "".join(fork.said())
            report.sections.append((f"{Path(fork.command[1]).name}, status {fork.returncode}", text[-SHOWN_CHARACTERS:]))
    return report
