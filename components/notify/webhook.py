"""Posts JSON to a webhook whose address is a secret: it appears in no message."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from rfdetr_core.errors import ConfigError, TransientError, UserError

TIMEOUT_SECONDS = 10.0
WAITS = (1.0, 4.0)  # before the second and the third try
AGAIN = (408, 425, 429)


def post(url: str, body: Any, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Send it, three times at most.

    Raises:
        ConfigError: the address is none.
        UserError: the other side refuses; another try would not help.
        TransientError: it does not answer, or not well.
    """
    request = urllib.request.Request(
        _checked(url), json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirect)
    for wait in (*WAITS, None):
        try:
            with opener.open(request, timeout=TIMEOUT_SECONDS):
                return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in AGAIN:
                raise UserError(
                    f"the webhook answered {error.code}", hint="check the address in notify.webhook_secret_env"
                ) from None
            reason = f"answered {error.code}"
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason = f"could not be reached: {getattr(error, 'reason', None) or type(error).__name__}"
        if wait is not None:
            sleep(wait)
    raise TransientError(f"the webhook {reason}, three times", hint="check it, and the network policy")


def is_slack(url: str) -> bool:
    """Whether this is Slack's own."""
    return (urlsplit(url).hostname or "").endswith("hooks.slack.com")


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        legal = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        legal = False
    if not legal or any(character.isspace() for character in url):
        raise ConfigError("the webhook's address is no http(s) URL", hint="check the Secret that holds it")
    return url


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without a body, and look like a success."""

    def redirect_request(self, *arguments: Any) -> None:
        return None
