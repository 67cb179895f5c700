"""What AWS and its SDK say when they refuse, as our errors. Their texts never travel on.

Told apart by error code, then by status. Sources: "Common errors" and each operation's errors in the
API references of Secrets Manager, STS and KMS.
"""

from __future__ import annotations

from typing import Any

import botocore.exceptions as vendor

from keyturn.destinations.base import pause
from keyturn.destinations.network import trouble
from keyturn.errors import (
    Conflict,
    Denied,
    DestinationError,
    DestinationUnavailable,
    NotFound,
    Rejected,
    Throttled,
)

# Credentials that were good once: others may be had.
WORN_OUT = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "UnrecognizedClientException",
     "InvalidClientTokenId", "RequestExpired", "TokenRefreshRequired"}
)  # fmt: skip
THROTTLED = frozenset(
    {"ThrottlingException", "Throttling", "ThrottledException", "RequestThrottled",
     "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown",
     "BandwidthLimitExceeded", "ProvisionedThroughputExceededException"}
)  # fmt: skip
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "NotAuthorized"})
_BAD_LOGIN = WORN_OUT | {
    "InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature",
    "MissingAuthenticationToken", "MissingAuthenticationTokenException", "OptInRequired",
    "InvalidIdentityToken", "IDPRejectedClaim", "IDPCommunicationError", "AuthFailure",
}  # fmt: skip
ACTIONS = ("CreateSecret", "DescribeSecret", "GetSecretValue", "PutSecretValue", "TagResource",
           "UpdateSecretVersionStage")  # fmt: skip
_KEY = frozenset({"EncryptionFailure", "DecryptionFailure", "KMSAccessDeniedException"})
_POLICY = "compare its policy with `keyturn policy aws`"


def code_of(error: BaseException) -> str:
    """Return the service's code of a refusal; "" where it gave none, or nothing refused."""
    found = _part(error, "Error").get("Code")
    return found if isinstance(found, str) else ""


def understand(
    error: Exception, *, name: str, operation: str, what: str, write: bool
) -> DestinationError:
    """Return ours for what the SDK raised. `write` says that it may have changed something."""
    if isinstance(error, DestinationError):
        if isinstance(error, DestinationUnavailable):
            error.sent = error.sent and write
        return error
    if isinstance(error, vendor.ClientError):
        return _refusal(error, name=name, operation=operation, what=what, write=write)
    if isinstance(error, vendor.ParamValidationError):
        return Rejected(f"{name}: {operation} does not take this")
    return _broken(error, name=name, write=write)


def _refusal(
    error: vendor.ClientError, *, name: str, operation: str, what: str, write: bool
) -> DestinationError:
    code, meta = code_of(error), _part(error, "ResponseMetadata")
    status = int(meta.get("HTTPStatusCode") or 0)
    if code in THROTTLED or status == 429:
        headers = meta.get("HTTPHeaders") or {}
        return Throttled(
            f"{name}: {operation} is throttled", retry_after=pause(headers.get("retry-after"))
        )
    if status >= 500:
        return DestinationUnavailable(f"{name}: {operation} failed ({status})", sent=write)
    if 300 <= status < 400:
        return DestinationUnavailable(
            f"{name}: the server sent a redirect, and redirects are refused",
            hint="set the connection's endpoint to the one that answers itself",
            sent=write,
        )
    if status < 300:
        return DestinationUnavailable(f"{name}: the answer makes no sense", sent=write)
    return _named(error, code, status, name=name, operation=operation, what=what)


def _named(
    error: vendor.ClientError, code: str, status: int, *, name: str, operation: str, what: str
) -> DestinationError:
    """Return ours for a refusal that no second try changes."""
    if code in _KEY or (code in _DENIED and _is_of_key(error)):
        return Denied(
            f"{name}: {operation} of {what}: the KMS key cannot be used",
            hint=f"it must be enabled and the login needs its rights: {_POLICY}",
        )
    if code in _DENIED:
        lacking = _action_of(error, operation)
        return Denied(f"{name}: the login lacks {lacking} on {what}", hint=_POLICY)
    if code in _BAD_LOGIN or (not code and status in (401, 403)):
        return Denied(
            f"{name}: the login is refused ({code or status})",
            hint="check the credentials, and this host's clock",
        )
    if code == "ResourceNotFoundException":
        return Conflict(f"{name}: {what} is there no more")
    if code == "ResourceExistsException":
        return Conflict(f"{name}: {what} was made by somebody else meanwhile")
    if code == "LimitExceededException":
        return Rejected(
            f"{name}: {operation} of {what}: a quota of the service is used up",
            hint="it holds 100 versions, none removed before a day is over, and 20 labels a secret",
        )
    if code == "InvalidRequestException":
        return Rejected(
            f"{name}: {operation} of {what}: its state does not allow it",
            hint="is it marked for deletion? `aws secretsmanager restore-secret --secret-id NAME`",
        )
    if not code and status == 404:
        return NotFound(f"{name}: nothing answers there ({status})")
    return Rejected(f"{name}: {operation} of {what} is refused ({status})")


def _broken(error: Exception, *, name: str, write: bool) -> DestinationError:
    found = trouble(error)
    if found is not None:
        sent = write and found.sent
        return DestinationUnavailable(f"{name}: {found.what}", hint=found.hint, sent=sent)
    if isinstance(error, vendor.EndpointConnectionError | vendor.ConnectTimeoutError):
        return DestinationUnavailable(f"{name}: cannot be reached", sent=False)
    # Cut connections, late and senseless answers: perhaps it landed.
    return DestinationUnavailable(f"{name}: {type(error).__name__}", sent=write)


def _action_of(error: vendor.ClientError, operation: str) -> str:
    """Return the missing action: one request can need two, and only the text says which.

    Nothing of the text but one of our own words comes out of here.
    """
    text = str(_part(error, "Error").get("Message"))
    named = next((one for one in ACTIONS if f"{one} on " in text), None)
    service = "sts" if operation.startswith(("Assume", "GetCaller")) else "secretsmanager"
    return f"{service}:{operation}" if named is None else f"secretsmanager:{named}"


def _is_of_key(error: vendor.ClientError) -> bool:
    """Tell a missing right on the key from one on the secret: the code is the same for both."""
    text = _part(error, "Error").get("Message")
    said = text.lower() if isinstance(text, str) else ""
    return "kms:" in said or "access to kms" in said  # and not an entry that is called so


def _part(error: BaseException, name: str) -> dict[str, Any]:
    response = getattr(error, "response", None)
    found = response.get(name) if isinstance(response, dict) else None
    return found if isinstance(found, dict) else {}
