"""The Hugging Face Hub through its own client: errors in one line, calls that are tried again.

The token is the client's own business (``HF_TOKEN``, ``hf auth login``). It is never read here but
to take it out of messages, which quote servers.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from mergebench.core.errors import MergebenchError

T = TypeVar("T")
#: How often a call is made at most, and the longest wait that a server may ask for, in seconds.
TRIES, LONGEST = 5, 120.0
_AGAIN = (408, 429, 500, 502, 503, 504)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_LATER = "try again later: what is there is not transferred twice"


def client() -> Any:
    """The client, which speaks only of what it could not do."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from mergebench.core.version import own_version

    # What it warns of while it tries again is no error, and errors are one line.
    if not any(name in os.environ for name in ("HF_HUB_VERBOSITY", "HF_DEBUG")):
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # Its bars are for terminals; some of them it draws into files too.
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ and not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="mergebench", library_version=own_version())


def endpoint() -> str:
    """Where the Hub is, without a slash at the end."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids to ask."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def has_token() -> bool:
    """Whether the client would send a token."""
    return bool(_token())


def _token() -> str | None:
    from huggingface_hub import get_token

    # Some ways to get one ask a server, whose refusal shows in the call itself.
    with suppress(Exception):
        return get_token()
    return None


def without_token(text: str) -> str:
    """A text without the token, should a server or a library have quoted it."""
    token = _token()
    return text.replace(token, "<token>") if token else text


@contextmanager
def explained(what: str, *, repo: str = "", write: bool = False) -> Iterator[None]:
    """Turn what the client raises into a :class:`MergebenchError`.

    Parameters
    ----------
    what : str
        The reference, which stands first in the message.
    repo : str
        The repository, where it is another text.
    write : bool
        Whether something was to be changed there.
    """
    network = _answers()
    try:
        yield
    except MergebenchError:
        raise
    except LookupError as error:
        raise MergebenchError(
            f"{what}: {endpoint()} does not answer as the Hub does",
            got=f"no {_said(error)}",
            fix="check HF_ENDPOINT, or update huggingface_hub",
        ) from None
    except (network, OSError, ValueError, RuntimeError) as error:
        raise _error(_root(error), what, repo or what, write=write) from None


def _answers() -> type[Exception]:
    """What the client's HTTP library raises: it has another name in each generation of it."""
    from huggingface_hub.errors import HfHubHTTPError

    found: type[Exception] = HfHubHTTPError.__bases__[0]
    return found


def _root(error: BaseException) -> BaseException:
    """The first error of the client in a chain: uploads wrap theirs."""
    from huggingface_hub.errors import HfHubHTTPError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return seen
        seen = seen.__cause__
    return error


def _error(error: BaseException, what: str, repo: str, *, write: bool) -> MergebenchError:
    from huggingface_hub import errors

    status = status_of(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MergebenchError(
            f"{what}: the Hub is not asked, because HF_HUB_OFFLINE is set",
            fix="unset it, or give a path",
        )
    if isinstance(error, errors.GatedRepoError):
        return MergebenchError(
            f"{what}: access to this repository is granted on request, and this account has none",
            fix=f"ask for it at {endpoint()}/{repo}, and {_LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MergebenchError(
            f"{what}: the repository has no such revision",
            fix=f"{endpoint()}/{repo} lists branches, tags and commits",
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return MergebenchError(
            f"{what}: the repository has no such file", fix=f"{endpoint()}/{repo} lists its files"
        )
    if status == 401 and "Invalid credentials" in str(error):
        return MergebenchError(f"{what}: the Hub does not know this token", fix=_LOGIN)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return _unseen(what, repo, write=write)
    if status == 403:
        right = "writing" if write else "reading"
        return MergebenchError(
            f"{what}: the Hub forbids {right} to this account or token",
            got=_said(error),
            fix=f"check the rights of the token at {endpoint()}/settings/tokens",
        )
    if status == 429:
        return MergebenchError(f"{what}: the Hub has had too many requests", fix=_LATER)
    if status is not None and status >= 500:
        return MergebenchError(f"{what}: the Hub has a fault", got=f"status {status}", fix=_LATER)
    if status is not None:
        return MergebenchError(
            f"{what}: the Hub refuses this", got=_said(error) or f"status {status}"
        )
    if isinstance(error, errors.HFValidationError):
        return MergebenchError(
            f"{what}: is no name of a repository",
            expected="org/name of letters, digits, -, _ and .",
            got=repr(repo),
        )
    if _is_network(error):
        return MergebenchError(
            f"{what}: the Hub at {endpoint()} cannot be reached",
            got=_said(error),
            fix="check the network, HTTPS_PROXY and HF_ENDPOINT, and try again",
        )
    return MergebenchError(f"{what}: the transfer failed", got=_said(error), fix=_LATER)


def _unseen(what: str, repo: str, *, write: bool) -> MergebenchError:
    known = has_token()
    hidden = "or this account may not see it" if known else "or it is private"
    fix = f"check {repo!r}" if known else f"check {repo!r}, or {_LOGIN}"
    if write and not known:
        return MergebenchError(f"{what}: pushing needs a token, and there is none", fix=_LOGIN)
    return MergebenchError(f"{what}: there is no such repository, {hidden}", fix=fix)


def _said(error: BaseException) -> str:
    """What a server or a library says, on one line and without the token."""
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return without_token(" ".join(str(said).split()))[:300]


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error stands for, if there was one."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", None)
    return status if isinstance(status, int) else None


def _is_network(error: BaseException) -> bool:
    """Whether no answer came."""
    known = (_answers(), ConnectionError, TimeoutError)
    return isinstance(error, known) and status_of(error) is None


def patiently(call: Callable[[], T]) -> T:
    """Call until there is an answer that is not "later", five times at most.

    The client itself tries transfers and listings again, but neither questions nor commits.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    network = _answers()
    pause = 1.0
    for left in reversed(range(TRIES)):
        try:
            return call()
        except OfflineModeIsEnabled:
            raise
        except network as error:
            status = status_of(error)
            wait = _asked(error, pause)
            if not left or (status is not None and status not in _AGAIN) or wait > LONGEST:
                raise
            time.sleep(wait)
            pause *= 2
    raise AssertionError


def _asked(error: BaseException, otherwise: float) -> float:
    """Seconds that the server asks to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else otherwise


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    status = status_of(_root(error))
    return status in _AGAIN if status is not None else _is_network(error)
