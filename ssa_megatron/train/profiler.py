"""A profile of steps a to b, into RUN/profile/: `ssa train ... --profile a:b`, or `ssa profile RUN a:b` for a running job.

One rank of each model-parallel position records (data-parallel rank 0), so that every pipeline stage is seen once. Steps
outside the range run without the profiler; the figures of steps inside it are slower and not for quoting.
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ssa_megatron.parallel.state import ParallelState


class StepProfiler:
    """Records the steps of `steps`, numbered from 1 as in the log, into `folder`."""

    def __init__(self, steps: range, folder: Path, parallel: ParallelState):
        self.steps, self.folder, self.parallel = steps, folder, parallel
        self._recorder: profile | None = None

    def ask(self, first: int, last: int, done: int) -> bool:
        """Record these steps too; whether they are to come and no others are asked for. The same on every rank."""
        if first <= done or (len(self.steps) and done < self.steps[-1]):
            return False
        self.steps = range(first, last + 1)
        return True

    def before(self, step: int) -> None:
        if step in self.steps and self.parallel.dp_rank == 0 and self._recorder is None:
            on_gpu = [ProfilerActivity.CUDA] if self.parallel.device.type == "cuda" else []
            self._recorder = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._recorder.start()

    def after(self, step: int) -> str | None:
        """Close the profile after its last step; returns the sentence to print."""
        if self._recorder is None or step + 1 in self.steps:
            return None
        return self.close()

    def close(self) -> str | None:
        """Also for a run that stops inside the range: what was recorded is kept."""
        if self._recorder is None:
            return None
        recorder, self._recorder = self._recorder, None
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        recorder.stop()
        stem = f"steps-{self.steps[0]}-{self.steps[-1]}-rank-{self.parallel.rank}"
        order = "self_cuda_time_total" if self.parallel.device.type == "cuda" else "self_cpu_time_total"
        table = recorder.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{stem}.txt").write_text(table)
            recorder.export_chrome_trace(str(self.folder / f"{stem}.json.gz"))
        except OSError as problem:  # a person's curiosity must not end the run
            return f"  profile NOT written: {problem}"
        return f"  profile written: {self.folder / stem}.txt and .json.gz (chrome://tracing, Perfetto)"
