"""Requests to servers of vLLM, and the check of a run's servers before anything is loaded. Imports no torch."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from sheeprlhf.config.path_checks import model_folder
from sheeprlhf.security.redaction import plain_text
from sheeprlhf.structure.rollout import VLLMRolloutConfig
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError, RolloutServerError
from sheeprlhf.utils.http import SHOWN, client, describe, is_transient, parse_answer, request
from sheeprlhf.utils.output import read_small
from sheeprlhf.utils.processes import run_coroutine

SECONDS_OF_CHECK = 10.0  # of a request
_SECONDS_OF_CHECKS = 30.0  # of all requests to a server before a run
_MAX_CONFIG_BYTES = 1 << 20
_SIZES = ("model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer")  # of a config.json
START = "start it with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out (docs/rollout_servers.md)"


class UnavailableError(Exception):
    """A request that may succeed later; the message is the reason."""


def check_servers(cfg: TrainConfig) -> None:
    """Check before a model is loaded that every server has the routes, the policy's model and its length.

    Sends no text.

    Raises:
        ConfigError: one has not.
    """
    rollout = cfg.rollout
    assert isinstance(rollout, VLLMRolloutConfig)
    routes = ["/inference/v1/generate", *(["/v1/load_lora_adapter"] if cfg.model.finetune_mode == "LORA" else [])]
    longest = cfg.data.max_prompt_length + cfg.generation.max_new_tokens
    policy = _read_config(str(model_folder(str(cfg.model.repo_name))))

    async def problem(url: str) -> str | None:
        try:
            async with client(url, SECONDS_OF_CHECK) as server, asyncio.timeout(_SECONDS_OF_CHECKS):
                info = await call(server, "GET", f"{url}/weight_info", seconds=SECONDS_OF_CHECK)
                answers = [(await request(server, "POST", f"{url}{route}", {}))[0] for route in routes]
                config, positions = await served_model(server, url, SECONDS_OF_CHECK)
        except TimeoutError:
            return f"{url}: no answer within {_SECONDS_OF_CHECKS:g} s: {START}"
        except (UnavailableError, RolloutServerError, httpx.HTTPError, httpx.InvalidURL) as error:
            return f"{url}: {error}: {START}"
        missing = [route for route, status in zip(routes, answers, strict=True) if status in (403, 404)]
        if "weight_version" not in info or missing:
            return f"{url} lacks the route {', '.join(missing) or '/weight_info'}: {START}"
        other = [name for name in _SIZES if name in config and name in policy and config[name] != policy[name]]
        if other:
            has = plain_text(f"{other[0]}={config[other[0]]}")[:SHOWN]
            return f"{url} has another model ({has}, not {policy[other[0]]}): start it with the policy's --model"
        if positions is not None and positions < longest:
            return f"{url} takes {positions} tokens: start it with --max-model-len {longest} or more"
        return None

    async def problems() -> list[str | None]:
        return await asyncio.gather(*(problem(url.rstrip("/")) for url in rollout.urls))

    found = [f"rollout.urls: {text}" for text in run_coroutine(problems()) if text]
    if found:
        raise ConfigError(*found)


async def served_model(server: httpx.AsyncClient, url: str, seconds: float) -> tuple[dict[str, Any], int | None]:
    """Return config.json of a server's model, empty if it cannot be read here, and the most tokens that it takes.

    Raises:
        UnavailableError: as `call`, like RolloutServerError.
    """
    models = (await call(server, "GET", f"{url}/v1/models", seconds=seconds)).get("data")
    model = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
    length = model.get("max_model_len")
    return _read_config(str(model.get("root", ""))), length if isinstance(length, int) else None


def _read_config(folder: str) -> dict[str, Any]:
    """Return config.json of a folder with its part of the text model; empty if there is none."""
    try:
        config = json.loads(read_small(Path(folder, "config.json"), _MAX_CONFIG_BYTES))
        return {**config, **config.get("text_config", {})}
    except (OSError, TypeError, AttributeError, ValueError):
        return {}


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
