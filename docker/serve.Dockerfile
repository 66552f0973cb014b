# NGC Triton with what the orchestrator needs. The towers and scorers run on its C++ backends.
#   docker build -f docker/serve.Dockerfile -t hsnn-serve .                        repository mounted at /models
#   docker build -f docker/serve.Dockerfile -t hsnn-serve:v3 --target baked \
#     --build-context repository=repo .                                            repository inside the image
# For a build that can be repeated give the base by digest: docker/pin.sh.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.08-py3

FROM ${TRITON_IMAGE} AS packages
# The Pythons of pyproject.toml: hsnn_core runs in this image's interpreter.
# ONNX Runtime is for items that change: whatever engine the networks run on, the item tower runs in the orchestrator.
# cryptography checks signed snapshots where /etc/hsnn/trusted.pem is mounted, docs/security.md.
RUN python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
 && python3 -m pip install --no-cache-dir --target /opt/hsnn/packages numpy==1.26.4 onnxruntime==1.32.0 \
      cryptography==50.0.2

FROM ${TRITON_IMAGE} AS server
# Beside the image's own packages, not over them: Triton's other Python code keeps what it came with.
COPY --from=packages /opt/hsnn/packages/ /opt/hsnn/packages/
COPY hsnn_server/probe.py docker/drain.py /opt/hsnn/
COPY docker/entrypoint.sh /usr/local/bin/hsnn-triton
RUN install --directory --owner=1000 --group=1000 /models /items

ENV PYTHONPATH=/opt/hsnn/packages \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# The base image's triton-server.
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000 8001 8002
# The smoke request: Triton's own readiness goes on saying yes for an orchestrator whose process has died.
HEALTHCHECK --interval=5s --timeout=5s --start-period=5m --retries=3 \
  CMD ["python3", "/opt/hsnn/probe.py", "--url", "http://127.0.0.1:8000", "--repository", "/models", "--timeout", "3", \
       "--ready"]
# The base image's own entrypoint first: it makes CUDA's forward compatibility work, then executes the rest.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "hsnn-triton"]

# Empty unless the build names a directory: --build-context repository=DIR.
FROM scratch AS repository

FROM server AS baked
COPY --from=repository / /models/
RUN test -f /models/hsnn_retrieve/config.pbtxt \
 || { echo "no published repository given: add --build-context repository=DIR" >&2; exit 1; }

FROM server AS mounted
