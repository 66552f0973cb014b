"""A Triton server on this machine, out of the ``nvidia-pytriton`` wheel.

Only ways of *running* a model repository live here. Nothing in a repository refers to this package: the same
config.pbtxt files load in NGC's Triton with its C++ backends.
"""

from .triton import TritonServer, Urls

__all__ = ["TritonServer", "Urls"]
