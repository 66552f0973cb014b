"""Files and streams of item updates: Parquet and CSV tables, JSON lines."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clients.item_rows import ItemRows, is_update
from hsnn_core.errors import DataError
from hsnn_core.schema import Schema

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_PARQUET_ROWS = 4096


class ItemFile:
    """The updates in a file, or on standard input where the name is "-"; a context manager.

    ``total``: how many units of ``unit`` there are to read, None when that is unknown; `updates` gives each update with
    the units read so far. Raises DataError for a file that is missing, of an unknown format, or lacks columns."""

    def __init__(self, name: str, schema: Schema, kind: str | None = None) -> None:
        self.name, self._rows = name, ItemRows(schema)
        self.kind = kind or ("jsonl" if name == "-" else FORMATS.get(Path(name).suffix.lower(), ""))
        if self.kind not in FORMATS.values():
            raise DataError(
                f"{name}: ends in {Path(name).suffix!r}, expected .parquet, .csv or .jsonl; or say --format"
            )
        try:
            self._file: BinaryIO = sys.stdin.buffer if name == "-" else Path(name).open("rb")  # noqa: SIM115
        except OSError as error:
            raise DataError(
                f"{name}: {error.strerror}; expected a file of items, or - for standard input"
            ) from None
        self.total = None if name == "-" else Path(name).stat().st_size
        self.unit = "B"
        self._read = 0
        if self.kind == "parquet":
            self._open_parquet()

    @property
    def unused(self) -> set[str]:
        """Columns read so far that the schema does not name."""
        return self._rows.unused

    @property
    def read(self) -> int:
        """Units of ``unit`` read so far."""
        return self._read

    def updates(self) -> Iterator[Any]:
        """One update after the other. A line that is no JSON comes as its text: the server refuses it alone."""
        return {"parquet": self._parquet, "csv": self._csv, "jsonl": self._jsonl}[self.kind]()

    def __enter__(self) -> ItemFile:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.name != "-":
            self._file.close()

    def _open_parquet(self) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise DataError(
                f"{self.name}: Parquet needs the package pyarrow ({error}); install it, or use CSV"
            ) from None
        source = self._file if self._file.seekable() else io.BytesIO(self._file.read())
        try:
            self._table = pyarrow.parquet.ParquetFile(source)
            self._names = self._table.schema_arrow.names
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.name}: cannot be read as Parquet: {error}") from None
        self._damaged = (pyarrow.ArrowException, OSError)
        self.total, self.unit = self._table.metadata.num_rows, " rows"

    def _parquet(self) -> Iterator[Any]:
        names = self._names
        self._rows.check(names, self.name)
        self._rows.unused |= set(names) - self._rows.columns
        columns = [name for name in names if name in self._rows.columns]
        batches = self._table.iter_batches(_PARQUET_ROWS, columns=columns)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except (*self._damaged, UnicodeDecodeError) as error:
                raise DataError(
                    f"{self.name}, after row {self._read}: damaged Parquet: {error}; those before are applied"
                ) from None
            for row in rows:
                self._read += 1
                yield self._rows.update(row)

    def _lines(self) -> Iterator[str]:
        for number, line in enumerate(self._file, start=1):
            self._read += len(line)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.name}, line {number}: not UTF-8 ({error}); save the file as UTF-8"
                ) from None

    def _csv(self) -> Iterator[Any]:
        table = csv.DictReader(self._lines())
        self._rows.check(table.fieldnames or [], self.name)
        try:
            for row in table:
                if None in row or None in row.values():
                    raise DataError(
                        f"{self.name}, line {table.line_num}: {len(row)} fields, expected {len(table.fieldnames or [])}"
                    )
                yield self._rows.update(self._rows.typed(row))
        except csv.Error as error:
            raise DataError(f"{self.name}, line {table.line_num}: not CSV: {error}") from None

    def _jsonl(self) -> Iterator[Any]:
        for line in self._lines():
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = line.strip()
            yield row if is_update(row, self._rows.schema) else self._rows.update(row)
