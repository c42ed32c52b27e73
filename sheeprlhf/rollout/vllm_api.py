"""Requests to servers of vLLM, and the check of a run's servers before anything is loaded. Imports no torch."""

import asyncio
from typing import Any

import httpx

from sheeprlhf.security.redaction import plain_text
from sheeprlhf.structure.rollout import VLLMRolloutConfig
from sheeprlhf.utils.errors import ConfigError, RolloutServerError
from sheeprlhf.utils.http import SHOWN, client, describe, is_transient, parse_answer, request

SECONDS_OF_CHECK = 10.0
START = "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out (docs/rollout_servers.md)"


class UnavailableError(Exception):
    """A request that may succeed later; the message is the reason."""


def check_servers(cfg: VLLMRolloutConfig) -> None:
    """Check before a model is loaded that every server answers in development mode. Sends no text.

    Raises:
        ConfigError: one does not.
    """

    async def problem(url: str) -> str | None:
        try:
            async with client(url, SECONDS_OF_CHECK) as server, asyncio.timeout(SECONDS_OF_CHECK):
                info = await call(server, "GET", f"{url}/weight_info", seconds=SECONDS_OF_CHECK)
                status, _, _ = await request(server, "POST", f"{url}/inference/v1/generate", {})
        except TimeoutError:
            return f"{url}: no answer within {SECONDS_OF_CHECK:g} s: {START}"
        except (UnavailableError, RolloutServerError, httpx.HTTPError, httpx.InvalidURL) as error:
            return f"{url}: {error}: {START}"
        return None if "weight_version" in info and status not in (403, 404) else f"{url} lacks routes: {START}"

    async def problems() -> list[str | None]:
        return await asyncio.gather(*(problem(url.rstrip("/")) for url in cfg.urls))

    found = [f"rollout.urls: {text}" for text in asyncio.run(problems()) if text]
    if found:
        raise ConfigError(*found)


async def call(
    server: httpx.AsyncClient,
    method: str,
    url: str,
    body: dict[str, Any] | None = None,
    *,
    seconds: float,
    limit: int = 1 << 20,
    lost: bool = False,
) -> dict[str, Any]:
    """Send a request; return the answer's mapping, empty if it is none.

    With `lost`, status 404 is of a server that has lost its adapter in a restart.

    Raises:
        UnavailableError: no answer, or one that asks to try again.
        RolloutServerError: the server rejects the request.
    """
    try:
        async with asyncio.timeout(seconds):
            status, _, content = await request(server, method, url, body, limit=limit)
    except TimeoutError:
        raise UnavailableError(f"no answer within {seconds:g} s") from None
    except httpx.HTTPError as error:
        raise UnavailableError(describe(error)) from None
    if status != 200:
        text = " ".join(plain_text(content[: 4 * SHOWN].decode(errors="replace")).split())[:SHOWN]
        if is_transient(status) or (lost and status == 404):
            raise UnavailableError(f"it answered {status}: {text}")
        raise RolloutServerError(f"the server answered {status} to {url}: {text or 'nothing'}; {START}")
    answer = parse_answer(content)
    return answer if isinstance(answer, dict) else {}
