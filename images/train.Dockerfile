# Trainway on CUDA: `python -m trainway.pod` as an unprivileged user; nothing is written outside /tmp and /workspace.
# Build it with: bash scripts/image.sh train
# The compiler stays: Triton and DeepSpeed compile kernels when they first meet a GPU.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Ubuntu keeps only the newest version of a package, so a pinned one cannot be had next month.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git openssh-client python3.12 python3.12-dev python3.12-venv rsync tmux vim-tiny \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/trainway/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# The libraries come before the source: a change of the source leaves their layer as it is.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src/trainway/__init__.py src/trainway/__init__.py
# Every version is pinned by constraints.txt. DeepSpeed's set-up imports torch, so it comes after it.
# hadolint ignore=DL3013,DL3042
RUN python3.12 -m venv /opt/trainway \
    && grep -E '^torch==' constraints.txt | xargs pip install -c constraints.txt \
    && pip install -c constraints.txt '.[hub,kubernetes,s3]' setuptools wheel ninja \
    && grep -E '^deepspeed==' constraints.txt | xargs pip install -c constraints.txt --no-build-isolation \
    && pip uninstall -y trainway \
    && pip check

COPY src src
# hadolint ignore=DL3013,DL3042
RUN pip install --no-deps . \
    && python -m compileall -q /opt/trainway/lib/python3.12/site-packages/trainway \
    && install -d -o 1000 -g 1000 /workspace

# Whatever is written goes to the volume or to /tmp: the root file system may be read-only.
ENV HOME=/tmp \
    USER=trainway \
    LOGNAME=trainway \
    HF_HOME=/workspace/hf_cache \
    TRAINWAY_HOME=/workspace/.trainway \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCH_EXTENSIONS_DIR=/tmp/torch_extensions \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton

ARG REVISION=unknown
LABEL org.opencontainers.image.title="trainway" \
      org.opencontainers.image.description="Takes a language model the whole way: data, training, evaluation, release" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"

WORKDIR /workspace
USER 1000:1000
ENTRYPOINT ["python", "-m", "trainway.pod"]
