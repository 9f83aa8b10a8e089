"""Trackers of --log: a resumed run has no double or missing point, nothing prompts, and a failure never ends the run."""

import json
import sys
from contextlib import nullcontext

import pytest

from drdpo.config.training import TrainConfig
from drdpo.errors import UsageError
from drdpo.training.log import MetricsLog, check_trackers

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
def server(monkeypatch, tmp_path):
    """Where the stand-ins of wandb and trackio write; no wandb variable but a key is set."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    for name, program in (("wandb", STAND_IN), ("trackio", TRACKIO)):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(program)
    (tmp_path / "server").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("SERVER", str(tmp_path / "server"))
    yield tmp_path / "server"
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """The folder of a run."""
    (tmp_path / "a run").mkdir()
    return tmp_path / "a run"


def steps_in(path):
    return [row["step"] for row in map(json.loads, path.open()) if "step" in row]


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
def test_a_tracker_is_refused_without_its_package(monkeypatch, name):
    monkeypatch.setattr("drdpo.training.log.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"pip install {name}=="):
        check_trackers([name])
    check_trackers(["tensorboard"])


@pytest.mark.parametrize(
    ("key", "mode", "message"),
    [
        ("", "", r"wandb login.*WANDB_MODE=offline"),
        ("k", "", None),
        ("", "offline", None),
        ("k", "disabled", "record nothing"),
    ],
)
def test_wandb_needs_a_key_or_to_be_offline(key, mode, message, server, monkeypatch):
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        check_trackers(["wandb"])


@pytest.mark.parametrize(("name", "mode"), [("wandb", "online"), ("wandb", "offline"), ("trackio", "")])
def test_a_resumed_run_continues_the_same_tracked_run(server, folder, monkeypatch, name, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    write(folder, [name], 0, 5)
    write(folder, [name], 3, 7)  # the state was saved after step 3: 4 and 5 are done again
    (sent,) = server.iterdir()
    assert name == "wandb" or sent.name.startswith("drdpo_a run-")
    rows = [json.loads(line) for line in sent.read_text().splitlines()]
    assert steps_in(sent) == steps_in(folder / "metrics.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    assert rows[0] == {"step": 1, "train/loss": 1.0, "eval/loss": 2.0}
    assert [row["exit"] for row in rows if "exit" in row] == ([0, 0] if name == "wandb" else [])
    assert all("secret" not in path.read_text() for path in folder.rglob("*") if path.is_file())


def test_what_the_server_lacks_is_sent_at_a_resume(server, folder):
    write(folder, [], 0, 3)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"], "none writes metrics alone"
    write(folder, ["wandb"], 3, 4)
    (sent,) = server.iterdir()
    assert steps_in(sent) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [None, "{", "{}", "[]"])
def test_a_run_outlives_wandb(damage, server, folder, monkeypatch, capsys):
    """Its own process is killed, so that every call of it raises from then on; or what the run knows of it is damaged."""
    if damage:
        (folder / "dashboard.json").write_text(damage)
    metrics = MetricsLog(folder, 0, ["wandb"], {})
    metrics.write({"step": 1, "loss": 1.0})

    def gone(*_, **__):
        raise ConnectionResetError(104, "Connection reset by peer")

    for run in [] if damage else sys.modules["wandb"].runs:
        monkeypatch.setattr(run, "log", gone)
        monkeypatch.setattr(run, "finish", gone)
    for step in (2, 3):
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()
    assert steps_in(folder / "metrics.jsonl") == [1, 2, 3]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: wandb failed") and ("reset by peer" in warning) == (damage is None)


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
