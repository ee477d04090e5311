# One image for every node of a cluster, and for the command line: docker run bessemer:latest bessemer --help
FROM python:3.11-slim

# git: runs record their commit; rsync, ssh: `ray up` copies files; wget: KubeRay's health checks.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bessemer
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY platform platform
RUN pip install --no-cache-dir --constraint constraints.txt ".[all]"

RUN useradd --create-home --uid 1000 bessemer
USER bessemer
WORKDIR /home/bessemer
COPY --chown=bessemer jobs jobs

# No entrypoint: KubeRay and `ray up` start their own commands.
CMD ["bessemer", "--help"]
