"""Variants of one thing by name: corpus formats, tokenizers, object stores. One class per variant, one registry per thing.

A variant registers itself with a decorator in its own module, and a registry finds the modules of its package by itself.
So adding a variant is adding a file. Two variants cannot have one name.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """The variants that live in the modules of package `home`. They are imported when the first one is looked up."""

    def __init__(self, home: str):
        self._home, self._loaded = home, False
        self._variants: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: the class is known by these names. Code outside of this package may use it too."""

        def keep(variant: T) -> T:
            for name in names:
                if self._variants.setdefault(name, variant) is not variant:
                    raise ValueError(f"{self._home}: {name!r} is registered twice")
            return variant

        return keep

    def unregister(self, *names: str) -> None:
        """Removes names that `register` added; for tests."""
        for name in names:
            self._variants.pop(name, None)

    def get(self, name: str) -> T | None:
        """The variant of this name, or None."""
        self._load()
        return self._variants.get(name)

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._variants[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._load()
        return sorted(self._variants)

    def variants(self) -> list[T]:
        """Each variant once, in the order of their names."""
        return list(dict.fromkeys(self._variants[name] for name in self.names()))

    def _load(self) -> None:
        if not self._loaded:
            for module in pkgutil.iter_modules(importlib.import_module(self._home).__path__):
                importlib.import_module(f"{self._home}.{module.name}")
            self._loaded = True
