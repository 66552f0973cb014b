"""What processes use: against what they are known to have done."""

import os
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory

from hsnn_server.usage import cpu_seconds, resident_bytes, shared_bytes


def test_cpu_time_is_that_of_the_process():
    before, own = cpu_seconds([os.getpid()]), time.process_time()
    while time.process_time() - own < 0.05:
        pass
    used = cpu_seconds([os.getpid()]) - before
    assert 0.05 <= used <= 0.05 + (time.process_time() - own)
    assert cpu_seconds([os.getpid()]) > used > 0


def test_several_processes_are_added_and_those_that_are_gone_count_nothing():
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None and child.stdout.readline()  # it is up
        both = cpu_seconds([os.getpid(), child.pid])
        assert both > 0
        assert resident_bytes([child.pid]) > 1 << 20
        assert resident_bytes([os.getpid(), child.pid]) > resident_bytes([child.pid])
    finally:
        child.communicate(b"\n")
    assert cpu_seconds([child.pid]) == resident_bytes([child.pid]) == 0


def test_shared_memory_counts_pages_in_use():
    region = SharedMemory(create=True, size=8 << 20)
    try:
        empty = shared_bytes(region.name)
        region.buf[: 1 << 20] = b"x" * (1 << 20)
        assert shared_bytes(region.name) - empty >= 1 << 20
        assert shared_bytes(region.name + "-none") == 0
    finally:
        region.close()
        region.unlink()


def test_regions_of_living_processes_are_told_from_those_that_are_left():
    region = SharedMemory(create=True, size=1 << 20)
    child = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()", region.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None and child.stdout.readline()  # it is up
        region.buf[:] = b"x" * (1 << 20)
        assert shared_bytes(region.name, [child.pid, os.getpid()]) == shared_bytes(region.name) >= 1 << 20
        assert shared_bytes(region.name, [os.getpid()]) == 0
    finally:
        child.communicate(b"\n")
        region.close()
        region.unlink()
