"""Searching before the version takes traffic: its first searches page the index in, start the networks' sessions and
allocate memory, which takes several times as long as a search does later. Admission would reckon with them."""

from __future__ import annotations

import numpy as np
from request_decoding import Ask, Deadline
from retriever import Retriever

from hsnn_core.bundle import Bundle

ROUNDS = 8  # over the users of the smoke request


class NoNetworks:
    """A ``Runner`` that scores all nodes alike: a model can't call others through Triton while it initialises."""

    def __init__(self, bundle: Bundle) -> None:
        self._layers, self._tasks = bundle.index.layers, len(bundle.schema.tasks)

    def user_tower(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """-> "user_l1".."user_lN": (B, 1) f32."""
        users = len(next(iter(inputs.values())))
        return {f"user_l{layer}": np.zeros((users, 1), np.float32) for layer in range(1, self._layers + 1)}

    def score(self, layer: int, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """item (B, C, E_l) -> monn, logits (B, C, T) f32."""
        zeros = np.zeros((*inputs["item"].shape[:2], self._tasks), np.float32)
        return zeros, zeros


def warm_up(bundle: Bundle, retriever: Retriever, ask: Ask) -> None:
    """Retrieve for every user of the smoke request, one by one, some times."""
    users = bundle.smoke().users
    for _ in range(ROUNDS):
        for row in range(len(next(iter(users.values())))):
            one = {name: values[row : row + 1] for name, values in users.items()}
            retriever.retrieve(one, ask, Deadline(0))
