"""metrics.jsonl: the same bits after reading, each step once, whatever a kill left."""

import json
import math
import struct
import sys
import time

import pytest
import torch

from ssa_megatron.errors import ConfigError, EnvironmentProblem
from ssa_megatron.train.loggers import Logger, Loggers, open_loggers
from ssa_megatron.train.metrics import Metrics, read_metrics
from tests.errors import raises
from tests.ssa_megatron.support import tiny
from tests.ssa_megatron.toys import registered


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, steps, *, resume_step=0, **values):
    metrics = Metrics(path, resume_step=resume_step)
    for step in steps:
        metrics.write(step, {"loss": 1.0 / step, **values})
    metrics.close()


def steps(path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_floats_read_back_to_the_same_bits(path):
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**63), 2**63 - 1, (500,), generator=generator, dtype=torch.int64)
    values = [x for x in (struct.unpack("<d", struct.pack("<q", b))[0] for b in bits.tolist()) if not math.isnan(x)]
    values += [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, float(torch.tensor(0.1))]
    metrics = Metrics(path, resume_step=0)
    for step, value in enumerate(values, 1):
        metrics.write(step, {"loss": value})
    metrics.close()
    assert [line["loss"].hex() for line in read_metrics(path)] == [value.hex() for value in values]


def test_a_loss_that_is_no_number_stays_one(path):
    write(path, [1], align=math.nan)
    assert math.isnan(read_metrics(path)[0]["align"])


def test_a_line_is_in_the_file_as_soon_as_its_step_is_over(path):
    metrics = Metrics(path, resume_step=0)
    metrics.write(1, {"loss": 2.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    metrics.close()


def test_a_resume_drops_the_steps_that_will_run_again_and_no_other(path):
    write(path, range(1, 8))
    before = path.read_text().splitlines()[:4]
    write(path, range(5, 10), resume_step=4)
    assert steps(path) == list(range(1, 10))
    assert path.read_text().splitlines()[:4] == before


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', "{", '{"step": 6, "loss": 0.5', ""])
def test_a_line_torn_by_a_kill_is_dropped_and_its_step_written_whole(path, torn):
    write(path, range(1, 6))
    with path.open("a") as file:
        file.write(torn)
    assert steps(path) == [1, 2, 3, 4, 5]
    write(path, [6, 7], resume_step=5)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_start_from_scratch_leaves_no_line_of_an_earlier_attempt(path):
    write(path, [1, 2, 3])
    write(path, [1, 2])
    assert steps(path) == [1, 2]


def test_opening_leaves_no_temporary_file(path):
    write(path, [1])
    write(path, [2], resume_step=1)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def scalars(logger) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logger)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_numbers_and_not_the_text(path, tmp_path):
    loggers = open_loggers(tiny(), tmp_path, resume_step=0)
    metrics = Metrics(path, resume_step=0, loggers=loggers)
    metrics.write(1, {"loss": 2.5, "note": "text"})
    metrics.write(2, {"loss": 2.25, "note": "text"})
    metrics.close()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(1, 2.5), (2, 2.25)]}


def test_tensorboard_is_one_curve_after_a_restart_with_the_steps_that_ran_again_once(path, tmp_path):
    for resume_step, last, loss in ((0, 7, 1.0), (4, 9, 2.0), (9, 10, 3.0)):
        loggers = open_loggers(tiny(), tmp_path, resume_step=resume_step)
        metrics = Metrics(path, resume_step=resume_step, loggers=loggers)
        for step in range(resume_step + 1, last + 1):
            metrics.write(step, {"loss": loss})
        metrics.close()
        time.sleep(1.1)  # event files are named and ordered by the second
    expected = [(step, 1.0 if step <= 4 else 2.0 if step <= 9 else 3.0) for step in range(1, 11)]
    assert scalars(tmp_path / "tensorboard") == {"loss": expected}


class Broken(Logger):
    title = "a logger"

    def start(self, recipe, run, *, resume_step):
        pass

    def log(self, step, values):
        raise RuntimeError("the server is gone")

    def close(self):
        pass


def test_a_logger_that_raises_is_switched_off_with_a_message_and_no_line_is_lost(path):
    metrics = Metrics(path, resume_step=0, loggers=Loggers([Broken("")]))
    said = [metrics.write(step, {"loss": 1.0}) for step in (1, 2)]
    metrics.close()
    assert said == ["a logger is switched off: RuntimeError: the server is gone", None]
    assert steps(path) == [1, 2]


def test_a_new_logger_gets_its_argument_and_every_step(tmp_path):
    with registered():
        recipe = tiny(logging__loggers={"recorder": "lines"}, logging__tensorboard=False)
        loggers = open_loggers(recipe, tmp_path, resume_step=4)
        assert loggers.log(5, {"loss": 2.5, "lr": 0.5, "note": "text"}) is None
        loggers.close()
    lines = (tmp_path / "lines").read_text().splitlines()
    assert lines == ["start after 4", f"step 5 loss {(2.5).hex()} lr {(0.5).hex()}", "closed"]


def test_an_unknown_logger_is_refused_where_the_recipe_is_read():
    with raises(ConfigError, "unknown-variant-name", "logging.loggers", "tensorboard", "wandb"):
        tiny(logging__loggers={"recorder": "lines"})


def test_a_logger_with_a_field_of_its_own_is_not_named_a_second_time():
    with raises(ConfigError, "logger-has-a-field", "logging.wandb"):
        tiny(logging__loggers={"wandb": "mine"})


def test_weights_and_biases_that_is_not_installed_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with raises(EnvironmentProblem, "wandb-missing", "logging.wandb=mine", "pip install wandb"):
        open_loggers(tiny(logging__wandb="mine", logging__tensorboard=False), tmp_path, resume_step=0)


def test_weights_and_biases_goes_on_as_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="no wandb: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe, ids = tiny(logging__wandb="mine", logging__tensorboard=False), []
    for resume_step in (0, 2):
        time.sleep(1.1 * (resume_step > 0))  # its folders are named by the second
        loggers = open_loggers(recipe, tmp_path, resume_step=resume_step)
        ids.append(wandb.run.id)
        assert loggers.log(resume_step + 1, {"loss": 1.0, "note": "text"}) is None
        loggers.close()
    assert ids[0] == ids[1] == (tmp_path / "wandb-id").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2
