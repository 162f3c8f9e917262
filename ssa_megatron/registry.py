"""Variants of one thing by name: attention kinds, optimizers, schedules, loggers. One class per variant, one registry per thing.

A variant registers itself with a decorator in the module that defines it; a registry of a package finds its modules by file
name. Everyone else asks the variant's class, so adding one changes no other file. An unknown name raises where it is first read.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from ssa_megatron.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The variants that `field` of a recipe may name.

    home: a module whose classes register themselves, or a package with one module per variant, named as the variant is. Modules
    of a package are imported when their variant is asked for. helpers: modules of the package that are not variants.
    """

    def __init__(self, field: str, home: str, *, helpers: tuple[str, ...] = ("base",)):
        self.field, self._home, self._helpers = field, home, helpers
        self._variants: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: the class is variant `name`. Also for code outside this package."""

        def keep(variant: T) -> T:
            if self._variants.get(name, variant) is not variant:
                raise ValueError(f"{self.field}: {name!r} is registered twice")
            self._variants[name] = variant
            return variant

        return keep

    def unregister(self, name: str) -> None:
        """Forget a variant that `register` added; for tests."""
        self._variants.pop(name, None)

    def names(self) -> list[str]:
        """Every name that may be asked for, sorted."""
        return sorted(self._variants.keys() | set(self._found()))

    def __contains__(self, name: object) -> bool:
        return name in self._variants or name in self._found()

    def __getitem__(self, name: str) -> T:
        """Variant `name`. Raises ConfigError for a name that is not registered, with those that are."""
        if name not in self._variants and name in self._found():
            importlib.import_module(f"{self._home}.{name}" if self._folders() else self._home)
        if name not in self._variants:
            raise ConfigError(
                f"{self.field}={name} is not known",
                remedy=f"known: {', '.join(self.names())}",
                id="unknown-variant",
            )
        return self._variants[name]

    def _folders(self) -> list[str]:
        """Where the modules of a package lie, without importing it; empty for a module."""
        spec = importlib.util.find_spec(self._home)
        return list(spec.submodule_search_locations or ()) if spec else []

    def _found(self) -> list[str]:
        folders = self._folders()
        if not folders:
            importlib.import_module(self._home)  # its classes register themselves
            return list(self._variants)
        modules = (module.name for module in pkgutil.iter_modules(folders))
        return [name for name in modules if name not in self._helpers and not name.startswith("_")]
