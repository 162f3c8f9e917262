"""What a person watching sees: one line a step with progress, loss, speed and the time left.

Only the writer rank prints. Speed and ETA come from the last steps, so a slow start does not spoil them.
"""

import time
from collections import deque


class Console:
    def __init__(self, total_steps: int, interval: int, *, enabled: bool):
        self.total, self.interval, self.enabled = total_steps, interval, enabled
        self._marks: deque[tuple[float, int]] = deque(maxlen=21)
        self._began = time.monotonic()
        self._marks.append((self._began, 0))
        self._tokens = 0

    def say(self, text: str) -> None:
        if self.enabled:
            print(text, flush=True)

    def phase(self, text: str) -> None:
        """A step of start-up, with the seconds since the program began: silence there is what users fear most."""
        self.say(f"[{time.monotonic() - self._began:6.1f} s] {text}")

    def start(self) -> None:
        """Training begins: speed is counted from here."""
        self._marks.clear()
        self._marks.append((time.monotonic(), self._tokens))

    def step(self, step: int, tokens: int, values: dict) -> tuple[float, float]:
        """Count one finished step of `tokens` tokens, print if due; returns (tokens/s, seconds of the step)."""
        before = self._marks[-1][0]
        self._tokens += tokens
        now = time.monotonic()
        self._marks.append((now, self._tokens))
        span = now - self._marks[0][0]
        speed = (self._tokens - self._marks[0][1]) / span if span else 0.0
        if step % self.interval == 0 or step == self.total:
            eta = span / (len(self._marks) - 1) * (self.total - step)
            skipped = "" if values["applied"] else "  SKIPPED: non-finite"
            self.say(
                f"step {step:>{len(str(self.total))}}/{self.total} {100 * step // self.total:>3}%  "
                f"loss {values['loss']:.4f}  align {values['alignment']:.5f}  norm {values['grad_norm']:.2f}  "
                f"lr {values['lr']:.2e}  {_si(speed)} tok/s  eta {_clock(eta)}{skipped}"
            )
        return speed, now - before


def _si(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}G"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
