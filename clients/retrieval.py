"""The synchronous client: a dict of features per user in, a list of (item id, scores) per user out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from hsnn_core.schema import Schema

from .canary import MODEL as CANARY_MODEL
from .canary import Canary, Split
from .encode import Context, Excluded, ExcludedItems, WireUsers
from .errors import Patience, schema_may_differ, told
from .tls import Tls, open_client
from .tracing import Trace
from .wire import MODEL, Codec, Hit, Question, Results, ServedModel, Timings, served_model

__all__ = ["Canary", "Hit", "Results", "RetrievalClient", "ServedModel", "Timings", "Trace", "WireUsers"]


class RetrievalClient:
    """Retrieval over gRPC; may be shared between threads.

    >>> with RetrievalClient("localhost:8001") as client:
    ...     for hit in client.retrieve([{"age": 31, "country": "IT", "history": [17, 4]}], k=10)[0]:
    ...         print(hit.item_id, hit.scores["click"])

    ``url``: host:port. ``timeout``: seconds a call may take, retries included. ``expected_schema``: refuse a
    server that serves another one (SchemaMismatch). ``retries``: further attempts when the connection is lost
    or refused. ``canary``: take part in rollouts, see `clients.canary`; without one all requests go to ``model``.
    ``tls``: None for plain text; ServerError when its files are not what they should be.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 2.0,
        expected_schema: Schema | None = None,
        retries: int = 2,
        model: str = MODEL,
        canary: Canary | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._url, self._timeout, self._expected = url, timeout, expected_schema
        self._retries, self._model = retries, model
        self._grpc = open_client(InferenceServerClient, url, tls)
        self._codec: Codec | None = None
        self.split: Split | None = None
        if canary is not None:
            self._canary = RetrievalClient(
                url, timeout, expected_schema, retries=0, model=CANARY_MODEL, tls=tls
            )
            self.split = Split(canary, self._canary)

    def connect(self) -> ServedModel:
        """The served schema and defaults, fetched by the first call, and again when the server changed."""
        return self._connected(self._patience(None)).model

    def refresh(self) -> ServedModel:
        """What is served now, asked anew; ServerError when the model is not there."""
        self._codec = self._fetch(self._patience(None))
        return self._codec.model

    def retrieve(
        self,
        users: Sequence[Mapping[str, Any]] | WireUsers,
        k: int | None = None,
        widths: Sequence[int] | None = None,
        timeout: float | None = None,
        timings: bool = False,
        context: Context | None = None,
        exclude_items: ExcludedItems | None = None,
        exclude: Excluded | None = None,
        rank_by: str | None = None,
        tasks: Sequence[str] | None = None,
        after: int | None = None,
        trace: Trace | None = None,
    ) -> Results:
        """The best ``k`` items of every user, searched together; a user with fewer eligible items gets fewer.

        ``k`` and ``widths`` (nodes kept after each layer but the last) default to the snapshot's own. Who may get an
        item is said by the schema's eligibility section: ``context`` {"country": "IT", "running": 1.7e9},
        ``exclude_items`` [17, 4], ``exclude`` {"advertiser": [5]}, each one for all users or a list of one per user.
        Without context a user gets the items that are open to all. ``tasks``: those whose probabilities are multiplied
        to rank by (default: the schema's ranks); ``rank_by`` "bid" multiplies the product with the item's bid.
        ``after``: a position of the item log, as `ItemClient` returns it: the answer knows all updates up to there.
        ``trace``: the trace that the server's spans of this request belong to, where it is traced (`clients.tracing`).

        Raises FeatureError or RequestError (the request is wrong), SchemaMismatch, DeadlineExceeded, ServerError.

        A server that moved to another schema since the last call is asked again by the new one, unless it is
        not the expected one.
        """
        question = Question(k, widths, timings, context, exclude_items, exclude, rank_by, tasks, after, trace)
        if self.split is None:
            return self._retrieve(users, question, timeout)
        return self.split.answer(
            lambda left: self._retrieve(users, question, left),
            lambda left: self._canary._retrieve(users, question, left),
            self._timeout if timeout is None else timeout,
        )

    def _retrieve(
        self,
        users: Sequence[Mapping[str, Any]] | WireUsers,
        question: Question,
        timeout: float | None,
    ) -> Results:
        patience = self._patience(timeout)
        codec = self._connected(patience)
        request = codec.request(users, question)
        while True:
            left = patience.remaining()
            try:
                return codec.answer(self._grpc.infer(**request, timeout=told(left), client_timeout=left))
            except InferenceServerException as error:
                if schema_may_differ(error):
                    fresh = self._fetch(patience)
                    if fresh.model.schema != codec.model.schema:
                        self._codec = codec = fresh
                        request = codec.request(users, question)
                        continue
                time.sleep(patience.pause_after(error))

    def close(self) -> None:
        if self.split is not None:
            self.split.close()
        self._grpc.close()

    def __enter__(self) -> RetrievalClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _patience(self, timeout: float | None) -> Patience:
        return Patience(self._url, self._model, self._timeout if timeout is None else timeout, self._retries)

    def _connected(self, patience: Patience) -> Codec:
        if self._codec is None:
            self._codec = self._fetch(patience)
        return self._codec

    def _fetch(self, patience: Patience) -> Codec:
        while True:
            try:
                reply = self._grpc.get_model_config(self._model, client_timeout=patience.remaining())
            except InferenceServerException as error:
                time.sleep(patience.pause_after(error))
            else:
                return Codec(served_model(reply.config, self._expected))
