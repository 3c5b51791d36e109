# vLLM with matquant on NVIDIA GPUs. From the repository's root:
#     docker build -f docker/cuda.Dockerfile -t matquant:cuda .
#     docker run --gpus all --ipc host -p 8000:8000 -v ./models:/models:ro matquant:cuda /models/NAME --bits 4
# The library uses torch's stable ABI alone: what is built with one torch and Python runs with vLLM's.
ARG CUDA=13.0.2
ARG VLLM=0.32.0
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Any torch from 2.10 on, its CPU build too: an index that has that one saves gigabytes.
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && pip install 'torch>=2.10' 'setuptools>=77' wheel 'cmake>=3.20'
COPY . /src
# Such as "80;90"; by default for every kind of GPU that the kernels serve.
ARG MATQUANT_CUDA_ARCHITECTURES
RUN MATQUANT_CUDA=ON pip wheel --no-build-isolation --no-deps --wheel-dir /wheels /src

FROM vllm/vllm-openai:v${VLLM}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir /wheels/*.whl
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
