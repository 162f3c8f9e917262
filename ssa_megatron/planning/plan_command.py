"""`ssa plan`: refuse what is illegal, show what is legal, refuse what does not fit; no process group and no GPU.

Exit code 2 (ConfigError) both for a topology that is not legal and for one that does not fit, with two that are and do.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ssa_megatron.config import Recipe
from ssa_megatron.errors import ConfigError
from ssa_megatron.planning import hardware, search
from ssa_megatron.planning import plan_page as page
from ssa_megatron.train.run_folder import check_same_run

GIB = 2**30


def plan(
    recipe: Recipe,
    world: int,
    *,
    gpu: str = "h100",
    memory_gib: float | None = None,
    link_gbytes: float | None = None,
    network_gbytes: float | None = None,
    document: int | None = None,
    top: int = 5,
    run: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the plan. document: tokens of a typical document in a row; None for rows that are one document each.

    Raises ConfigError when the recipe is not legal for `world` processes, or needs more memory than a GPU has; RunFolderError
    when `run` holds a run of another recipe, which a job would find out after its time in the queue.
    """
    if run is not None:
        check_same_run(run, recipe)
    figures = hardware.find(gpu)
    options = {"memory": (memory_gib, GIB), "link": (link_gbytes, 1e9), "network": (network_gbytes, 1e9)}
    given: dict[str, Any] = {}
    for name, (value, unit) in options.items():
        if value is None:
            continue
        if not 0 < value < math.inf:
            option = f"--{name}-{'gib' if name == 'memory' else 'gbytes'}"
            raise ConfigError(f"{option} {value:g}: not a size", remedy="a number above 0", id="not-a-size")
        given[name] = int(value * unit)
    figures = dataclasses.replace(figures, **given)
    search.check(recipe, world, figures)
    found = search.evaluate(recipe, world, figures, document=document)
    fits = found.needed <= figures.memory
    candidates = search.fitting(recipe, world, figures, document=document) if top or not fits else []
    best = search.ranked(candidates)[:top]
    folder = run or Path("runs") / recipe.name
    if as_json:
        print(json.dumps(page.to_dict(found, best, figures, folder)))
    else:
        print(page.render(found, best, figures, folder))
    if not fits:
        others = search.nearest(recipe, candidates)
        stage = found.fullest
        raise ConfigError(
            f"{recipe.name} does not fit: rank(s) of pipeline stage {stage.stage} need {found.needed / GIB:.1f} GiB, "
            f"{(found.needed - figures.memory) / GIB:.1f} GiB more than the {figures.memory / GIB:.1f} GiB of one {gpu}",
            remedy=", or ".join(others) or f"no topology of {world} process(es) fits: more GPUs, or shorter rows",
            id="plan-does-not-fit",
        )
