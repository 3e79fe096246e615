# syntax=docker/dockerfile:1
# gpumon runs from its tree, on the locked packages of requirements.txt. docs/deployment.md says how to use the image.

FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements.txt ./
# Only wheels: a package without one for this processor ends the build here, instead of asking for a compiler.
RUN python -m venv --without-pip /opt/gpumon \
    && python -m pip --python /opt/gpumon install --no-cache-dir --only-binary=:all: --require-hashes -r requirements.txt
WORKDIR /app
COPY .streamlit .streamlit
COPY gpumon_core gpumon_core
COPY pages pages
COPY deploy/healthcheck.py deploy/
COPY app.py gpumon LICENSE ./
# The tree is read-only later, so compile it now, with bytecode that does not depend on the times of the files.
RUN python -m compileall -q --invalidation-mode unchecked-hash .

FROM python:3.13-slim
COPY --from=build /opt/gpumon /opt/gpumon
COPY --from=build /app /app
# The launcher looks for .venv beside itself.
RUN python -m pip uninstall --yes --quiet --root-user-action=ignore pip \
    && install -d -m 0700 -o 1000 -g 1000 /app/history /app/logs \
    && ln -s /opt/gpumon /app/.venv \
    && ln -s /app/gpumon /usr/local/bin/gpumon
# Libraries look for their caches and settings in HOME: a folder without anything to keep.
ENV PATH=/opt/gpumon/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    STREAMLIT_SERVER_ADDRESS=0.0.0.0 \
    STREAMLIT_SERVER_PORT=8081 \
    GPUMON_SOURCE=nvml \
    GPUMON_LOG_FILE=logs/gpumon.log \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=utility
WORKDIR /app
VOLUME ["/app/history", "/app/logs"]
EXPOSE 8081
# Every user can open the driver's devices. A number needs no entry in /etc/passwd; any other one works too.
USER 1000:1000
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-I", "deploy/healthcheck.py"]
CMD ["python", "-m", "streamlit", "run", "app.py"]
