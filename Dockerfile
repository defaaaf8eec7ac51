# Two images: `cpu` (any x86-64 or ARM Linux) and `cuda` (an NVIDIA GPU of compute capability 8.0 or higher).
#
#     docker build --target cpu -t dalle2-fast:cpu .
#     docker build --target cuda -t dalle2-fast:cuda .
#     docker run --rm -v "$PWD:/work" dalle2-fast:cpu generate "a red circle" -o red.png
#
# Each is built in two stages, so that neither has a compiler. The CUDA runtime comes with torch's packages.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# With the requirements of pyproject.toml, which pip installs for the build alone.
RUN DALLE2_FAST_NATIVE=cpu pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build-cuda
# Ubuntu 24.04 has Python 3.12.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN DALLE2_FAST_NATIVE=cuda pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm AS base
RUN useradd --create-home --uid 1000 user && mkdir /work && chown user /work
WORKDIR /work
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["dalle2-fast"]
CMD ["--help"]

FROM base AS cpu
COPY --from=build-cpu /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"
USER 1000
HEALTHCHECK --interval=1m --timeout=30s --start-period=30s CMD ["dalle2-fast", "info"]

FROM python:3.12-slim-trixie AS cuda
# Debian 13, because a wheel that was built on Ubuntu 24.04 needs its glibc. Triton compiles its launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 user && mkdir /work && chown user /work
COPY --from=build-cuda /wheels /wheels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"
WORKDIR /work
ENV PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
HEALTHCHECK --interval=1m --timeout=30s --start-period=30s CMD ["dalle2-fast", "info"]
ENTRYPOINT ["dalle2-fast"]
CMD ["--help"]
