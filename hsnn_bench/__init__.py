"""The quality benchmarks: the paper's tables, external baselines, and the tuning that both share.

Needs the packages of the extra `bench`; nothing that serves imports it.
"""
