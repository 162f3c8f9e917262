"""The targets of the benchmark, as data, and the table that says which are met.

A target is a number made from rows of one run; over several runs the median decides and the spread is shown beside it. A target
whose rows are missing, refused or failed their accuracy gate is "not measured", never met.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

Rows = dict[tuple[str, str], dict]  # (shape, what) -> row of the random selection, of one run
THEIR_EXTRA_MIB = 299  # what the authors' attention adds to full attention at A 8k
CARD_GIB = 80


@dataclass(frozen=True)
class Target:
    text: str
    most: bool  # True: at most `wanted`; False: at least
    wanted: float
    stretch: float
    measure: Callable[[Rows], float]  # raises KeyError where a row is missing
    unit: str = "x"

    def met(self, value: float) -> str:
        better = value <= self.stretch if self.most else value >= self.stretch
        enough = value <= self.wanted if self.most else value >= self.wanted
        return "stretch" if better else "yes" if enough else "NO"


def over(shape: str, what: str, base: str, column: str = "both_ms") -> Callable[[Rows], float]:
    """Time of one row over another's, same shape and run."""
    return lambda rows: rows[shape, what][column] / rows[shape, base][column]


def ssa(shape: str) -> Callable[[Rows], float]:
    """The slower of the two trunks over cuDNN's full attention, their calls timed in turn."""
    return lambda rows: max(rows[shape, f"SSA, trunk {trunk}"]["both_to_cudnn"] for trunk in ("full", "sparse"))


def share(shape: str, what: str) -> Callable[[Rows], float]:
    return lambda rows: 100 * over(shape, what, "SSA, trunk full")(rows)


def extra_memory(rows: Rows) -> float:
    return rows["A 8k", "SSA, trunk full"]["peak_mib"] - rows["A 8k", "SDPA cudnn"]["peak_mib"]


TARGETS = (
    Target("SSA, A 8k batch 4, against cuDNN full attention alone", True, 1.40, 1.20, ssa("A 8k x4")),
    Target("SSA, A 8k batch 1, same", True, 1.50, 1.25, ssa("A 8k")),
    Target("SSA, A 32k, same", True, 1.15, 1.07, ssa("A 32k")),
    Target("SSA, B 8k, same", True, 1.60, 1.35, ssa("B 8k")),
    Target("SSA, C 8k, same", True, 1.90, 1.50, ssa("C 8k")),
    Target("sparse with routing, A 8k, times faster than flash", False, 3, 4.5, 
           over("A 8k", "SDPA flash", "sparse with routing")),
    Target("sparse with routing, A 32k, same", False, 12, 16, over("A 32k", "SDPA flash", "sparse with routing")),
    *(
        Target(f"sparse prefill (forward, routing in), A {length}, same", False, wanted, stretch,
               over(f"A {length}", "SDPA flash", "sparse with routing", "forward_ms"))
        for length, wanted, stretch in (("8k", 3, 4.5), ("32k", 8, 12), ("128k", 12, 18))
    ),
    Target("our dense, A 8k, speed against cuDNN", False, 0.75, 0.9, over("A 8k", "SDPA cudnn", "our dense")),
    Target("our dense, B 8k, same", False, 0.65, 0.9, over("B 8k", "SDPA cudnn", "our dense")),
    Target("SSA, A 8k: documents of 1k, against one document given", True, 0.35, 0.25,
           over("A 8k", "SSA, documents of 1k", "SSA, one document given")),
    Target("SSA, A 8k: documents of 1k, against none given (cuDNN inside)", True, 0.35, 0.25,
           over("A 8k", "SSA, documents of 1k", "SSA, trunk full")),
    Target("routing, share of SSA, A 8k batch 4", True, 5, 3, share("A 8k x4", "routing"), "%"),
    Target("gate and loss, share of SSA, A 8k batch 4", True, 3, 2, share("A 8k x4", "gate and loss"), "%"),
    Target("memory over full attention, A 8k", True, 0.4 * THEIR_EXTRA_MIB, 0.2 * THEIR_EXTRA_MIB, extra_memory, "MiB"),
    Target("A 128k, SSA forward and backward of one layer, memory", True, CARD_GIB / 2, CARD_GIB / 4,
           lambda rows: rows["A 128k", "SSA, trunk full"]["peak_mib"] / 1024, "GiB"),
)  # fmt: skip


def measured(target: Target, runs: Iterable[Rows]) -> list[float]:
    """One number a run; none for a run that lacks a row it needs, or whose row was refused or failed."""
    values = []
    for rows in runs:
        sound = {key: row for key, row in rows.items() if not row.get("note")}
        try:
            values.append(target.measure(sound))
        except KeyError:
            continue
    return values


def table(rows: Iterable[dict]) -> str:
    """Markdown: target, wanted, stretch, measured (median and spread over the runs), met."""
    runs: dict[int, Rows] = {}
    for row in rows:
        if row["selection"] == "random":
            runs.setdefault(row["run"], {})[row["shape"], row["what"]] = row
    lines = ["| target | wanted | stretch | measured | met |", "|---|---|---|---|---|"]
    for target in TARGETS:
        values = measured(target, runs.values())
        sign = "<=" if target.most else ">="
        goal = f"{sign} {target.wanted:.3g} {target.unit} | {target.stretch:.3g}"
        if not values:
            lines.append(f"| {target.text} | {goal} | not measured | - |")
            continue
        middle = median(values)
        spread = f" ({min(values):.3g} to {max(values):.3g}, {len(values)} runs)" if len(values) > 1 else ""
        lines.append(f"| {target.text} | {goal} | {middle:.3g}{spread} | {target.met(middle)} |")
    return "\n".join(lines)
