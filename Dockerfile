# syntax=docker/dockerfile:1
# The server on CPUs:
#   docker build -t moestro .
#   docker run -p 127.0.0.1:8080:8080 -e MOESTRO_API_KEY=... -v moestro:/cache moestro MODEL --bits 4

FROM python:3.11-bookworm AS build
WORKDIR /src
COPY constraints.txt ./
# torch for CPUs is of an index of its own, from which nothing else is taken.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels -c constraints.txt \
      --index-url https://download.pytorch.org/whl/cpu torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY csrc csrc
COPY src src
RUN pip wheel --no-cache-dir --wheel-dir /wheels --find-links /wheels -c constraints.txt '.[serve,json]'

FROM python:3.11-slim-bookworm
# The wheels are those of constraints.txt; one that was built without its kernels is found here.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels 'moestro[serve,json]' \
    && python -c "from moestro.compute import _kernels; print(_kernels.levels())" \
    && useradd --no-create-home --home-dir /cache --uid 10001 moestro \
    && install --directory --owner moestro --group moestro /cache
ENV HF_HOME=/cache/huggingface MOESTRO_CACHE=/cache/moestro PYTHONUNBUFFERED=1
VOLUME /cache
USER 10001
WORKDIR /cache
EXPOSE 8080
# 503 while the model is fetched and loaded, which may take long.
HEALTHCHECK --interval=30s --timeout=5s --start-period=2h --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["moestro", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["demo"]
