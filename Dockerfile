# docker build --target pipelines -t una-pipelines .   all stages up to publish, with vLLM
# docker build --target train     -t una-train .       the trainer: no Beam, no vLLM
FROM python:3.11-slim AS base
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/una
COPY constraints.txt constraints-gpu.txt pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY scoring scoring
COPY pipelines pipelines
COPY una_train una_train
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

FROM base AS pipelines
RUN pip install --constraint constraints-gpu.txt ".[pipelines,filters,rules,judge,s3,vllm]"
ENTRYPOINT ["una"]

FROM base AS train
RUN pip install --constraint constraints-gpu.txt ".[train]"
ENTRYPOINT ["una", "train"]
