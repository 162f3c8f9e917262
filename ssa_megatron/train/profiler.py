"""A profile of steps a to b, into RUN/profile/: `ssa train ... --profile a:b`, or `ssa profile RUN a:b` for a running job.

One rank of each model-parallel position records (data-parallel rank 0), so that every pipeline stage is seen once. Steps
outside the range run without the profiler; the figures of steps inside it are slower and not for quoting.
"""

from pathlib import Path

from torch.profiler import profile

from ssa_megatron.parallel import device
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.train.console import Console
from ssa_megatron.train.hooks import Hook


class StepProfiler(Hook):
    """Records the steps of `steps`, numbered from 1 as in the log, into `folder`."""

    def __init__(self, steps: range, folder: Path, parallel: ParallelState, console: Console):
        self.steps, self.folder, self.parallel, self._console = steps, folder, parallel, console
        self._recorder: profile | None = None

    def ask(self, first: int, last: int, done: int) -> bool:
        """Record these steps too; whether they are to come and no others are asked for. The same on every rank."""
        if first <= done or (len(self.steps) and done < self.steps[-1]):
            return False
        self.steps = range(first, last + 1)
        return True

    def before_step(self, step: int) -> None:
        if step in self.steps and self.parallel.dp_rank == 0 and self._recorder is None:
            self._recorder = profile(activities=device.profiler_activities())
            self._recorder.start()

    def after_step(self, step: int, values: dict) -> None:
        """Close the profile after its last step."""
        if step + 1 not in self.steps:
            self.on_end()

    def on_end(self) -> None:
        """Also for a run that stops inside the range: what was recorded is kept."""
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        device.synchronize()
        recorder.stop()
        stem = f"steps-{self.steps[0]}-{self.steps[-1]}-rank-{self.parallel.rank}"
        order = f"self_{self.parallel.device.type}_time_total"
        table = recorder.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{stem}.txt").write_text(table)
            recorder.export_chrome_trace(str(self.folder / f"{stem}.json.gz"))
        except OSError as problem:  # a profile that cannot be written must not end the run
            self._console.say(f"  profile NOT written: {problem}")
            return
        self._console.say(f"  profile written: {self.folder / stem}.txt and .json.gz (chrome://tracing, Perfetto)")
