"""What config.pbtxt tells the orchestrator, checked once at load."""

from __future__ import annotations

import json
from dataclasses import dataclass

from request_decoding import parse_widths

from hsnn_core.errors import HsnnError, ServerError
from hsnn_core.schema import Schema, first_difference

MODES = ("bls", "in_process")


@dataclass(frozen=True)
class ServingConfig:
    """``schema``: as JSON, for the clients; ``mode``: where the networks run: "bls" (Triton models) or
    "in_process" (ONNX Runtime in here); ``k``, ``widths``: of a request that says nothing else; ``item_log``: path of
    the log of item updates, from the repository."""

    schema: str
    schema_hash: str
    mode: str
    k: int
    widths: tuple[int, ...]
    workers: int
    queue: int
    item_log: str

    @classmethod
    def from_triton(cls, model_config: str) -> ServingConfig:
        """``model_config``: the model's configuration as the JSON that Triton hands to ``initialize``."""
        parameters = json.loads(model_config).get("parameters", {})
        facts = {name: value["string_value"] for name, value in parameters.items()}

        def fact(name: str) -> str:
            if name not in facts:
                raise ServerError(
                    f"config.pbtxt: parameter {name!r} is missing, got {sorted(facts)}; publish again"
                )
            return facts[name]

        mode = fact("mode")
        if mode not in MODES:
            raise ServerError(f"config.pbtxt: parameter mode: got {mode!r}, expected one of {list(MODES)}")
        return cls(
            schema=fact("schema"),
            schema_hash=fact("schema_hash"),
            mode=mode,
            k=_number("k", fact("k"), 1),
            widths=_widths(fact("widths")),
            workers=_number("workers", fact("workers"), 1),
            queue=_number("queue", fact("queue"), 0),
            item_log=fact("item_log"),
        )

    def first_difference(self, schema: Schema) -> str:
        """Where the bundle's schema first differs from the one of config.pbtxt."""
        return (
            first_difference(schema, Schema.from_json(self.schema)) or "none but the hash, which was edited"
        )


def _number(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ServerError(f"config.pbtxt: parameter {name}: got {text!r}, expected a whole number >= {least}")
    return int(text)


def _widths(text: str) -> tuple[int, ...]:
    try:
        return parse_widths(text)
    except HsnnError as error:
        raise ServerError(f"config.pbtxt: parameter {error}") from None
