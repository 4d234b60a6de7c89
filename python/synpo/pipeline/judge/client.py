"""The HTTP client under the openai package, and what its errors mean in words.

The openai package tries again whatever it knows to be an error of the way (up to 6 times), and says "Connection error." of all
of them. Two are no better for a second try: a certificate that nobody vouches for, and an answer that is late, on which the
server may still be at work (llama-cpp-python finishes every question it was asked, one after the other).
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import openai

UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"


class Client(openai.DefaultHttpxClient):
    """Raises, instead of an error that would be tried again, one that is not."""

    def send(self, request: Any, **options: Any) -> Any:
        try:
            return super().send(request, **options)
        except httpx2.ReadTimeout:
            raise openai.APITimeoutError(request) from None
        except httpx2.ConnectError as error:
            if UNTRUSTED in str(error):
                raise openai.APIConnectionError(message=str(error), request=request) from None
            raise


def is_address(endpoint: str) -> bool:
    """Whether requests can be sent there: http or https, the name of a host, a port that there can be."""
    try:
        httpx2.URL(endpoint)
        url = urlsplit(endpoint)
        return (
            url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and not re.search(r"\s", endpoint)
        )
    except (httpx2.InvalidURL, ValueError):
        return False


def open_client(key: str, endpoint: str | None, retries: int, timeout: float) -> openai.OpenAI:
    """Raises ValueError where the environment names certificates or a proxy that cannot be used."""
    try:
        http = Client()
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"no connection can be opened: {error} (SSL_CERT_FILE and SSL_CERT_DIR name certificates; HTTP_PROXY, HTTPS_PROXY "
            "and ALL_PROXY a proxy; one with socks:// needs the package socksio)"
        ) from error
    return openai.OpenAI(api_key=key, base_url=endpoint, max_retries=retries, timeout=timeout, http_client=http)


def without_secrets(endpoint: str) -> str:
    return re.sub("//[^/]*@", "//", endpoint.partition("?")[0])


def shown(endpoint: str | None) -> str:
    """An address for messages: no secret in it, and with the proxy that stands before it, if any."""
    if endpoint is None:
        return "the endpoint"
    url = urlsplit(endpoint)
    address = without_secrets(endpoint)
    proxies = getproxies()
    if (url.scheme in proxies or "all" in proxies) and not proxy_bypass(url.hostname or ""):
        name = url.scheme if url.scheme in proxies else "all"
        return f"{address} (through the proxy in {name.upper()}_PROXY; NO_PROXY={url.hostname} goes past it)"
    return address


def reason(error: openai.APIError) -> str:
    """What an error says: the message of the endpoint, the text of a page that a proxy sent, or why no connection came about."""
    said = str(error)
    if isinstance(error, openai.APIStatusError) and not isinstance(error.body, dict):
        page = re.sub(
            r"<(head|style|script)\b.*?</\1>|<[^>]*>", " ", error.response.text, flags=re.DOTALL | re.IGNORECASE
        )
        return f"{said} {page}" if page.strip() else said
    if UNTRUSTED in said:
        return f"{said}: the certificate is not known here; name the file of its authority in SSL_CERT_FILE"
    return f"{said} {error.__cause__}" if error.__cause__ else said
