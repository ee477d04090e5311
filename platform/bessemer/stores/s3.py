"""S3 and what speaks its protocol (MinIO, Ceph, R2), through boto3."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.errors import BessemerError, MachineError, StoreError
from bessemer.stores.reading import Answer, ResumingStore
from bessemer.stores.store import Patience, PerProcess, TransientError

__all__ = ["S3Store"]

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
_FIXES = {
    "NoSuchBucket": "create the bucket, or correct the URL",
    "AccessDenied": "grant these credentials s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "ExpiredToken": "renew the credentials",
    "PermanentRedirect": "set AWS_REGION to the region of the bucket",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the region of the bucket",
}
# Answers to HEAD have no body, so boto3 knows the number alone.
_BY_STATUS = {400: "ExpiredToken", 403: "AccessDenied", 301: "PermanentRedirect"}
_PARTS_AT_ONCE = 4


class S3Store(ResumingStore):
    """Objects below ``s3://bucket/prefix``. Credentials, region and AWS_ENDPOINT_URL are boto3's.

    boto3 tries each request again by itself; what it cannot do is to go on with an answer that broke off.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        super().__init__(url, patience)
        found = re.fullmatch(r"s3://([^/?#@]+)(?:/([^?#]*))?", url, re.IGNORECASE)
        if found is None:
            raise StoreError(f"{self.name}: is no address in S3; write s3://BUCKET/PREFIX.")
        self.bucket = found[1]
        self._prefix = f"{(found[2] or '').strip('/')}/".lstrip("/")
        self._client = PerProcess(self._make_client)

    def _make_client(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise MachineError(f"{self.name}: S3 needs boto3; pip install 'bessemer[stores]'.") from None
        config = Config(
            connect_timeout=self.patience.timeout,
            read_timeout=self.patience.timeout,
            retries={"total_max_attempts": self.patience.attempts, "mode": "standard"},
            max_pool_connections=32,
            user_agent_extra="bessemer",
        )
        with self._errors(""):
            # A session of its own: the default one may not be used by two threads at once.
            return boto3.session.Session().client("s3", config=config)

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._prefix + self.checked(name)}

    @contextlib.contextmanager
    def _open(self, name: str, start: int, stop: int | None, version: str | None) -> Iterator[Answer]:
        client = self._client.get()
        wanted = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        if version is not None:
            wanted["IfMatch"] = version
        with self._errors(name):
            try:
                found = client.get_object(**self._where(name), **wanted)
            except client.exceptions.ClientError as e:
                if e.response["ResponseMetadata"]["HTTPStatusCode"] != 416:
                    raise
                head = client.head_object(**self._where(name))
                yield Answer(lambda amount: b"", start, head["ContentLength"], head.get("ETag"))
                return
        total = re.search(r"/(\d+)$", found.get("ContentRange", ""))
        body = found["Body"]

        def read(amount: int) -> bytes:
            from botocore.exceptions import BotoCoreError
            from urllib3.exceptions import HTTPError

            try:
                data: bytes = body.read(amount)
            except (BotoCoreError, HTTPError, OSError) as e:
                raise TransientError(f"{type(e).__name__}: {e}") from None
            return data

        try:
            whole = total is None
            yield Answer(
                read,
                0 if whole else start,
                found["ContentLength"] if total is None else int(total[1]),
                found.get("ETag"),
            )
        finally:
            body.close()

    def size(self, name: str) -> int:
        client = self._client.get()
        with self._errors(name):
            return int(client.head_object(**self._where(name))["ContentLength"])

    def put(self, name: str, path: Path) -> None:
        with path.open("rb"):  # what is wrong with the file is not the store's fault
            pass
        client = self._client.get()
        from boto3.s3.transfer import TransferConfig

        with self._errors(name):
            # An object appears when all of it has arrived, in parts or at once.
            client.upload_file(
                str(path), *self._where(name).values(), Config=TransferConfig(max_concurrency=_PARTS_AT_ONCE)
            )

    def list(self, prefix: str = "") -> dict[str, int]:
        client = self._client.get()
        found = {}
        with self._errors(""):
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._prefix + prefix)
            for page in pages:
                for entry in page.get("Contents", ()):
                    found[entry["Key"].removeprefix(self._prefix)] = int(entry["Size"])
        return dict(sorted(found.items()))

    def delete(self, name: str) -> None:
        client = self._client.get()
        with self._errors(name):
            client.delete_object(**self._where(name))

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn boto3's errors into ours."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except BessemerError:
            raise
        except (ClientError, BotoCoreError, S3UploadFailedError) as e:
            cause = e.__context__ if isinstance(e, S3UploadFailedError) and e.__context__ is not None else e
            raise self._error(name, cause) from None

    def _error(self, name: str, error: BaseException) -> StoreError:
        import botocore.exceptions as known

        without_credentials = (
            known.NoCredentialsError,
            known.PartialCredentialsError,
            known.CredentialRetrievalError,
            known.ProfileNotFound,
        )
        if isinstance(error, without_credentials):
            return self.failed(name, f"no credentials for S3 ({error})", _CREDENTIALS)
        if isinstance(error, known.EndpointConnectionError):
            return self.failed(name, f"no connection ({error})", "check AWS_ENDPOINT_URL and that the server is up")
        if not isinstance(error, known.ClientError):
            return self.failed(
                name, f"{type(error).__name__}: {error}", "check that the store can be reached from here"
            )
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        said = error.response.get("Error", {})
        code = str(said.get("Code", status))
        if code == "NoSuchKey" or (status == 404 and code == "404"):
            return self.missing(name)
        if status == 412:
            return self.failed(name, "changed while it was read", "read it again from its start")
        code = _BY_STATUS.get(status, code) if code.isdigit() else code
        message = f"{said.get('Message', '')} ({code})".strip()
        return self.failed(name, message, _FIXES.get(code, "see the server's documentation of this code"))
