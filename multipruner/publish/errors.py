"""What can go wrong between this machine and the Hub, each as one line that names the mend."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from multipruner.core.errors import MultiprunerError


class PublishError(MultiprunerError):
    """The Hub did not take a model, or must not be asked to."""


AGAIN = "the same command goes on, and what has arrived is not sent again"
SILENCE = 100.0
"""Seconds that a Hub may take to say or accept anything at all; large files may take longer on the way."""


@contextmanager
def patience(seconds: float = SILENCE) -> Iterator[None]:
    """Let no call of the Hub's library wait longer for a sign of life; left alone, it would wait for ever.

    Connections of the user's own making (``set_client_factory``) keep their other settings.
    """
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def hub_errors(repo: str, endpoint: str, token: str | None) -> Iterator[None]:
    """Turn whatever the Hub's library raises into a :class:`PublishError` that does not hold the token.

    The classes of the transport differ between versions of huggingface_hub, so they are told by name.
    """
    try:
        yield
    except MultiprunerError:
        raise
    except Exception as error:
        text = explain(error, repo, endpoint)
        if text is None:
            text = f"the push to {repo} failed: {type(error).__name__}: {_line(str(error))}; {AGAIN}"
        whole = "".join(traceback.format_exception(error))
        if token and token in whole:  # such as a proxy that repeats what it was sent
            raise PublishError(text.replace(token, "***")) from None
        raise PublishError(text) from error


def explain(error: BaseException, repo: str, endpoint: str) -> str | None:
    """Return the line for an error, looked for along its causes; ``None`` when nothing is known about it."""
    for each in _causes(error):
        names = {cls.__name__ for cls in type(each).__mro__}
        response = getattr(each, "response", None)
        if "OfflineModeIsEnabled" in names:
            return "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"
        if "HfHubHTTPError" in names and response is not None:
            said = _line(str(getattr(each, "server_message", None) or ""))
            return _status(response.status_code, said, repo, endpoint)
        if names & {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "InvalidURL"}:
            return f"no connection to {endpoint} ({_line(str(each))}); check the network, the proxy and HF_ENDPOINT"
        if "TimeoutException" in names:
            return f"{_server(each) or endpoint} is connected, but silent; try again later: {AGAIN}"
        if names & {"TransportError", "ConnectionError"}:
            return f"the connection to {endpoint} was cut ({_line(str(each)) or type(each).__name__}); {AGAIN}"
        if "HFValidationError" in names:
            return f"{repo!r} cannot be the name of a repository: {_line(str(each))}"
        if isinstance(each, json.JSONDecodeError):
            return f"{endpoint} does not answer as a Hub does; check HF_ENDPOINT, or try again later"
        if isinstance(each, OSError) and each.filename:
            return f"{each.filename} cannot be read: {each.strerror}"
    return None


def _server(error: BaseException) -> str:
    """Return scheme and host of the request that failed, without the rest: a signed address is a secret."""
    try:
        url = error.request.url  # pyright: ignore[reportAttributeAccessIssue]
        return f"{url.scheme}://{url.netloc.decode().rpartition('@')[2]}"
    except (AttributeError, RuntimeError):  # the latter: an error of no request
        return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(status: int, message: str, repo: str, endpoint: str) -> str:
    owner, said = repo.partition("/")[0], f": {message}" if message else ""
    if status == 401:
        return (
            f"{endpoint} does not know this token (401); make one that may write at {endpoint}/settings/tokens, then "
            "give it with --token-file FILE or `hf auth login`"
        )
    if status == 403:
        return (
            f"this token may not write to {repo} (403{said}); push to a name of your own, or make a token that may "
            f"write for {owner!r} at {endpoint}/settings/tokens"
        )
    if status == 404:
        return f"{endpoint} has no {repo} for this token (404{said}); check the name, or the token's rights"
    if status in (409, 412):
        return f"{repo} was changed by somebody else meanwhile ({status}{said}); look at it, then push again"
    if status == 429:
        return f"too many requests to {endpoint} (429{said}); wait some minutes, then push again: {AGAIN}"
    if status >= 500:
        return f"{endpoint} has a fault of its own ({status}{said}); try again later: {AGAIN}"
    return f"{endpoint} refuses the push to {repo} ({status}{said})"


def _line(text: str) -> str:
    """Return the first line that says something, short enough to read."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
