# syntax=docker/dockerfile:1
#
# docker build -t keyturn .            docs/howto/containers.md has the rest
#
# The base is pinned by version. To pin it by content too, put the digest behind both FROM lines:
#   docker buildx imagetools inspect python:3.13.11-slim-trixie --format '{{.Manifest.Digest}}'
#   FROM python:3.13.11-slim-trixie@sha256:…
#
# Its SQLite (Debian 13: 3.46) has the fault of the write-ahead log that 3.51.3 mended. Keyturn does
# not use that log, on purpose (docs/adr/0007-rollback-journal.md), and PostgreSQL is not touched by it.
# Whoever wants a newer one builds libsqlite3.so.0 in the first stage, copies it to /opt/keyturn/lib
# and sets LD_LIBRARY_PATH=/opt/keyturn/lib in the second.

FROM python:3.13.11-slim-trixie AS build
WORKDIR /src
COPY requirements/ requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /build && \
    /build/bin/python -m pip install --quiet --require-hashes -r requirements/build.lock
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/keyturn && \
    /build/bin/python -m pip --python /opt/keyturn/bin/python install --quiet --no-compile --require-hashes -r requirements/all.lock
COPY pyproject.toml README.md LICENSE ./
COPY src/ src/
# Same sources, same bytes: `SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)` as a build argument.
ARG SOURCE_DATE_EPOCH=1577836800
RUN /build/bin/python -m build --wheel --no-isolation --outdir /wheels && \
    /build/bin/python -m pip --python /opt/keyturn/bin/python install --quiet --no-compile --no-deps --no-index /wheels/*.whl && \
    /opt/keyturn/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/keyturn/lib

FROM python:3.13.11-slim-trixie
# Nothing that installs stays: no pip, no compiler, no shell script of ours.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3.13/ensurepip \
           /usr/local/lib/python3.13/site-packages/pip /usr/local/lib/python3.13/site-packages/pip-*.dist-info && \
    install -d -m 0755 /etc/keyturn && \
    install -d -m 0700 -o 65532 -g 65532 /var/lib/keyturn && \
    install -d -m 0750 -o 65532 -g 65532 /run/keyturn
COPY --from=build /opt/keyturn /opt/keyturn
ENV KEYTURN_CONFIG=/etc/keyturn/keyturn.yaml
USER 65532:65532
VOLUME ["/var/lib/keyturn"]
# 20 s to finish what runs, 8 s to park it: `docker stop -t 45`, terminationGracePeriodSeconds: 45.
STOPSIGNAL SIGTERM
# Whether it lives: a standby is not ready, and healthy all the same.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["/opt/keyturn/bin/python", "-I", "-m", "keyturn", "health"]
ENTRYPOINT ["/opt/keyturn/bin/python", "-I", "-m", "keyturn"]
CMD ["run"]
