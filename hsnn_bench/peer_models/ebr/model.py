"""ebr: embedding-based retrieval as it is usually deployed: a two-tower's user tower in ONNX Runtime, its item vectors
in Faiss, which passes over items that the request may not get.

The version directory holds the two-tower's bundle, user_tower.onnx, the Faiss index over its item vectors in order of
position, and ebr.json: {"task": the task whose vector is searched with, "search": {"nprobe": n}, {"efSearch": n} or {}
for all items, "scale": (T,), "bias": (T,)}: logit_t = scale_t <u_t, v> + bias_t.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path.insert(0, str(HERE))  # this version's own hsnn_core

import faiss as faiss_module  # noqa: E402
import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from hsnn_core.bundle import Bundle  # noqa: E402
from hsnn_core.eligibility import AttributeBitmaps, Context  # noqa: E402
from hsnn_core.onnx_runner import OnnxRunner  # noqa: E402
from hsnn_core.search import rank_scores, sigmoid  # noqa: E402

faiss: Any = faiss_module  # its type hints lack half of what it has
USER_TOWER = "user_tower.onnx"


class TritonPythonModel:
    """One request at a time, on one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        faiss.omp_set_num_threads(1)
        settings = json.loads((HERE / "ebr.json").read_text())
        self._bundle = Bundle.open(HERE)
        self._index = faiss.read_index(str(HERE / "items.faiss"))
        self._task = int(settings["task"])
        self._scale, self._bias = (np.array(settings[name], np.float32) for name in ("scale", "bias"))
        search = settings["search"]
        kinds = {"nprobe": faiss.SearchParametersIVF, "efSearch": faiss.SearchParametersHNSW}
        kind = next((kinds[name] for name in search), faiss.SearchParameters)
        self._search = partial(kind, **search)
        attributes = self._bundle.attributes
        self._bitmaps = None if attributes is None else AttributeBitmaps(attributes)
        self._k = int(self._bundle.manifest["k"])
        self._tower = OnnxRunner(HERE / USER_TOWER, [])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            raw = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            k = int(json.loads(request.parameters() or "{}").get("k", self._k))
            answer = self._retrieve(raw, k)
        except Exception as error:  # a request's failure is its own
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, value) for name, value in answer.items() if name in wanted]
        )

    def _retrieve(self, raw: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
        bundle = self._bundle
        users = bundle.transform.encode_users(dict(raw))
        packed = self._tower.user_tower(users.tensors("user"))["user_l1"]
        vectors = packed.reshape(len(packed), len(self._scale), -1)  # (B, T, d)
        query = np.ascontiguousarray(vectors[:, self._task])
        # (B, k), -1 behind what was found
        found = np.concatenate([
            self._index.search(query[user : user + 1], k, params=self._allowed(user, len(query)))[1]
            for user in range(len(query))
        ])  # fmt: skip
        here = found >= 0
        positions = np.where(here, found, 0)
        items = bundle.embeddings[0][positions]  # (B, k, d)
        logits = np.einsum("bkd,btd->bkt", items, vectors) * self._scale + self._bias
        scores = np.where(here, rank_scores(logits, bundle.schema.rank), -np.inf)
        return {
            "item_ids": np.where(here, bundle.index.item_ids[positions], 0),
            "probabilities": np.where(here[..., None], sigmoid(logits), 0),
            "rank_score": scores,
            "valid": here.sum(axis=1, keepdims=True, dtype=np.int32),
        }

    def _allowed(self, user: int, users: int) -> Any:
        """The search's settings for a user whose request says nothing of itself."""
        if self._bitmaps is None:
            return self._search()
        context = Context.from_wire(self._bundle.schema, {}, users, time.time())
        return self._search(sel=faiss.IDSelectorBitmap(self._bitmaps.matching(context, user)))
