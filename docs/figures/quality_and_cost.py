"""Draws docs/figures/quality-and-cost.svg, the picture of the root README, from measured data in this repository.

Left: what sparse mode costs in quality, from the table "Quality by budget" of docs/evaluation.md. Right: what it costs in time,
from kernels/benchmarks/results/attention-h100-picture.csv. The same data and matplotlib give the same bytes.

    python docs/figures/quality_and_cost.py [OUT.svg]
"""

import csv
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PICTURE = HERE / "quality-and-cost.svg"
ROWS = HERE.parents[1] / "kernels" / "benchmarks" / "results" / "attention-h100-picture.csv"
KINDS = {"ssa": "#1668b8", "full": "#9a9a9a", "moba": "#c77d0a", "nsa": "#8e4bb5"}
LINES = {  # contender of the benchmark -> (colour, legend)
    "SDPA flash": ("#9a9a9a", "full attention, flash"),
    "SDPA cudnn": ("#444444", "full attention, cuDNN"),
    "sparse with routing": ("#1f8f4e", "sparse stream, routing included"),
}
STYLE = {
    "font.size": 9,
    "svg.fonttype": "path",  # the same picture whatever fonts the reader has
    "svg.hashsalt": "ssa",  # element ids are random without it
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def quality() -> dict[str, list[tuple[int, float]]]:
    """Kind -> (blocks, nats per token over the model's own full mode)."""
    page = (HERE.parent / "evaluation.md").read_text()
    table = page.split("| attention | ssa |")[1].split("\n\n")[0]
    found: dict[str, list[tuple[int, float]]] = {kind: [] for kind in KINDS}
    for line in re.findall(r"^\| (?:sparse, )?k=(\d+) \|(.*)\|$", table, re.MULTILINE):
        cells = [cell.strip() for cell in line[1].split("|")]
        for kind, cell in zip(KINDS, cells[1::2], strict=True):
            found[kind].append((int(line[0]), float(cell.split()[0])))
    return found


def cost() -> dict[str, list[tuple[int, float]]]:
    """Contender -> (tokens, forward ms of one layer)."""
    with ROWS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        what: sorted(
            (int(r["shape"].split()[1].rstrip("k")) * 1024, float(r["forward_ms"])) for r in rows if r["what"] == what
        )
        for what in LINES
    }


def draw(path: Path) -> None:
    """Write the picture to `path`."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.5), layout="constrained")
        for kind, points in quality().items():
            left.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=KINDS[kind], label=kind)
        left.set_xscale("log", base=2)
        left.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        left.set_xlabel("blocks of 16 tokens per query (trained with 8)")
        left.set_title("nats per token over the model's full mode\n1 M parameters, King James text, CPU", fontsize=9)
        left.legend(title="attention.kind", frameon=False)
        for what, points in cost().items():
            colour, label = LINES[what]
            right.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour, label=label)
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        lengths = [2**n for n in range(10, 18)]
        right.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
        right.set_xlabel("tokens")
        right.set_title(
            "forward pass of one attention layer, ms\nH100, bf16, 32 / 2 heads, D 64, 16 blocks of 16", fontsize=9
        )
        right.legend(frameon=False)
        for axes in (left, right):
            axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
