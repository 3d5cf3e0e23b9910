# A model that Trainway exported, merged or as an adapter of its base, behind vLLM's OpenAI-compatible server.
# Build it with: bash scripts/image.sh serve
FROM vllm/vllm-openai:v0.29.0@sha256:c2914767605584b6d8f45686b82de173ecc99e781897aa3d0a66dacd72c51ae1

COPY images/serve.py /opt/trainway/serve.py

# Whatever is written goes to the volume or to /tmp: the root file system may be read-only.
ENV HOME=/tmp \
    USER=trainway \
    LOGNAME=trainway \
    HF_HOME=/workspace/hf_cache \
    XDG_CACHE_HOME=/tmp/cache \
    VLLM_CACHE_ROOT=/tmp/vllm \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1

ARG REVISION=unknown
LABEL org.opencontainers.image.title="trainway-serve" \
      org.opencontainers.image.description="Serves a model that Trainway exported, by vLLM" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.revision="${REVISION}"

USER 1000:1000
ENTRYPOINT ["python3", "/opt/trainway/serve.py"]
