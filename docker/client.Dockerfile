# The command line client: `hsnn query`, `items`, `top` and `health` against a Triton elsewhere. No torch, no Triton.
#   docker build -f docker/client.Dockerfile -t hsnn-client .
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS packages
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH}
RUN pip install --no-cache-dir numpy==1.26.4 pyyaml==6.0.3 "tritonclient[grpc]==2.73.0" tqdm==4.70.1 \
      confluent-kafka==2.16.1
WORKDIR /opt/hsnn
COPY pyproject.toml ./
COPY hsnn_core/ hsnn_core/
COPY clients/ clients/
COPY hsnn_server/ hsnn_server/
COPY hsnn_cli/ hsnn_cli/
RUN pip install --no-cache-dir --no-deps .

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 1000 hsnn \
 && useradd --uid 1000 --gid 1000 --create-home hsnn
COPY --from=packages /opt/venv/ /opt/venv/
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/hsnn
ENTRYPOINT ["hsnn"]
CMD ["query", "--help"]
