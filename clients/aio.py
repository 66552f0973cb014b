"""The asyncio client: the same calls as clients.retrieval, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from hsnn_core.schema import Schema

from .canary import MODEL as CANARY_MODEL
from .canary import AsyncSplit, Canary
from .encode import Context, Excluded, ExcludedItems, WireUsers
from .errors import Patience, schema_may_differ, told
from .tls import Tls, open_client
from .tracing import Trace
from .wire import MODEL, Codec, Hit, Question, Results, ServedModel, Timings, served_model

__all__ = ["AsyncRetrievalClient", "Canary", "Hit", "Results", "ServedModel", "Timings", "Trace"]


class AsyncRetrievalClient:
    """Retrieval over gRPC for asyncio; one client serves any number of tasks of its event loop.

    >>> async with AsyncRetrievalClient("localhost:8001") as client:
    ...     hits = await client.retrieve([{"age": 31, "country": "IT", "history": [17, 4]}], k=10)

    Arguments and errors are those of ``clients.retrieval.RetrievalClient``.
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
        self.split: AsyncSplit | None = None
        if canary is not None:
            self._canary = AsyncRetrievalClient(
                url, timeout, expected_schema, retries=0, model=CANARY_MODEL, tls=tls
            )
            self.split = AsyncSplit(canary, self._canary)

    async def connect(self) -> ServedModel:
        """The served schema and defaults, fetched by the first call, and again when the server changed."""
        return (await self._connected(self._patience(None))).model

    async def refresh(self) -> ServedModel:
        """What is served now, asked anew; ServerError when the model is not there."""
        self._codec = await self._fetch(self._patience(None))
        return self._codec.model

    async def retrieve(
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
        """The best ``k`` items of every user, as ``RetrievalClient.retrieve``."""
        question = Question(k, widths, timings, context, exclude_items, exclude, rank_by, tasks, after, trace)
        if self.split is None:
            return await self._retrieve(users, question, timeout)
        return await self.split.answer(
            lambda left: self._retrieve(users, question, left),
            lambda left: self._canary._retrieve(users, question, left),
            self._timeout if timeout is None else timeout,
        )

    async def _retrieve(
        self,
        users: Sequence[Mapping[str, Any]] | WireUsers,
        question: Question,
        timeout: float | None,
    ) -> Results:
        patience = self._patience(timeout)
        codec = await self._connected(patience)
        request = codec.request(users, question)
        while True:
            left = patience.remaining()
            try:
                return codec.answer(
                    await self._grpc.infer(**request, timeout=told(left), client_timeout=left)
                )
            except InferenceServerException as error:
                if schema_may_differ(error):
                    fresh = await self._fetch(patience)
                    if fresh.model.schema != codec.model.schema:
                        self._codec = codec = fresh
                        request = codec.request(users, question)
                        continue
                await asyncio.sleep(patience.pause_after(error))

    async def close(self) -> None:
        if self.split is not None:
            await self.split.close()
        await self._grpc.close()

    async def __aenter__(self) -> AsyncRetrievalClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _patience(self, timeout: float | None) -> Patience:
        return Patience(self._url, self._model, self._timeout if timeout is None else timeout, self._retries)

    async def _connected(self, patience: Patience) -> Codec:
        if self._codec is None:
            self._codec = await self._fetch(patience)
        return self._codec

    async def _fetch(self, patience: Patience) -> Codec:
        while True:
            try:
                reply = await self._grpc.get_model_config(self._model, client_timeout=patience.remaining())
            except InferenceServerException as error:
                await asyncio.sleep(patience.pause_after(error))
            else:
                return Codec(served_model(reply.config, self._expected))
