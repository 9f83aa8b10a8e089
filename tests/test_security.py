"""Nothing runs foreign code, names in data make no paths, and tokens stay out of what is written and printed."""

import ast
import os
import sys
from pathlib import Path

import pytest
from harness import ROOT

from drdpo.records import Completion, write_records

SECRETS = {"HF_TOKEN": "hf_secretsecret", "HUGGING_FACE_HUB_TOKEN": "hf_othersecret", "WANDB_API_KEY": "wandbsecretsecret"}

FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pd.read_pickle")


def offences(source: str) -> list[str]:
    """What a source does that could run code from a file or a word."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in FORBIDDEN_CALLS:
                found.append(name)
            if name == "torch.load" and words.get("weights_only") != "True":
                found.append(name)
            found += [arg for arg in ("shell", "trust_remote_code", "allow_pickle") if words.get(arg, "False") != "False"]
    return found


def test_no_source_runs_foreign_code():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    assert {str(path): offences(source) for path, source in sources.items() if offences(source)} == {}


def test_the_rule_can_fail():
    for source in (
        "import pickle", "from joblib import load", "torch.load(x)", "torch.load(x, weights_only=False)", "eval(x)",
        "run(x, shell=True)", "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "np.load(x, allow_pickle=True)",
    ):  # fmt: skip
        assert offences(source), source


def completions(folder: Path, name: str) -> None:
    question, answers = [{"role": "user", "content": "q"}], [[{"role": "assistant", "content": f"a{k}"}] for k in range(2)]
    rows = [Completion(1, k, question, answers[k], [1], "stop", {name: float(k), "ArmoRM": float(k)}) for k in range(2)]
    for split in ("train", "test"):
        write_records(folder / f"{split}.jsonl", rows)


@pytest.mark.parametrize("name", ["../../escaped", "/escaped-from-drdpo", "a/../../b", "..", "x\u202ey"])
def test_names_in_data_make_no_paths_and_tokens_are_never_written(forks, tmp_path, name):
    """Objective names that look like paths, through pairing, evaluation with its pictures, and inspection."""
    work = tmp_path / "in" / "work"
    work.mkdir(parents=True)
    completions(work / "data", name)
    commands = [
        ["generate_preferences", f"--completions={work}/data", f"--output_path={work}/pairs", "--weights", f"{name}=1"],
        ["evaluate_armorm", "--runs", f"{name}={work}/data", f"b={work}/data", f"--output_path={work}/report"],
        ["inspect_data", f"{work}/data"],
    ]
    before, said = set(tmp_path.rglob("*")), ""
    for script, *words in commands:
        done = forks.run([sys.executable, ROOT / "src" / f"{script}.py", *words], env=os.environ | SECRETS, cwd=work)
        said += done.stdout + done.stderr
        assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr, done.stderr
    new = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    folders = {path.relative_to(work).parts[0] for path in new if path.is_relative_to(work)}
    assert "pairs" in folders <= {"pairs", "report"} and all(path.is_relative_to(work) for path in new), (said, new)
    assert not Path("/escaped-from-drdpo").exists()
    written = b"".join(path.read_bytes() for path in new) + said.encode()
    assert not any(secret.encode() in written for secret in SECRETS.values())
