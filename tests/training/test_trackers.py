"""Trackers of --log: a resumed run has no double or missing point, nothing prompts, and a failure never ends the run."""

import json
import sys

import pytest

from drdpo.config.training import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.log import MetricsLog
from drdpo.training.trackers import check_trackers

STAND_IN = '''
import json, os, pathlib
class Settings(dict):
    def __init__(self, **settings): self.update(settings)
class _Run:
    def __init__(self, file, step): self.file, self.step = file, step
    def log(self, figures, step): self.file.open("a").write(json.dumps({"step": step, **figures}) + "\\n")
    def finish(self, exit_code): self.file.open("a").write(json.dumps({"exit": exit_code}) + "\\n")
runs = []
def login(prompt, verify): return not prompt and "WANDB_API_KEY" in os.environ
def init(**arguments):
    """A server that knows of each run the steps it was sent."""
    file = pathlib.Path(os.environ["SERVER"]) / (arguments["project"] + "_" + arguments["id"])
    sent = [json.loads(line) for line in file.open()] if file.is_file() else []
    runs.append(_Run(file, max((row["step"] for row in sent if "step" in row), default=-1) + 1))
    return runs[-1]
'''


TRACKIO = """
import json, os, pathlib
class _Run:
    def __init__(self, file): self.file = file
    def log(self, metrics, step): self.file.open("a").write(json.dumps({"step": step, **metrics}) + "\\n")
def init(project, name, resume, config, auto_log_gpu, auto_log_cpu):
    return _Run(pathlib.Path(os.environ["SERVER"]) / f"{project}_{name}")
def finish(): pass
"""


def write(folder, trackers, done, until):
    metrics = MetricsLog(folder, done, trackers, {})
    try:
        for step in range(done + 1, until + 1):
            metrics.write({"step": step, "loss": 1 / step, "eval_loss": 2 / step})
    finally:
        metrics.close()


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No wandb variable is set."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield tmp_path
    sys.modules.pop("wandb", None)


@pytest.fixture
def wandb(bare, monkeypatch):
    (bare / "site" / "wandb").mkdir(parents=True)
    (bare / "site" / "wandb" / "__init__.py").write_text(STAND_IN)
    (bare / "server").mkdir()
    monkeypatch.syspath_prepend(str(bare / "site"))
    monkeypatch.setenv("SERVER", str(bare / "server"))
    return bare


def test_log_is_a_list_of_known_names():
    def trackers(log: str) -> list[str]:
        return TrainConfig("m", "d", "s", log=log).trackers

    assert trackers("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert trackers("none") == []
    with pytest.raises(UsageError, match="'mlflow' is not one of"):
        trackers("tensorboard,mlflow")
    with pytest.raises(UsageError, match="none excludes"):
        trackers("none,wandb")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_refused_without_its_package(bare, monkeypatch, name):
    monkeypatch.setattr("drdpo.training.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"pip install {name}=="):
        check_trackers([name])
    check_trackers(["tensorboard"])


def test_wandb_is_refused_without_a_key_and_taken_with_one(wandb, monkeypatch):
    with pytest.raises(UsageError, match=r"wandb login.*WANDB_MODE=offline"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    check_trackers(["wandb"])
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UsageError, match="record nothing"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(("name", "mode"), [("wandb", "online"), ("wandb", "offline"), ("trackio", "")])
def test_a_resumed_run_continues_the_same_tracked_run(wandb, tmp_path, monkeypatch, name, mode):
    (wandb / "site" / "trackio.py").write_text(TRACKIO)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    folder = tmp_path / "a run"
    folder.mkdir()
    write(folder, [name], 0, 5)
    write(folder, [name], 3, 7)  # the state was saved after step 3: 4 and 5 are done again
    (sent,) = (wandb / "server").iterdir()
    assert name == "wandb" or sent.name.startswith("drdpo_a run-")
    rows = [json.loads(line) for line in sent.read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0] == {"step": 1, "train/loss": 1.0, "eval/loss": 2.0}
    assert [row["exit"] for row in rows if "exit" in row] == ([0, 0] if name == "wandb" else [])
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 8))
    assert all("secret" not in path.read_text() for path in folder.rglob("*") if path.is_file())


def test_a_run_outlives_wandb(wandb, tmp_path, monkeypatch, capsys):
    """As when wandb's own process is killed: every call of it raises from then on."""
    import wandb as wandb_module

    monkeypatch.setenv("WANDB_API_KEY", "k")
    metrics = MetricsLog(tmp_path, 0, ["wandb"], {})
    metrics.write({"step": 1, "loss": 1.0})
    run = wandb_module.runs[-1]

    def gone(*_, **__):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(run, "log", gone)
    monkeypatch.setattr(run, "finish", gone)
    for step in (2, 3):
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: wandb failed") and "reset by peer" in warning


def test_what_the_server_lacks_is_sent_at_a_resume(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder, [], 0, 3)
    write(folder, ["wandb"], 3, 4)
    (sent,) = (wandb / "server").iterdir()
    assert [row["step"] for row in map(json.loads, sent.open()) if "step" in row] == [1, 2, 3, 4]


def test_tensorboard_has_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, ["tensorboard"], 0, 5)
    write(tmp_path, ["tensorboard"], 3, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 8))
    assert [event.value for event in scalars] == pytest.approx([1 / step for step in range(1, 8)])
    assert [event.step for event in events.Scalars("eval/loss")] == list(range(1, 8))


def test_none_writes_metrics_alone(tmp_path):
    write(tmp_path, [], 0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ["{", "{}", "[]"])
def test_a_tracker_that_cannot_start_does_not_end_the_run(wandb, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "dashboard.json").write_text(damage)
    write(folder, ["wandb"], 0, 2)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert capsys.readouterr().err.startswith("warning: wandb failed")
