"""The server binary and backends of the ``nvidia-pytriton`` wheel, laid out as Triton wants them.

The wheel ships the server, libtriton_python.so and one stub per Python version, but no backends directory
that Triton could use as it is, and neither the ONNX Runtime nor the TensorRT backend. Those two are our own
python-based backends (``hsnn_server/backends``), under the names of the C++ ones.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hsnn_core.errors import ServerError

STUB = "triton_python_backend_stub"
PYTHON_BACKEND = ("libtriton_python.so", "triton_python_backend_utils.py")
BACKENDS = ("onnxruntime", "tensorrt")
INSTALL = "install it into this Python environment: pip install nvidia-pytriton==0.7.0"


@dataclass(frozen=True)
class Wheel:
    """Where the parts of an installed wheel lie: the server, the python backend's files, this Python's
    stub, and the directories of the shared libraries they load."""

    server: Path
    python_backend: Path
    stub: Path
    libraries: tuple[Path, ...]


def find_wheel() -> Wheel:
    """The wheel of the running Python; ServerError says what is missing and how to get it."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            f"the local Triton server needs the package nvidia-pytriton, which is missing; {INSTALL}"
        )
    package = Path(spec.submodule_search_locations[0])
    return wheel_at(package, f"{sys.version_info.major}.{sys.version_info.minor}")


def wheel_at(package: Path, python: str) -> Wheel:
    """The wheel whose package ``pytriton`` lies at ``package``, for a Python such as "3.11"."""
    root = package / "tritonserver"
    stubs = root / "python_backend_stubs"
    bundled = package.parent / "nvidia_pytriton.libs"
    wheel = Wheel(
        server=root / "bin" / "tritonserver",
        python_backend=root / "backends" / "python",
        stub=stubs / python / STUB,
        libraries=(bundled, _libpython_directory()),
    )
    if stubs.is_dir() and not wheel.stub.is_file():
        known = ", ".join(sorted(path.name for path in stubs.iterdir()))
        raise ServerError(
            f"nvidia-pytriton has no stub for Python {python}, only for {known}; use one of those Pythons"
        )
    for path in (
        wheel.server,
        wheel.stub,
        bundled,
        *(wheel.python_backend / name for name in PYTHON_BACKEND),
    ):
        if not path.exists():
            raise ServerError(f"the nvidia-pytriton at {package} is incomplete: {path} is missing; {INSTALL}")
    return wheel


def lay_out(wheel: Wheel, target: Path) -> Path:
    """Make a backends directory at ``target``, which must not exist: python, onnxruntime and tensorrt.

    3 MB and a few milliseconds, so every server gets its own: nothing is shared that two starting at once,
    or an upgrade of the wheel, could break.
    """
    python = target / "python"
    python.mkdir(parents=True)
    for name in PYTHON_BACKEND:
        shutil.copyfile(wheel.python_backend / name, python / name)
    shutil.copyfile(wheel.stub, python / STUB)
    (python / STUB).chmod(0o755)
    sources = Path(__file__).parent / "backends"
    for name in BACKENDS:
        (target / name).mkdir()
        shutil.copyfile(sources / name / "model.py", target / name / "model.py")
        shutil.copyfile(sources / "responses.py", target / name / "responses.py")
    return target


def environment(wheel: Wheel, threads: int) -> dict[str, str]:
    """The environment in which the server and its stubs find their libraries and this Python's packages.

    ``threads``: threads of NumPy, and of the networks whose config.pbtxt says nothing of it. The stub
    starts an isolated Python, blind to PYTHONPATH; it takes the environment of the first ``python3`` in
    PATH.
    """
    python = Path(sys.executable).parent
    if not (python / "python3").exists():
        raise ServerError(
            f"{python} has no python3, by which Triton's Python stub finds the installed packages; "
            "run from a virtual environment (python3 -m venv)"
        )
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {
        **os.environ,
        **limits,
        "PATH": _joined(python, os.environ.get("PATH")),
        "LD_LIBRARY_PATH": _joined(*wheel.libraries, os.environ.get("LD_LIBRARY_PATH")),
        "PYTHONUNBUFFERED": "1",  # what a model prints belongs in the log when it happens, not at exit
    }


def _joined(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def _libpython_directory() -> Path:
    """Where the libpython lies that the stub is linked to: that of the running Python's version."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    searched = list(_library_directories())
    for directory in searched:
        if (directory / name).is_file():
            return directory
    raise ServerError(
        f"Triton's Python stub needs {name}, found in none of {', '.join(map(str, searched))}; install "
        f"the shared library of this Python (Debian and Ubuntu: apt-get install {name.split('.so')[0]})"
    )


def _library_directories() -> Iterator[Path]:
    for variable in ("LIBDIR", "LIBPL"):
        if directory := sysconfig.get_config_var(variable):
            yield Path(directory)
    yield Path(sys.base_prefix) / "lib"
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        yield Path("/usr/lib") / multiarch
    yield Path("/usr/lib64")
