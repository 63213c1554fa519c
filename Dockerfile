# frem-search for CPUs and NVIDIA GPUs: PyTorch's wheel for Linux brings CUDA along.
# Pinned are: here Python's minor version and Debian's release; in constraints.txt every package, pip and what builds
# ours too; by PyTorch the version of CUDA. A few small packages that come with CUDA are not.

FROM python:3.12-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /usr/local/lib/frem-search
ENV PATH=/usr/local/lib/frem-search/bin:$PATH
WORKDIR /build
# Dependencies before the program, so that a change of the program does not download them again: for this one step
# the package is empty.
COPY pyproject.toml constraints.txt README.md LICENSE ./
# pip first: the image's own may not know of --build-constraint.
RUN mkdir frem_search studies \
    && touch frem_search/__init__.py studies/empty.toml \
    && pip install -c constraints.txt pip \
    && pip install -c constraints.txt --build-constraint constraints.txt ".[dashboard]" \
    && pip uninstall --yes frem-search
COPY frem_search frem_search
COPY studies studies
RUN pip install -c constraints.txt --build-constraint constraints.txt --no-deps . && pip uninstall --yes pip

FROM python:3.12-slim-trixie
COPY --from=build /usr/local/lib/frem-search /usr/local/lib/frem-search
# A volume is mounted on /data, and a new one takes over what lies there and whose it is.
RUN groupadd --gid 10001 frem \
    && useradd --uid 10001 --gid frem --no-create-home --home-dir /data --shell /usr/sbin/nologin frem \
    && mkdir -p /data/artifacts /data/datasets \
    && chown -R frem:frem /data
ENV PATH=/usr/local/lib/frem-search/bin:$PATH \
    FREM_SEARCH_HOME=/data \
    HOME=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
# No HEALTHCHECK: whether a worker lives, its lease tells (`frem-search status`); whether the dashboard answers,
# docker-compose.yml asks.
ENTRYPOINT ["frem-search"]
CMD ["--help"]
