"""Errors of launching and submitting that a user can act on. Each has a stable id for tests and scripts."""


class ClusterError(Exception):
    """The text names the option, file or address, its value and what would work. id: short, stable, kebab-case."""

    def __init__(self, problem: str, *, id: str):
        super().__init__(problem)
        self.id = id


class Refused(ClusterError):
    """Nothing was submitted."""


class AddressProblem(ClusterError):
    """The rendezvous host cannot be resolved, or not to an address that other machines could reach."""
