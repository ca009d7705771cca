"""One JSON object over HTTP."""

import json
from typing import Any

from ..common.errors import InputError, one_line, reason_of
from ..common.files import json_object

RETRIES: dict[str, Any] = {
    **{"total": 6, "connect": 2, "read": 0, "redirect": 0, "status_forcelist": (429, 502, 503, 504)},
    **{"allowed_methods": None, "raise_on_status": False, "backoff_factor": 1.0, "backoff_max": 30.0},
    "retry_after_max": 60,
}
"""How a busy server is asked again: after 0, 2, 4, 8, 16 and 30 seconds, or when it says. A request that it may be
working on is not sent twice."""
SECONDS_TO_CONNECT = 30.0


def json_at(url: str, seconds: float, body: dict[str, Any] | None = None, api_key: str | None = None) -> dict[str, Any]:
    """The JSON object at `url`, waited for `seconds` and asked for again where the server is busy; a `body` is posted.

    `api_key` is sent as a bearer token; an error that repeats it is shown without.
    """
    try:
        import urllib3
    except ImportError as error:
        raise InputError(f"`base_url` {url}: asking a server takes urllib3: pip install 'gradprobe[server]'") from error
    # Each request has its connection: a server may close an idle one just when it is used again.
    headers = {"Content-Type": "application/json", "Connection": "close"}
    headers |= {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        response = urllib3.request(
            "GET" if body is None else "POST",
            url,
            body=None if body is None else json.dumps(body),
            headers=headers,
            retries=urllib3.Retry(**RETRIES),
            timeout=urllib3.Timeout(connect=min(seconds, SECONDS_TO_CONNECT), read=seconds),
        )
    except urllib3.exceptions.HTTPError as error:
        raise InputError(f"{url}: can't be reached ({reason_of(getattr(error, 'reason', None) or error)})") from error
    if response.status != 200:
        said = f"{response.reason or ''}: {response.data.decode('utf-8', 'replace')}"
        if api_key is not None:
            said = said.replace(api_key, "(the key)")
        hint = "; `api_key_env` names the variable that holds its key" if response.status in (401, 403) else ""
        raise InputError(f"{url}: HTTP {response.status} {one_line(said)}{hint}")
    return json_object(response.data, url)
