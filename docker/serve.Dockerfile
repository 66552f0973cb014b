# NGC Triton with what the orchestrator needs. The towers and scorers run on its C++ backends.
#   docker build -f docker/serve.Dockerfile -t hsnn-serve .                        repository mounted at /models
#   docker build -f docker/serve.Dockerfile -t hsnn-serve-v3 --target baked \
#     --build-context repository=repo .                                            repository inside the image
FROM nvcr.io/nvidia/tritonserver:26.08-py3 AS server

# The Pythons of pyproject.toml: hsnn_core runs in this image's interpreter.
RUN python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'

# in_process repositories run their networks in the orchestrator's Python; all others leave them to Triton.
ARG MODE=bls
ARG PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -m pip install --no-cache-dir numpy==1.26.4 \
 && if [ "${MODE}" = in_process ]; then python3 -m pip install --no-cache-dir onnxruntime==1.32.0; fi

COPY docker/entrypoint.sh /usr/local/bin/hsnn-triton
RUN install --directory --owner=1000 --group=1000 /models /items

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# The base image's triton-server.
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
# The model's own readiness: the server's turns unready while any version of anything loads.
HEALTHCHECK --interval=5s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python3", "-c", "import urllib.request as web; web.urlopen('http://127.0.0.1:8000/v2/models/hsnn_retrieve/ready', timeout=4)"]
# The base image's own entrypoint first: it makes CUDA's forward compatibility work, then executes the rest.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "hsnn-triton"]

# Empty unless the build names a directory: --build-context repository=DIR.
FROM scratch AS repository

FROM server AS baked
COPY --from=repository / /models/
RUN test -f /models/hsnn_retrieve/config.pbtxt \
 || { echo "no published repository given: add --build-context repository=DIR" >&2; exit 1; }

FROM server AS mounted
