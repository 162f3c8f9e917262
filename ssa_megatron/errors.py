"""Errors a user can act on. Each names the field or file, its value and the remedy, and carries an exit code and a stable id.

The id is for tests, scripts and search; the wording may improve at any time. Any other exception that escapes is a bug in this
project and keeps its traceback.
"""


class SSAError(Exception):
    """Base of every error with a remedy; `exit_code` is what the process returns."""

    exit_code = 1

    def __init__(self, problem: str, *, remedy: str = "", id: str = ""):
        """problem: what is wrong, where, and the value. remedy: what would work. id: short, stable, kebab-case."""
        super().__init__(problem, remedy)
        self.problem, self.remedy, self.id = problem, remedy, id

    def __str__(self) -> str:
        return self.problem + (f"\n  remedy: {self.remedy}" if self.remedy else "")

    def __reduce__(self):  # errors travel between ranks
        return _rebuild, (type(self), self.problem, self.remedy, self.id)


class ConfigError(SSAError):
    """The recipe or the command line is wrong: the user edits it."""

    exit_code = 2


class DataProblem(SSAError):
    """Corpus, tokenizer or shards are missing, damaged or do not fit the recipe: the user fixes the data."""

    exit_code = 3


class CheckpointError(SSAError):
    """A checkpoint is missing, damaged or belongs to another run."""

    exit_code = 4


class RunFolderError(SSAError):
    """The run folder is in use, or belongs to another recipe."""

    exit_code = 5


class TrainingStopped(SSAError):
    """Training cannot go on (non-finite loss k times in a row): the user looks at the named batch."""

    exit_code = 6


class EnvironmentProblem(SSAError):
    """The machine or the installation cannot do what was asked."""

    exit_code = 7


class PortTaken(SSAError):
    """The port at which the ranks were to meet was found free and taken before they came: a restart meets at another."""

    exit_code = 1


EXIT_HUNG = 8  # the watchdog ended a job in which a rank did not arrive (logs/ has the stacks): retryable
EXIT_REQUEUE = 75  # a committed checkpoint exists and the same command continues (signals)


def _rebuild(kind: type[SSAError], problem: str, remedy: str, id: str) -> SSAError:
    return kind(problem, remedy=remedy, id=id)
