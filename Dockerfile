# docker build --tag glmtuner:cpu .                               torch for CPUs
# docker build --build-arg DEVICE=cuda --tag glmtuner:cuda .      torch for CUDA, and Liger's kernels; run it with --gpus all
# docs/install.md says how the image is run.
ARG PYTHON=3.12
ARG DEVICE=cpu

# -- glmtuner's wheel, of the files that it is made of and nothing else
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY glmtuner glmtuner
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# -- the compiler is for torch.compile: kernels=compile, Triton, and bitsandbytes on CPUs
FROM python:${PYTHON}-slim AS system
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /etc/glmtuner/constraints.txt

# -- torch: the largest layer, which changes least
FROM system AS torch-cpu
ENV EXTRAS=""
RUN pip install --no-cache-dir --constraint /etc/glmtuner/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch

# PyPI's torch for Linux is that for CUDA, and brings CUDA's libraries; the driver is the host's
FROM system AS torch-cuda
ENV EXTRAS="[liger]"
RUN pip install --no-cache-dir --constraint /etc/glmtuner/constraints.txt torch

FROM torch-${DEVICE} AS glmtuner
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --constraint /etc/glmtuner/constraints.txt "$(ls /wheel/*.whl)${EXTRAS}"
# any user may run it: docker run --user "$(id -u):$(id -g)"
RUN mkdir --parents --mode=1777 /runs /cache
ENV HOME=/cache GLMTUNER_CACHE=/cache/glmtuner HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
WORKDIR /runs
ENTRYPOINT ["python", "-m", "glmtuner"]
CMD ["doctor"]
