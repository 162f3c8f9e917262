"""`ssa plan` as a user meets it: quick, without torch, refusing with alternatives that work; and the documentation's table."""

import json
import re
import resource
import subprocess
import sys

import pytest

from ssa_megatron.config import load_recipe
from ssa_megatron.errors import ConfigError
from ssa_megatron.parallel import topology
from ssa_megatron.planning import hardware, search, table
from ssa_megatron.planning.command import plan
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


def test_a_recipe_that_does_not_fit_says_by_how_much_and_what_does(capsys):
    recipe = load_recipe("ssa-8b", ["parallel.tensor=1", "parallel.sequence=false"])
    with pytest.raises(ConfigError) as refused:
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
    with pytest.raises(ConfigError, match="does not fit") as refused:
        plan(load_recipe("ssa-8b", ["parallel.tensor=1", "parallel.sequence=false"]), 1, memory_gib=16, top=0)
    assert "no topology of 1 process(es) fits" in refused.value.remedy


def test_the_best_topologies_are_legal_fit_and_come_fastest_first():
    recipe = load_recipe("ssa-8b")
    found = search.ranked(recipe, 64, H100)
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


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ConfigError, match="--gpu tpu") as refused:
        plan(load_recipe("demo"), 1, gpu="tpu")
    assert "h100" in refused.value.remedy


def test_what_the_readme_shows_is_current():
    text = table.README.read_text()
    assert text.count("python -m ssa_megatron.planning.table -->") == 2
    assert text == table.updated(text), "run: python -m ssa_megatron.planning.table"
