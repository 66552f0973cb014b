"""How the clients' gRPC channels come back to a server that was away."""

from __future__ import annotations

from typing import Any

_ANY_SIZE = -1  # bytes of a message: Triton bounds requests itself

# After a lost connection gRPC would wait 1 s, then ever longer, up to two minutes, and refuse every call meanwhile:
# long after a restarted server answers.
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", _ANY_SIZE),
    ("grpc.max_receive_message_length", _ANY_SIZE),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
