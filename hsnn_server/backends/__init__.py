"""Python-based Triton backends named like NVIDIA's C++ ones, so that one config.pbtxt serves under either.

Each ``<name>/model.py`` is copied, with ``responses.py`` beside it, into the backends directory of a
server; they run in Triton's Python stub and import nothing of this project.
"""
