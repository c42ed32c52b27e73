"""`demo`: runs side by side in the browser, only on this machine unless a password protects the page."""

import asyncio
import getpass
import importlib.util
import ipaddress
import os
import re
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from itertools import pairwise
from typing import Any

from sheeprlhf.apps.arguments import Flag, read_flags
from sheeprlhf.apps.chat import TEMPLATE, TEMPLATE_ARGS, WEIGHTS, number_problems
from sheeprlhf.apps.terminal import Screen, clean, flag_entries, print_help
from sheeprlhf.config.model_lookup import REWARD_MODEL, Trained, find_trained
from sheeprlhf.security.version_guard import check_versions
from sheeprlhf.structure.run import TrainConfig
from sheeprlhf.utils.errors import ConfigError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 1_000_000  # bytes of a request
BODY_SECONDS = 20.0  # in which they have to arrive
_SINGLE_HEADERS = ("host", "origin", "content-length", "transfer-encoding")
_PROXY_HEADERS = (b"x-forwarded-", b"forwarded", b"x-gradio-")  # with which a request could change the page's addresses
_PATHS = {
    "GET": re.compile(
        r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(?:static|assets|svelte)/[\w./-]+|/login_check/?|/logout"
        r"|/gradio_api/(?:queue/data|startup-events|heartbeat/\w+|login_check/?|app_id/?)"
    ),
    "POST": re.compile(r"/login/?|/gradio_api/(?:queue/join/?|cancel|reset/?)"),
}
_HEADERS = {
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI layer: a list of paths, this machine's own names, no other site's pages, headers that keep a page in.

    No uploads, no files, no proxy, no documentation of an API; and no request of the page goes to another machine.
    `hosts` are the names that the page may be reached by; any, if there are none.
    """

    def __init__(self, app: Application, hosts: tuple[str, ...] = ()) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        status = self._refusal(scope)
        if status:
            await _refuse(send, status)
            return
        body = await _read_body(receive) if scope["method"] == "POST" else b""
        if isinstance(body, int):
            await _refuse(send, body)
            return
        kept = [(name, value) for name, value in scope["headers"] if not name.startswith(_PROXY_HEADERS)]
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        started = False

        async def receive_on() -> Any:
            return next(messages, None) or await receive()

        async def send_on(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            await self._app({**scope, "headers": kept}, receive_on, send_on)
        except Exception:  # a request that the page does not make
            if started:
                raise
            await _refuse(send, 400)

    def _refusal(self, scope: Scope) -> int:
        """The status of a request that must not get through; 0 for others."""
        method, path = scope["method"], scope["path"]
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        names = [name.decode("latin-1") for name, _ in scope["headers"]]
        allowed = _PATHS.get("GET" if method == "HEAD" else method)
        if allowed is None or not allowed.fullmatch(path) or ".." in path or "//" in path:
            return 404
        if any(names.count(name) > 1 for name in _SINGLE_HEADERS) or "transfer-encoding" in headers:
            return 400  # two readers of the request could disagree on its length, or on who asks
        host = headers.get("host", "")
        if self._hosts and re.sub(r":\d{1,5}$", "", host).strip("[]") not in self._hosts:
            return 403  # a name that somebody else's DNS points here
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403  # another site's page
        length = headers.get("content-length", "" if method == "POST" else "0")
        if not length.isdecimal() or int(length[:10]) > (MAX_BODY if method == "POST" else 0):
            return 413
        return 0


async def _read_body(receive: Receive) -> bytes | int:
    """Read a whole body; the status to refuse it with if it is larger than `MAX_BODY` or comes too slowly."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return 400
                body += message.get("body", b"")
                if len(body) > MAX_BODY:
                    return 413
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        return 408


async def _refuse(send: Send, status: int) -> None:
    """Answer without the framework, and end the connection: what follows on it is not read."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"not here"})


AUTH = "SHEEPRLHF_DEMO_AUTH"
FLAGS = (
    WEIGHTS,
    TEMPLATE,
    TEMPLATE_ARGS,
    Flag("reward", "A run of task=rm, or a reward model's folder: its score is shown next to answers.", value="run"),
    Flag("port", "Where the page is served.", default=7860, kind=int, minimum=1, maximum=65535),
    Flag("host", "Address to serve it on; one that others can reach needs --auth.", default="127.0.0.1"),
    Flag("auth", f"Ask visitors for a password: user:password is taken from ${AUTH}, or asked for here.", kind=bool),
)
_MAX_MODELS = 6  # models on one page
_MIN_PASSWORD = 8  # characters


def run(arguments: list[str]) -> int:
    """Load the models and serve the page until Ctrl-C. Raises ConfigError with all problems."""
    given = read_flags("demo", FLAGS, _without_secret(arguments))
    if given is None:
        meaning = (
            "A page with two tabs, summarise and question answering: one prompt, the answers of all models side by "
            "side. Without --auth a third tab has the report of the runs. The page is served to this machine only, "
            "connects to no other machine, and ends with Ctrl-C."
        )
        usage = "demo <run or model> [<run or model> ...] [--flag value ...]"
        return print_help(usage, [meaning], "Flags", flag_entries(FLAGS))
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError('`demo` needs a package that is not installed (gradio): pip install "sheeprlhf[demo]"')
    check_versions("gradio")
    values = given.values
    problems = list(_address_problems(values["host"], values["port"], protected=values["auth"]))
    problems += number_problems("demo <run> <run>", given.words, _MAX_MODELS)
    found: list[Trained] = []
    for word in given.words[:_MAX_MODELS]:
        template = {"chat_template": values[TEMPLATE.name], "template_args": values[TEMPLATE_ARGS.name]}
        problems += _find(found, word, values["weights"], **template)
    reward: list[Trained] = []
    if values["reward"] is not None:
        problems += [f"--reward: {text}" for text in _find(reward, values["reward"], None, REWARD_MODEL)]
    if problems:
        raise ConfigError(*problems)
    auth = _credentials() if values["auth"] else None
    _serve(found, reward[0] if reward else None, values["host"], values["port"], auth)
    return 0


def _find(
    found: list[Trained], word: str, weights: str | None, wanted: str = "policy", **template: str | None
) -> tuple[str, ...]:
    """Add what a word names, or tell what is wrong with it."""
    try:
        found.append(find_trained(word, weights, wanted=wanted, **template))
    except ConfigError as error:
        return error.problems
    return ()


def _without_secret(arguments: list[str]) -> list[str]:
    """The arguments. Raises ConfigError, which does not show it, if a password follows --auth."""
    for word, following in pairwise([*arguments, ""]):
        if word.startswith("--auth=") or (word == "--auth" and ":" in following):
            advice = f"remove it and set {AUTH}, or write --auth alone and type it when asked"
            raise ConfigError(f"--auth: a password never goes on the command line, where other users see it; {advice}")
    return arguments


def _address_problems(host: str, port: int, *, protected: bool) -> Iterator[str]:
    """Problems with the address at which the page is to be served."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        yield f"--host {clean(host)} is not an address: give 127.0.0.1, which is this machine only"
        return
    if not address.is_loopback and not protected:
        yield f"--host {host} lets other machines in: add --auth, so that they need a password, or leave --host out"
    try:
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((str(address), port))
    except OSError as error:
        free = _free_port(port)
        yield f"--port {port} cannot be used on {host} ({error.strerror}): give another one, as --port {free}"


def _free_port(port: int) -> int:
    """A free port near this one."""
    for other in range(port + 1, min(port + 50, 65536)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", other)):
                return other
    return 0


def _credentials() -> tuple[str, str]:
    """User and password, from the environment or the keyboard. Raises ConfigError if there are none."""
    given = os.environ.pop(AUTH, "")  # no child process needs it
    if not given and sys.stdin.isatty():
        given = f"{input('user: ').strip()}:{getpass.getpass('password: ')}"
    user, colon, password = given.partition(":")
    if not user or not colon or len(password) < _MIN_PASSWORD:
        raise ConfigError(
            f"--auth: set {AUTH} to user:password with {_MIN_PASSWORD} characters of password or more, or type them "
            "when asked"
        )
    return user, password


def _serve(models: list[Trained], reward: Trained | None, host: str, port: int, auth: tuple[str, str] | None) -> None:
    screen = Screen()

    def say(text: str) -> None:
        screen.print(clean(text, 400), style="faint")

    _clean_environment()
    from transformers.utils import logging as transformers_logging

    from sheeprlhf.apps.demo_page import ASK, SUMMARISE, Panel
    from sheeprlhf.task.text_generator import load_reward_scorer, load_text_generator

    transformers_logging.disable_progress_bar()
    words = [trained.word + f" ({trained.weights})" * (trained.weights != "final") for trained in models]
    names = short_names([clean(word, 200) for word in words])
    generators = [(name, load_text_generator(trained, say)) for name, trained in zip(names, models, strict=True)]
    scorer = load_reward_scorer(reward, say) if reward is not None else None
    panels = [Panel(kind, generators, scorer) for kind in (SUMMARISE, ASK)]
    scored = short_names([clean(reward.word, 200)])[0] if reward is not None else None
    runs = [str(trained.run_dir) for trained in models if trained.run_dir is not None and auth is None]
    page = open_page(panels, scored, host, port, auth, runs)  # visitors need not see the paths in a report
    audience = "this machine only" if auth is None else "everyone who has the password"
    screen.print(f"serving http://{host}:{port} to {audience}")
    screen.print("Ctrl-C ends it")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        screen.print("\nended")
    finally:
        page.close(verbose=False)


def short_names(paths: list[str]) -> list[str]:
    """As many of the last parts of each path as tell them apart; of runs without a name also their task and time."""
    parts = [path.rstrip("/").split("/") for path in paths]
    fewest = 3 if any(part[-1].startswith(TrainConfig.run_name) for part in parts) else 1
    for count in range(fewest, max(fewest, *map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(paths)):
            break
    return [name if names.count(name) == 1 else f"{name} #{index + 1}" for index, name in enumerate(names)]


def _clean_environment() -> None:
    """The web framework takes settings of sharing and of files to serve from the environment too: none apply."""
    for name in list(os.environ):
        if name.startswith("GRADIO_"):
            del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def open_page(
    panels: list[Any], scored: str | None, host: str, port: int, auth: tuple[str, str] | None, runs: Sequence[str] = ()
) -> Any:
    """Serve the page from threads of its own; return its closer. Raises ConfigError if the port was taken."""
    from starlette.middleware import Middleware

    from sheeprlhf.apps.demo_page import CSS, THEME, build_page

    page = build_page(panels, scored=scored, runs=runs)
    hosts = ("127.0.0.1", "localhost", "::1", host) if auth is None else ()
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            auth=auth,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            max_file_size=1,
            state_session_capacity=100,
            app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)], "docs_url": None, "redoc_url": None},
            theme=THEME,
            css=CSS,
        )
    except OSError as error:
        raise ConfigError(f"--port {port}: {clean(error, 200)}: give another one") from error
    return page
