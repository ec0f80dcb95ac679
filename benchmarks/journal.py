"""Results of a long bench, kept as they come, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import msgspec

Result = TypeVar("Result")


class Line(msgspec.Struct, frozen=True):
    """What a result was made of, hashed, and the result."""

    key: str
    result: msgspec.Raw


class Journal:
    """Results by task in a file of JSON lines; without a file it keeps nothing.

    A result counts for a task that is equal field by field, of the same code, under the same versions.
    """

    def __init__(self, file: Path | None, packages: Sequence[str], *made_with: object) -> None:
        """``packages`` of ``penstock`` are the code that results depend on, ``made_with`` the rest.

        Raises:
            ValueError: the file holds something else.
        """
        self._file = file
        self._results: dict[str, msgspec.Raw] = {}
        if file is None:
            return
        self._made_with = (code_digest(packages), *map(str, made_with))
        file.touch()
        *lines, rest = file.read_bytes().split(b"\n")
        for number, text in enumerate(lines, start=1):
            try:
                line = msgspec.json.decode(text, type=Line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{file}, line {number}: {error}; allowed: a journal of results") from error
            self._results[line.key] = line.result
        if rest and not rest.startswith(b"{"):
            raise ValueError(f"{file}, last line: no JSON object; allowed: a journal of results")
        if rest:
            # A line that was being written when the run ended.
            file.write_bytes(b"".join(text + b"\n" for text in lines))

    def find(self, task: msgspec.Struct, kind: type[Result]) -> Result | None:
        """The result of such a task, if there is one."""
        found = self._results.get(self._key(task)) if self._results else None
        return None if found is None else msgspec.json.decode(found, type=kind, strict=False)

    def keep(self, task: msgspec.Struct, result: Any) -> None:
        """Write the result of ``task``."""
        if self._file is not None:
            line = Line(self._key(task), msgspec.Raw(msgspec.json.encode(result)))
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")

    def _key(self, task: msgspec.Struct) -> str:
        made_of = msgspec.json.encode([self._made_with, type(task).__name__, task], enc_hook=str)
        return hashlib.sha256(made_of).hexdigest()


def code_digest(packages: Sequence[str]) -> str:
    """A hash of all modules and JSON files of packages of ``penstock``."""
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(f"penstock.{package}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        (folder,) = map(Path, spec.submodule_search_locations)
        for file in sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".json"}):
            digest.update(f"{package}/{file.relative_to(folder)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
