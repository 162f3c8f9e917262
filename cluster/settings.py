"""The site file and the networks' environment, read and judged before anything is made of them.

Every key is there and of its type; what cannot be meant (two ranks on one GPU, a line that YAML took apart) is refused with file,
key and value.
"""

from pathlib import Path

import yaml

CLUSTER = Path(__file__).parent
SITE = {
    "python": str,
    "gpu": str,
    "gpus_per_node": int,
    "ranks_per_node": int,
    "cpus_per_node": int,
    "network": str,
    "time": str,
    "grace": int,
    "join": int,
    "sbatch": list,
    "setup": list,
    "image": str,
    "mounts": list,
}


class Refused(Exception):
    """Nothing was submitted; the text says why and what to do."""


def read_site(path: Path) -> dict:
    """The site's settings, every key there and of its type. Raises Refused naming file, key and what it got."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"--site {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise Refused(f"--site {path} holds no settings; start from {CLUSTER / 'site.yaml'}")
    for key in values:
        if key not in SITE:
            raise Refused(f"{path}: unknown key {key!r}; known: {', '.join(SITE)}")
    for key, kind in SITE.items():
        if key not in values:
            raise Refused(f"{path}: {key} is missing; {CLUSTER / 'site.yaml'} has every key, with what it means")
        value = values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            hint = ": YAML reads 24:00:00 as a number unless it stands in quotes" if key == "time" else ""
            raise Refused(f"{path}: {key} must be {kind.__name__}, not {value!r}{hint}")
        if kind is list and (wrong := [item for item in value if not isinstance(item, str)]):
            raise Refused(f"{path}: {key} holds {wrong[0]!r}, which is no text: put the whole line in quotes")
    least = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "grace": 1, "join": 1}
    for key, bound in least.items():
        if values[key] < bound:
            raise Refused(f"{path}: {key} must be at least {bound}, not {values[key]}")
    if 0 < values["gpus_per_node"] < values["ranks_per_node"]:  # NCCL refuses two ranks on one GPU
        counts = f"{values['ranks_per_node']} ranks for {values['gpus_per_node']} GPU(s) of a node"
        raise Refused(f"{path}: ranks_per_node must not be more than gpus_per_node: {counts}")
    return values


def read_networks() -> dict[str, dict[str, list[str]]]:
    """networks.yaml: section -> variable -> [value, reason]."""
    return yaml.safe_load((CLUSTER / "networks.yaml").read_text())
