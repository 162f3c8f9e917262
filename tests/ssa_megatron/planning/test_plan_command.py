"""`ssa plan` as a user meets it: quick, without torch, refusing with alternatives that work; and the documentation's table."""

import json
import random
import re
import resource
import subprocess
import sys

import pytest

from ssa_megatron.config import dump_recipe, load_recipe, resolve
from ssa_megatron.config.recipe import apply_override
from ssa_megatron.errors import ConfigError, RunFolderError
from ssa_megatron.parallel import topology
from ssa_megatron.planning import hardware, search, table
from ssa_megatron.planning import plan_page as page
from ssa_megatron.planning.plan_command import plan
from tests.errors import raises
from tests.launch import ROOT, environment, run

H100 = hardware.find("h100")


def test_a_plan_takes_less_than_five_seconds_and_no_torch():
    code = "import sys; from ssa_megatron import cli; sys.argv = ['ssa', 'plan', 'ssa-8b', '--world', '64']\n"
    code += "try:\n    cli.main()\nexcept SystemExit as end:\n    sys.exit(end.code or 'torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5, "seconds of one core"
    assert "fits in 79.1 GiB" in done.stdout
    assert "<- the recipe" in done.stdout


def test_an_illegal_recipe_is_refused_with_two_ways_that_are_legal():
    refused = run(1, "ssa_megatron", "plan", "ssa-1b", "parallel.sequence=true", "--world", "8", expect=2)
    assert "parallel.sequence is not possible for 8 process(es)" in refused
    ways = refused.partition("legal for 8 process(es): ")[2].strip().split(", or ")
    assert len(ways) == 2
    for way in ways:
        topology.check(load_recipe("ssa-1b", ["parallel.sequence=true", *way.split()]), 8)


ODD = {  # values that break one rule or several, alone or together, on some number of processes
    "parallel.tensor": (2, 3, 7, 16, 128),
    "parallel.sequence": ("true", "false"),
    "parallel.pipeline": (2, 3, 5),
    "parallel.virtual_pipeline": (2, 3),
    "parallel.context": (2, 3, 64),
    "zero.stage": (2, 3),
    "zero.offload_optimizer": ("true",),
    "train.global_batch_rows": (8, 24, 56),
    "train.micro_batch_rows": (1, 8),
    "train.sequence_length": (17, 4095),
    "train.eval_rows": (3, 7),
    "model.ffn_size": (49,),
    "model.num_layers": (7,),
}


@pytest.mark.parametrize("seed", range(25))
def test_whatever_is_illegal_is_refused_with_two_ways_that_are_legal(seed):
    rng, refused = random.Random(seed), None
    while refused is None:
        overrides = [f"{key}={rng.choice(values)}" for key, values in ODD.items() if rng.random() < 0.3]
        world = rng.choice((1, 2, 3, 6, 7, 8, 12, 64, 100, 1024))
        name = rng.choice(("demo", "ssa-1b", "ssa-8b", "ssa-70b-128k"))
        try:
            recipe = load_recipe(name, overrides)
        except ConfigError:  # sections that contradict each other, whatever the topology
            continue
        try:
            search.check(recipe, world, H100)
        except ConfigError as error:
            refused = error
    ways = refused.remedy.partition(f"legal for {world} process(es): ")[2].partition(";")[0].split(", or ")
    assert len(set(ways)) == 2, refused.remedy
    for way in ways:
        topology.check(resolve(changed(recipe.model_dump(), way), origin=way), world)
    as_it_is = refused.remedy.partition("as it is, legal for ")[2]
    for number in as_it_is.split(" or ") if as_it_is else ():
        topology.check(recipe, int(number))


def changed(values: dict, way: str) -> dict:
    for override in way.split():
        apply_override(values, override)
    return values


def test_seven_processes_for_a_batch_of_128_rows_are_told_what_would_do():
    with raises(ConfigError, "global-batch-divides", "train.global_batch_rows", 7) as refused:
        search.check(load_recipe("ssa-1b", ["train.eval_interval=0"]), 7, H100)
    assert "train.global_batch_rows=126, or train.global_batch_rows=133" in refused.value.remedy
    assert refused.value.remedy.endswith("as it is, legal for 4 or 8")


@pytest.mark.timeout(60)
def test_a_hundred_million_processes_are_refused_as_soon_as_seven():
    with raises(ConfigError, "global-batch-divides", "train.global_batch_rows=99999999"):
        search.check(
            load_recipe("ssa-1b", ["train.eval_interval=0"]), 99_999_999, H100
        )  # looked for neighbours for minutes


