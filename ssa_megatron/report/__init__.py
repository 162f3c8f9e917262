"""report.html of a run: curves, figures and samples on one self-contained page."""

from ssa_megatron.report.report_page import write_report

__all__ = ["write_report"]
