# One image for every service: `docker run … tailrace python -m services.delivery` (or producer, or billing).
FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
WORKDIR /src
RUN python -m venv --without-pip /opt/tailrace
COPY requirements.lock ./
RUN pip --python /opt/tailrace/bin/python install --no-deps --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY services services
RUN pip --python /opt/tailrace/bin/python install --no-deps --no-build-isolation . \
 && /opt/tailrace/bin/python -m compileall -q -j 2 /opt/tailrace/lib

FROM python:3.13-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin tailrace
COPY --from=build /opt/tailrace /opt/tailrace
ENV PATH=/opt/tailrace/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TAILRACE_LOG_FORMAT=json \
    TAILRACE_PRODUCER_HOST=0.0.0.0 TAILRACE_PRODUCER_PORT=8080 \
    TAILRACE_DELIVERY_HOST=0.0.0.0 TAILRACE_DELIVERY_PORT=8080 \
    TAILRACE_BILLING_HOST=0.0.0.0 TAILRACE_BILLING_PORT=8080
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
CMD ["python", "-m", "services.delivery"]