@pytest.mark.parametrize("option", ["memory_gib", "link_gbytes", "network_gbytes"])
@pytest.mark.parametrize("value", [0, -3, float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused_instead_of_planned_with(option, value):
    with raises(ConfigError, "not-a-size", f"--{option.replace('_', '-')} {value:g}"):
        plan(load_recipe("demo"), 1, **{option: value})


def test_a_disk_without_room_for_the_checkpoints_is_pointed_out(capsys, monkeypatch):
    recipe = load_recipe("ssa-1b", ["checkpoint.keep=2"])
    one = page.checkpoint_bytes(recipe)
    for free, said in ((3 * one, False), (3 * one - 1, True)):
        monkeypatch.setattr(page, "free_disk", lambda run, free=free: free)
        plan(recipe, 8, top=0)
        assert ("NOT ENOUGH" in capsys.readouterr().out) == said
        plan(recipe, 8, top=0, as_json=True)
        assert json.loads(capsys.readouterr().out)["checkpoint"] == {"bytes": one, "needed": 3 * one, "free": free}


def test_a_run_folder_of_another_recipe_is_refused_before_a_job_waits_for_its_nodes(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_recipe(load_recipe("demo")))
    plan(load_recipe("demo", ["train.recompute=full"]), 2, run=tmp_path)
    with raises(RunFolderError, "run-of-another-recipe", tmp_path, "model.num_layers", "-> 3"):
        plan(load_recipe("demo", ["model.num_layers=3"]), 2, run=tmp_path)


def test_a_recipe_that_does_not_fit_says_by_how_much_and_what_does(capsys):
    recipe = load_recipe("ssa-8b", ["parallel.tensor=1", "parallel.sequence=false"])
    with raises(ConfigError, "plan-does-not-fit") as refused:
        plan(recipe, 64)
    need, over = re.search(r"need (\d+\.\d) GiB, (\d+\.\d) GiB more than the 79\.1 GiB", refused.value.problem).groups()
    assert float(need) - float(over) == pytest.approx(79.1, abs=0.11)
    assert "does NOT fit in 79.1 GiB" in capsys.readouterr().out
    ways = refused.value.remedy.split(", or ")
    assert len(ways) == 2
    for way in ways:
        other = load_recipe("ssa-8b", ["parallel.tensor=1", "parallel.sequence=false", *way.split()])
        topology.check(other, 64)
        assert search.evaluate(other, 64, H100).needed <= H100.memory


def test_what_fits_nowhere_is_said_to():
    with raises(ConfigError, "plan-does-not-fit") as refused:
        plan(load_recipe("ssa-8b", ["parallel.tensor=1", "parallel.sequence=false"]), 1, memory_gib=16, top=0)
    assert "no topology of 1 process(es) fits" in refused.value.remedy


def test_the_best_topologies_are_legal_fit_and_come_fastest_first():
    recipe = load_recipe("ssa-8b")
    found = search.ranked(search.fitting(recipe, 64, H100))
    assert found
    for candidate in found:
        topology.check(candidate.recipe, 64)
        assert candidate.needed <= H100.memory
    seconds = [candidate.speed.seconds for candidate in found]
    assert seconds == sorted(seconds)
    cuts = [(c.recipe.parallel, c.recipe.zero) for c in found]
    assert len(cuts) == len({str(cut) for cut in cuts}), "one row a topology"


def test_json_has_the_pages_figures(capsys):
    recipe = load_recipe("demo", ["train.eval_interval=0"])
    plan(recipe, 2, as_json=True, document=100)
    found = json.loads(capsys.readouterr().out)
    assert found["needed"] == search.evaluate(recipe, 2, H100, document=100).needed
    assert found["communication"][0]["group"] == "data"
    assert found["best"][0]["seconds"] <= found["seconds"]


def test_faster_links_shorten_the_step(capsys):
    recipe = load_recipe("ssa-8b")
    seconds = []
    for link in (100, 400):
        plan(recipe, 64, link_gbytes=link, top=0, as_json=True)
        seconds.append(json.loads(capsys.readouterr().out)["time"]["tensor-parallel"])
    assert seconds[0] == pytest.approx(4 * seconds[1])


def test_stages_of_one_node_send_over_its_links_and_stages_of_two_over_the_network(capsys):
    recipe = load_recipe("ssa-1b", ["parallel.pipeline=2", "train.eval_interval=0"])
    for world, option, faster in ((8, "link_gbytes", 2), (8, "network_gbytes", 1), (16, "network_gbytes", 2)):
        seconds = []
        for gbytes in (10, 20):
            plan(recipe, world, top=0, as_json=True, **{option: gbytes})
            seconds.append(json.loads(capsys.readouterr().out)["time"]["pipeline-parallel"])
        assert seconds[0] == pytest.approx(faster * seconds[1])


def test_an_update_in_host_memory_is_not_planned_at_the_gpus_speed(capsys):
    times = []
    for offloaded in (False, True):
        recipe = load_recipe("ssa-1b", ["zero.stage=2", f"zero.offload_optimizer={offloaded}", "train.eval_interval=0"])
        plan(recipe, 2, top=0, as_json=True)
        times.append(json.loads(capsys.readouterr().out)["time"]["optimizer"])
        plan(recipe, 2, top=0)
        assert ("of host memory" in capsys.readouterr().out) == offloaded
    share = 1_210_000_000 / 2
    assert times[1] - times[0] == pytest.approx(share * (56 / H100.host + 6 / H100.host_link), rel=0.05)


def test_an_unknown_gpu_is_refused():
    with raises(ConfigError, "unknown-gpu", "--gpu tpu", "h100"):
        plan(load_recipe("demo"), 1, gpu="tpu")


@pytest.mark.parametrize("name", table.SECTIONS)
def test_what_the_documentation_shows_is_current(name):
    assert (table.DOCS / name).read_text() == table.updated(name), "run: python -m ssa_megatron.planning.table"
