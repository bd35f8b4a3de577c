"""A stand-in for a package that is not installed: its modules and metadata, until it is undone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from .handle import Handle

_ANY_PACKAGE = DistributionFinder.Context()


class _Metadata(Distribution):
    """What importlib.metadata reads of an installed package."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files_by_name = files

    def read_text(self, filename: str) -> str | None:
        return self.files_by_name.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class StandIn(DistributionFinder, Loader):
    """Finds and loads the modules of a package, and its metadata, while it is installed.

    distribution: the package's name for pip; version: which one it says to be. modules: the
    functions and classes of each module, of which the first is the package.
    """

    def __init__(self, distribution: str, version: str, modules: dict[str, Iterable[Any]]) -> None:
        self.distribution, self.version, self.modules = distribution, version, modules
        self.package = next(iter(modules))
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        files = {"METADATA": metadata, "top_level.txt": f"{self.package}\n"}
        self.metadata = _Metadata(files)
        self.handles = 0

    def handle(self) -> Handle:
        """Installs it until the handle is undone. Handles nest: it goes when the last is undone.

        Raises RuntimeError if such a package is importable or imported already.
        """
        return Handle(self._install, self._uninstall)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        return ModuleSpec(name, self, is_package=bool(self._children(name)))

    def exec_module(self, module: ModuleType) -> None:
        for x in self.modules[module.__name__]:
            setattr(module, x.__name__, x)
        if module.__name__ == self.package:
            module.__dict__["__version__"] = self.version
        for name in self._children(module.__name__):
            importlib.import_module(name)

    def find_distributions(self, context: Any = _ANY_PACKAGE) -> list[_Metadata]:
        name = self.distribution if context.name is None else context.name
        return [self.metadata] if name.lower().replace("_", "-") == self.distribution else []

    def _children(self, name: str) -> list[str]:
        return [x for x in self.modules if x.rpartition(".")[0] == name]

    def _install(self) -> None:
        if self.handles == 0:
            if self.package in sys.modules or find_spec(self.package) is not None:
                raise RuntimeError(
                    f"install: {self.package} is installed or imported already, and is not "
                    "replaced. Hint: import its functions from "
                    f"fused_attention.integrations.{self.package}"
                )
            sys.meta_path.insert(0, self)
        self.handles += 1

    def _uninstall(self) -> None:
        self.handles -= 1
        if self.handles == 0:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
            for name in self.modules:
                spec = getattr(sys.modules.get(name), "__spec__", None)
                if spec is not None and spec.loader is self:
                    del sys.modules[name]
