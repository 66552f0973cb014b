# Trainer and exporter: every container runs one `hsnn` command.
#   docker build -f docker/train.Dockerfile -t hsnn-train .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
# Torch is most of the image and changes least, so it has the first layer. PyPI's wheel brings CUDA along;
# PIP_EXTRA_INDEX_URL may name an index of CPU wheels of the same version.
ARG TORCH_VERSION=2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir "torch==${TORCH_VERSION}"
# What the project depends on, and nothing of itself yet: these layers stay while the sources change.
COPY pyproject.toml /tmp/
RUN python -c 'import tomllib; print(*tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      > /tmp/requirements.txt \
 && pip install --no-cache-dir --requirement /tmp/requirements.txt
# A TensorRT plan runs only under the TensorRT that built it: give the serving image's version to export plans.
ARG TENSORRT_VERSION
RUN if [ -n "${TENSORRT_VERSION}" ]; then pip install --no-cache-dir "tensorrt==${TENSORRT_VERSION}"; fi

FROM ${PYTHON_IMAGE}
# The number of the serving image's user, so that both can share a volume.
RUN groupadd --gid 1000 hsnn \
 && useradd --uid 1000 --gid 1000 --create-home hsnn \
 && install --directory --owner=hsnn --group=hsnn /srv/hsnn /srv/hsnn/runs /models
COPY --from=packages /opt/venv/ /opt/venv/
ENV PATH=/opt/venv/bin:${PATH}

# Editable, because publishing copies the orchestrator's sources out of the tree and recipes are found beside it.
WORKDIR /opt/hsnn
COPY pyproject.toml ./
COPY hsnn_core/ hsnn_core/
COPY hsnn_train/ hsnn_train/
COPY hsnn_bench/ hsnn_bench/
COPY export/ export/
COPY hsnn_server/ hsnn_server/
COPY clients/ clients/
COPY hsnn_cli/ hsnn_cli/
COPY model_repository/ model_repository/
COPY recipes/ recipes/
RUN pip install --no-cache-dir --no-deps --editable .

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib
USER 1000:1000
WORKDIR /srv/hsnn
# What Ctrl-C sends: training writes its checkpoint before it ends.
STOPSIGNAL SIGINT
ENTRYPOINT ["hsnn"]
CMD ["--help"]
