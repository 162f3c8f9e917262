"""The site file and the networks' environment, read and judged before anything is made of them.

Every key is there and of its type; what cannot be meant (two ranks on one GPU, a line that YAML took apart) is refused with file,
key and value.
"""

import re
from pathlib import Path

import yaml

from ssa_cluster.errors import Refused

PACKAGE = Path(__file__).parent
CLUSTER = PACKAGE / "assets" if (PACKAGE / "assets").is_dir() else PACKAGE.parent
"""The folder of templates/, job.sh, site.yaml and networks.yaml: cluster/ in a checkout, inside the package in a wheel."""
SITE: dict[str, type] = {
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


def read_site(path: Path) -> dict:
    """The site's settings, every key there and of its type. Raises Refused naming file, key and what it got."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"--site {path} cannot be read: {error}", id="site-unreadable") from None
    if not isinstance(values, dict):
        raise Refused(
            f"--site {path} holds no settings; start from {CLUSTER / 'site.yaml'}", id="site-without-settings"
        )
    for key in values:
        if key not in SITE:
            raise Refused(f"{path}: unknown key {key!r}; known: {', '.join(SITE)}", id="unknown-site-key")
    for key, kind in SITE.items():
        if key not in values:
            problem = f"{path}: {key} is missing; {CLUSTER / 'site.yaml'} has every key, with its meaning"
            raise Refused(problem, id="missing-site-key")
        value = values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            hint = ": YAML reads 24:00:00 as a number unless it stands in quotes" if key == "time" else ""
            raise Refused(f"{path}: {key} must be {kind.__name__}, not {value!r}{hint}", id="site-key-type")
        if isinstance(value, list) and (wrong := [item for item in value if not isinstance(item, str)]):
            problem = f"{path}: {key} holds {wrong[0]!r}, which is not text: put the whole line in quotes"
            raise Refused(problem, id="site-line-not-text")
    _check_texts(path, values)
    least = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "grace": 1, "join": 1}
    for key, bound in least.items():
        if values[key] < bound:
            raise Refused(f"{path}: {key} must be at least {bound}, not {values[key]}", id="site-key-too-small")
    if 0 < values["gpus_per_node"] < values["ranks_per_node"]:  # NCCL refuses two ranks on one GPU
        counts = f"{values['ranks_per_node']} ranks for {values['gpus_per_node']} GPU(s) of a node"
        problem = f"{path}: ranks_per_node must not be more than gpus_per_node: {counts}"
        raise Refused(problem, id="more-ranks-than-gpus")
    return values


def _check_texts(path: Path, values: dict) -> None:
    """What stands in a template between quotes must not end them, and what stands in #SBATCH lines must be an option."""
    for key in ("python", "image", "mounts"):
        for text in values[key] if key == "mounts" else [values[key]]:
            if found := re.search(r'["`\\\n]', text):
                problem = f"{path}: {key} holds {found[0]!r} in {text!r}: no quotes, backslashes or line breaks"
                raise Refused(problem, id="site-key-quotes")
    for text in values["mounts"]:
        if not text or set(text) & set(",:"):
            problem = f"{path}: mounts holds {text!r}: name folders without , and :, which keep their path inside"
            raise Refused(problem, id="site-mount")
    for text in values["sbatch"]:
        if not text.startswith("-") or "\n" in text:
            problem = f"{path}: sbatch holds {text!r}, not an sbatch option such as --partition=gpu"
            raise Refused(problem, id="not-an-sbatch-option")


def check_time(limit: str, *, least: int, origin: str) -> None:
    """Refuse a time limit that is none of SLURM's, or shorter than `least` seconds.

    Such a job would be told to stop as soon as it has started, and requeue itself for ever.
    """
    if re.fullmatch("(?i)infinite|unlimited", limit):
        return
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(\d+):(\d+):(\d+))|(?:(\d+)(?::(\d+))?)", limit)
    if not found:
        problem = f"{origin}: {limit!r} is not a time limit: [DAYS-]HOURS:MINUTES:SECONDS, or minutes"
        raise Refused(problem, id="not-a-time-limit")
    days, hours, minutes, seconds, h, m, s, only_minutes, only_seconds = (int(part or 0) for part in found.groups())
    total = 86400 * days + 3600 * (hours + h) + 60 * (minutes + m + only_minutes) + seconds + s + only_seconds
    if total < least:
        raise Refused(
            f"{origin}: {limit} is {total} s, and the job is told to stop up to {least} s before its end (grace and SLURM's "
            f"own two minutes): it would never train; at least {least // 60 + 1} minutes, or less grace in the site file",
            id="time-limit-too-short",
        )


def read_networks() -> dict[str, dict[str, list[str]]]:
    """networks.yaml: section -> variable -> [value, reason]."""
    return yaml.safe_load((CLUSTER / "networks.yaml").read_text())
