FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bessemer
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY platform platform
RUN pip install --no-cache-dir --constraint constraints.txt ".[all]"

RUN useradd --create-home bessemer
USER bessemer
WORKDIR /home/bessemer
COPY --chown=bessemer jobs jobs

ENTRYPOINT ["bessemer"]
CMD ["--help"]
