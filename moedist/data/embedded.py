"""A corpus that every machine already has: the sources and the documentation of its Python installation.

Two natural domains, `code` (standard library sources) and `docs` (the language reference behind `help()` and the
docstrings of modules and classes), about 9 MB in all, without a download. The text depends on the Python version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from moedist.errors import DataError

# Tests and tables are not prose anyone wants a model of; site-packages differs from machine to machine.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings",
                   "pydoc_data", "__pycache__", "lib-dynload"}
SKIPPED_PREFIXES = ("_sysconfigdata",)  # generated, full of this machine's paths
MIN_DOCSTRING_CHARS = 200


class EmbeddedDocument(NamedTuple):
    """One document, not read yet: `domain` is code or docs, `module` decides the split, both together are unique."""

    domain: str
    module: str
    file: Path | None  # None: a topic of the language reference

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.module}"

    def read(self) -> str:
        """The text; "" where there is none, such as for a module without docstrings."""
        if self.file is None:
            return _topics()[self.module.partition("/")[2]]
        return _docstrings(self.module, self.file) if self.domain == "docs" else _source(self.file)


@lru_cache(maxsize=1)
def source_files() -> tuple[tuple[str, Path], ...]:
    """(module path such as `asyncio/events.py`, file) of every standard library source that is used, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and not name.name.startswith(SKIPPED_PREFIXES):
            found.append((name.as_posix(), file))
    return tuple(sorted(found))


def embedded_documents() -> list[EmbeddedDocument]:
    """Every document of both domains, in an order that is fixed for a Python version.

    The order is by hash of the name, so that the first n documents (`data.max_documents`) are a fair sample of both
    domains and not the modules that start with an underscore.

    Raises:
        DataError: this Python has no readable sources (a zipped or stripped installation).
    """
    documents = [EmbeddedDocument("docs", f"topics/{name}", None) for name in _topics()]
    for module, file in source_files():
        documents += [EmbeddedDocument("code", module, file), EmbeddedDocument("docs", module, file)]
    if not documents:
        raise DataError(f"data.source=embedded finds no Python sources in {sysconfig.get_paths()['stdlib']}; "
                        "use data.source=files data.path=FOLDER")
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def _topics() -> dict[str, str]:
    """The language reference as `help("topic")` shows it; some distributions leave it out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return topics


def _source(file: Path) -> str:
    try:
        with tokenize.open(file) as stream:  # honours the coding line
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


@cache  # parsing is slow, docstrings are small, and training a tokenizer reads them a second time
def _docstrings(module: str, file: Path) -> str:
    """The docstrings of a module and its classes as one text, "" where there is little to read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(_source(file))
    except (SyntaxError, ValueError):
        return ""
    title = module[: -len(".py")].replace("/", ".")
    parts = [(title, ast.get_docstring(tree))]
    parts += [(f"{title}.{node.name}", ast.get_docstring(node)) for node in tree.body if isinstance(node, ast.ClassDef)]
    text = "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in parts if docstring)
    return text + "\n" if len(text) >= MIN_DOCSTRING_CHARS else ""
