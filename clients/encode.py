"""Users as dicts of features -> the request's tensors, as the schema declares them.

No vocabulary is needed here: the wire carries raw keys (integers as they are, strings as their stable 64-bit
key); the server owns the vocabularies of its snapshot.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hsnn_core.errors import FeatureError, RequestError
from hsnn_core.schema import Schema, encode_row_values
from hsnn_core.schema_eligibility import encode_context

DTYPES = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64}

# One for all users of a request, or one for each of them.
Context = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
Excluded = Mapping[str, Any] | Sequence[Mapping[str, Any] | None]
ExcludedItems = Iterable[Any] | Sequence[Iterable[Any]]


@dataclass(frozen=True)
class WireUsers:
    """B users whose features are wire tensors already, by name: dense (B, dim) float32, ids (B, length) int64
    raw keys, the end padded with KEY_MISSING. For callers that hash or gather features upstream."""

    tensors: Mapping[str, np.ndarray]


class UserEncoder:
    """Encodes B users into one array per user feature: dense (B, dim) float32, ids (B, length) int64."""

    def __init__(self, schema: Schema) -> None:
        self._features = {feature.name: feature for feature in schema.features_of("user")}
        self._wire = schema.user_wire()

    def encode(self, users: Sequence[Mapping[str, Any]] | WireUsers) -> dict[str, np.ndarray]:
        """A feature that is left out (or None) is sent as missing: its default, or no ids.

        RequestError: not a non-empty list of dicts. FeatureError: unknown feature, wrong type, NaN; the
        message names the user's place in the list, the feature, what came and what is expected.
        """
        if isinstance(users, WireUsers):
            return self._checked(users.tensors)
        if isinstance(users, Mapping) or not isinstance(users, Sequence) or isinstance(users, str):
            raise RequestError(
                f"users: got {type(users).__name__}, expected a list of dicts, one per user; "
                "put a single user into a list"
            )
        if not users:
            raise RequestError("users: got an empty list, expected at least one user")
        for row, user in enumerate(users):
            self._check_names(row, user)
        tensors = {}
        for tensor in self._wire:
            values = np.empty((len(users), *tensor.shape), DTYPES[tensor.datatype])  # (B, dim or length)
            for row, user in enumerate(users):
                try:
                    values[row] = encode_row_values(self._features[tensor.name], user.get(tensor.name))
                except FeatureError as error:
                    raise FeatureError(f"user {row}: {error}") from None
            tensors[tensor.name] = values
        return tensors

    def _checked(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {tensor.name: tensor for tensor in self._wire}
        if set(tensors) != set(wanted):
            raise RequestError(f"users: got the wire tensors {sorted(tensors)}, expected {sorted(wanted)}")
        counts = {len(values) for values in tensors.values()}
        for name, tensor in wanted.items():
            got, dtype = tensors[name], np.dtype(DTYPES[tensor.datatype])
            if got.shape[1:] != tensor.shape or got.dtype != dtype or len(counts) != 1 or not len(got):
                raise RequestError(
                    f"users: wire tensor {name} is {got.dtype} {got.shape}, expected {dtype} "
                    f"(users, {', '.join(map(str, tensor.shape))}) with as many users as the others"
                )
        return dict(tensors)

    def _check_names(self, row: int, user: Mapping[str, Any]) -> None:
        if not isinstance(user, Mapping):
            raise RequestError(
                f"user {row}: got {type(user).__name__}, expected a dict of feature name -> value"
            )
        for name in user:
            if name not in self._features:
                near = difflib.get_close_matches(str(name), self._features, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise FeatureError(
                    f"user {row}: unknown feature '{name}', expected among {sorted(self._features)}{hint}"
                )


def context_tensors(
    schema: Schema,
    users: int,
    context: Context | None = None,
    exclude_items: ExcludedItems | None = None,
    exclude: Excluded | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of what a request of B ``users`` says beside their features, see `encode_context`; each argument is
    one for all users or a list of one per user. Raises RequestError for another number of them, FeatureError."""
    if isinstance(exclude_items, str) or not isinstance(exclude_items, Iterable | None):
        raise RequestError(f"exclude_items: got {exclude_items!r}, expected a list of item ids")
    items = [] if exclude_items is None else list(exclude_items)
    each = any(isinstance(entry, list | tuple | set | np.ndarray) for entry in items)
    return encode_context(
        schema,
        _per_user("context", users, context, context is not None and not isinstance(context, Mapping), {}),
        _per_user("exclude", users, exclude, exclude is not None and not isinstance(exclude, Mapping), {}),
        _per_user("exclude_items", users, items, each, ()),
    )


def _per_user(name: str, users: int, value: Any, each: bool, empty: Any) -> list[Any]:
    if not each:
        return [empty if value is None else value] * users
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    if not listed or len(value) != users:
        got = f"{len(value)} entries" if listed else type(value).__name__
        raise RequestError(
            f"{name}: got {got}, expected one for all users, or a list of {users}, one for each user"
        )
    return [empty if entry is None else entry for entry in value]
