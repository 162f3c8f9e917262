"""The site file and the networks' environment, read and judged before anything is made of them.

Every key is there and of its type; what cannot be meant (two ranks on one GPU, a line that YAML took apart) is refused with file,
key and value.
"""

import re
from pathlib import Path

import yaml

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


class Refused(Exception):
    """Nothing was submitted; the text says why and what to do."""


def read_site(path: Path) -> dict:
    """The site's settings, every key there and of its type. Raises Refused naming file, key and what it got."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
        if isinstance(value, list) and (wrong := [item for item in value if not isinstance(item, str)]):
            raise Refused(f"{path}: {key} holds {wrong[0]!r}, which is no text: put the whole line in quotes")
    _check_texts(path, values)
    least = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "grace": 1, "join": 1}
    for key, bound in least.items():
        if values[key] < bound:
            raise Refused(f"{path}: {key} must be at least {bound}, not {values[key]}")
    if 0 < values["gpus_per_node"] < values["ranks_per_node"]:  # NCCL refuses two ranks on one GPU
        counts = f"{values['ranks_per_node']} ranks for {values['gpus_per_node']} GPU(s) of a node"
        raise Refused(f"{path}: ranks_per_node must not be more than gpus_per_node: {counts}")
    return values


def _check_texts(path: Path, values: dict) -> None:
    """What stands in a template between quotes must not end them, and what stands in #SBATCH lines must be an option."""
    for key in ("python", "image", "mounts"):
        for text in values[key] if key == "mounts" else [values[key]]:
            if found := re.search(r'["`\\\n]', text):
                raise Refused(f"{path}: {key} holds {found[0]!r} in {text!r}: no quotes, backslashes or line breaks")
    for text in values["mounts"]:
        if not text or set(text) & set(",:"):
            raise Refused(f"{path}: mounts holds {text!r}: a folder, seen under the same path inside, without , and :")
    for text in values["sbatch"]:
        if not text.startswith("-") or "\n" in text:
            raise Refused(f"{path}: sbatch holds {text!r}, which is no option of sbatch, like --partition=gpu")


def check_time(limit: str, *, least: int, origin: str) -> None:
    """Refuse a time limit that is none of SLURM's, or shorter than `least` seconds.

    Such a job would be told to stop as soon as it has started, and requeue itself for ever.
    """
    if re.fullmatch("(?i)infinite|unlimited", limit):
        return
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(\d+):(\d+):(\d+))|(?:(\d+)(?::(\d+))?)", limit)
    if not found:
        raise Refused(f"{origin}: {limit!r} is no time limit: [DAYS-]HOURS:MINUTES:SECONDS, or minutes")
    days, hours, minutes, seconds, h, m, s, only_minutes, only_seconds = (int(part or 0) for part in found.groups())
    total = 86400 * days + 3600 * (hours + h) + 60 * (minutes + m + only_minutes) + seconds + s + only_seconds
    if total < least:
        raise Refused(
            f"{origin}: {limit} is {total} s, and the job is told to stop up to {least} s before its end (grace and SLURM's "
            f"own two minutes): it would never train; at least {least // 60 + 1} minutes, or less grace in the site file"
        )


def read_networks() -> dict[str, dict[str, list[str]]]:
    """networks.yaml: section -> variable -> [value, reason]."""
    return yaml.safe_load((CLUSTER / "networks.yaml").read_text())
