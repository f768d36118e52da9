# Two images from one file:
#   docker build --target agent     -t bittailor:agent .       what runs on a device: onnxruntime, numpy, pyyaml, no torch
#   docker build --target toolchain -t bittailor:toolchain .   everything: train, export, quickstart
# docker run --rm bittailor:toolchain quickstart

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY toolchain toolchain
COPY hardware hardware
COPY profiles profiles
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS agent
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl \
    && useradd --create-home bittailor
USER bittailor
WORKDIR /home/bittailor
ENTRYPOINT ["bittailor"]
CMD ["--help"]

FROM agent AS toolchain
USER root
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[train]"
USER bittailor
