"""Triton models that HSNN is compared with in one server; `hsnn_bench.serving_peers` copies them into a repository.

They take the orchestrator's request and give its answer, so one client asks all of them alike.
"""
