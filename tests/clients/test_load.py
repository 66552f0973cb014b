"""The load generator against a gRPC server that echoes: when it sends what, and what it keeps of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from clients.load import METHOD, OK, arrivals, poisson_load

MESSAGES = [str(number).encode() for number in range(10)]


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    service, method = METHOD.strip("/").split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(lambda request, _: request)}
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None)


def test_arrivals_have_exactly_the_rate_and_exponential_gaps() -> None:
    times = arrivals(np.random.default_rng(1), 50.0, 400.0)
    assert len(times) == 20_000 and times[0] > 0 and times[-1] < 400
    gaps = np.diff(times)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.01) and gaps.std() == pytest.approx(1 / 50, rel=0.03)
    assert np.mean(gaps > 2 / 50) == pytest.approx(np.exp(-2), rel=0.05)
    assert len(arrivals(np.random.default_rng(1), 0.1, 1.0)) == 1


def test_every_seed_has_its_own_order_and_answers_say_whose_they_are(echo: str) -> None:
    orders: list[set[int]] = []
    for seed in (1, 2):
        answers: list[tuple[int, bytes]] = []
        fates = poisson_load(
            echo, MESSAGES, 200.0, 0.1, 5.0, seed=seed, answered=lambda *given, to=answers: to.append(given)
        )
        assert len(fates) == 20 and (fates.outcome == OK).all() and fates.failures == ()
        assert (fates.slip >= 0).all() and (fates.latency > 0).all()
        assert all(MESSAGES[which] == answer for which, answer in answers)
        assert sorted(which for which, _ in answers) == sorted([*range(10)] * 2), "in turn"
        orders.append({which for which, _ in answers[:5]})
    assert orders[0] != orders[1], "a short load sees other requests with another seed"
