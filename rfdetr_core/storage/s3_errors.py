"""What botocore raises, in the words of a person: one line with the URI, the cause and what to do.

The texts of botocore's own exceptions are not passed on: they can hold proxy passwords and parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rfdetr_core.errors import (
    ConfigError,
    MissingObjectError,
    RFDETRError,
    StorageAccessError,
    StorageUnavailableError,
)

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# Code of the answer -> cause and what to do, where the user must change something.
_REFUSED = {
    "InvalidAccessKeyId": ("the store does not know this access key id", "check AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": ("the secret key is wrong", "check AWS_SECRET_ACCESS_KEY"),
    "ExpiredToken": ("the session token has expired", "renew the credentials"),
    "InvalidToken": ("the session token is wrong", "check AWS_SESSION_TOKEN, or unset it for permanent keys"),
    "RequestTimeTooSkewed": ("this machine's clock differs from the store's", "set the clock"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_REGION to the bucket's region"),
    "AuthorizationHeaderMalformed": (
        "the bucket is in another region",
        "set AWS_REGION to the bucket's region",
    ),
    "KeyTooLongError": ("the name is longer than 1024 bytes", "shorten it"),
}
_BUSY = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "NoSuchUpload",
}
_BUSY |= {
    "RequestTimeout",
    "InternalError",
    "ServiceUnavailable",
    "OperationAborted",
    "BandwidthLimitExceeded",
}

_AGAIN = "try again; if it stays so, ask who runs the store"
_NO_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod a role"


@contextmanager
def s3_errors(action: str, uri: str, bucket: str, endpoint: str) -> Iterator[None]:
    """Turn what botocore and s3transfer raise while `action`-ing `uri` into an error of our tree."""
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    what = f"cannot {action} {uri}"
    try:
        yield
    except S3DownloadFailedError:
        raise StorageUnavailableError(f"{what}: it was replaced meanwhile", hint="try again") from None
    except RetriesExceededError as error:
        raise _no_answer(error.last_exception, what, endpoint) from None
    except ClientError as error:
        raise _answered(error, what, bucket, endpoint) from None
    except BotoCoreError as error:
        raise _no_answer(error, what, endpoint) from None


def error_code(error: ClientError) -> str:
    """The code of an S3 error answer; of a HEAD, which has no body, the status as text."""
    return str(error.response.get("Error", {}).get("Code") or "")


def http_status(error: ClientError) -> int:
    """The HTTP status of an S3 error answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answered(error: ClientError, what: str, bucket: str, endpoint: str) -> RFDETRError:
    code, status = error_code(error), http_status(error)
    if code in ("NoSuchKey", "404"):
        return MissingObjectError(f"{what}: no such file", hint="check the URI")
    if code == "NoSuchBucket":
        return StorageAccessError(
            f"{what}: bucket {bucket!r} does not exist at {endpoint}", hint="create it, or correct the URI"
        )
    if code in _REFUSED:
        cause, hint = _REFUSED[code]
        return StorageAccessError(f"{what}: {cause} ({code} at {endpoint})", hint=hint)
    if status >= 500 and (not code or code.isdigit()):
        return StorageUnavailableError(
            f"{what}: {endpoint} does not answer like an S3 store (status {status})",
            hint="check AWS_ENDPOINT_URL, and what stands before the store",
        )
    if code in _BUSY or status >= 500 or status in (408, 429):
        return StorageUnavailableError(f"{what}: {endpoint} is overloaded or failing ({code})", hint=_AGAIN)
    if status in (401, 403):
        return StorageAccessError(
            f"{what}: access denied ({code} at {endpoint})",
            hint=f"give these credentials the right to read, write, delete and list in bucket {bucket!r}",
        )
    return StorageAccessError(f"{what}: refused with {code or status} at {endpoint}", hint="check the URI and settings")


def credentials_error(error: BaseException, what: str) -> RFDETRError | None:
    """The error to raise if botocore failed to find or fetch credentials."""
    from botocore import exceptions as boto

    if isinstance(error, boto.NoCredentialsError):
        return StorageAccessError(f"{what}: no AWS credentials found", hint=_NO_CREDENTIALS)
    if isinstance(error, boto.PartialCredentialsError):
        return StorageAccessError(f"{what}: the AWS credentials are incomplete", hint=_NO_CREDENTIALS)
    if isinstance(error, boto.CredentialRetrievalError):
        provider = str(error.kwargs.get("provider", ""))
        cause = f"{what}: credentials could not be fetched from {provider!r}"
        if provider in ("iam-role", "container-role"):
            return StorageUnavailableError(cause, hint="the metadata service does not answer: try again")
        return StorageAccessError(cause, hint="log in again, or check ~/.aws/config")
    login = getattr(boto, "LoginError", boto.SSOError)  # `aws login` is younger than boto3 1.40
    if isinstance(error, (boto.SSOError, login, boto.TokenRetrievalError, boto.NoAuthTokenError)):
        return StorageAccessError(f"{what}: the AWS login is missing or has expired", hint="log in again")
    return None


def _no_answer(error: BaseException, what: str, endpoint: str) -> RFDETRError:
    from botocore import exceptions as boto

    text = str(error)
    if (credentials := credentials_error(error, what)) is not None:
        return credentials
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
        return StorageAccessError(
            f"{what}: the certificate of {endpoint} is not trusted",
            hint="set AWS_CA_BUNDLE to the file with its certificate authority",
        )
    if isinstance(error, (boto.ParamValidationError, boto.ValidationError, boto.EndpointProviderError)):
        return ConfigError(f"{what}: the store's client refuses it ({type(error).__name__})", hint="check the URI")
    if isinstance(error, (boto.ConnectTimeoutError, boto.ReadTimeoutError)):
        cause = "does not answer in time"
    elif isinstance(error, boto.ProxyConnectionError):
        cause = "cannot be reached through the proxy"
    elif isinstance(error, boto.EndpointConnectionError):
        unknown = any(word in text + repr(error.kwargs.get("error")) for word in ("NameResolution", "resolve"))
        cause = "cannot be reached: its name is unknown" if unknown else "cannot be reached"
    else:
        cause = f"broke off ({type(error).__name__})"
    return StorageUnavailableError(f"{what}: {endpoint} {cause}", hint="check AWS_ENDPOINT_URL and the network")
