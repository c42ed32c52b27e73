"""Child processes and threads that end with this one; signals; streams that outlive their terminal or a full disk."""

import ctypes
import errno
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import sheeprlhf
from sheeprlhf.utils.errors import ConfigError
from sheeprlhf.utils.launchers import OUTPUT_FILE, child_environment

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext

Result = TypeVar("Result")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGUSR2)
SAVE_SIGNAL = signal.SIGUSR1  # save now and continue
_SECONDS_TO_PASS_ON = 1.0
_SECONDS_TO_END = 10.0
_SECONDS_TO_COME_AGAIN = 0.02  # after what was called is left


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process with its parent (Linux), which may have died since; call it early."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os.kill(os.getpid(), signal.SIGKILL)


def seconds_since_start() -> float:
    """Age of this process (Linux; elsewhere the CPU time that it has used)."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Run a function in a thread that does not keep the process alive; the threads of an executor would."""
    future = Future[Result]()
    future.set_running_or_notify_cancel()  # nobody who waits can cancel it

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def run_coroutine(coroutine: Coroutine[Any, Any, Result], run: Callable[..., Result] | None = None) -> Result:
    """Run a coroutine by `run`, by default `asyncio.run`; in a thread if an event loop runs here, as in a notebook."""
    import asyncio  # slow, and most commands need none

    run = run or asyncio.run
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run(coroutine)
    return in_thread(lambda: run(coroutine)).result()


class BoundToThis:
    """Object that calls `die_with_parent` in the spawned process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Make unpickling call `die_with_parent`, whose result is None."""
        return die_with_parent, (os.getpid(),)


def spawn_context(option: str) -> "SpawnContext":
    """Return the context that starts new Python processes, for which `option` asks.

    Raises ConfigError if the running script has no guard: the processes would run it again, and wait for each other.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "")
    if script.is_file() and b"__main__" not in script.read_bytes():
        raise ConfigError(
            f'{option} starts processes that read {script} again: put what it does below `if __name__ == "__main__":`'
        )
    from multiprocessing import get_context

    return get_context("spawn")


def start_bound(_: BoundToThis | None, start: Callable[..., None], *args: Any) -> None:
    """Initializer of a pool whose processes end with this one, even while they import modules for `start`."""
    start(*args)


class Terminated(SystemExit):
    """A signal other than Ctrl-C asks the command to end; its code is that of a shell."""

    def __init__(self, signum: int) -> None:
        """The exit code is 128 + signum."""
        super().__init__(128 + signum)
        self.signum = signum


class Interrupts:
    """Handler of the stop signals: raises KeyboardInterrupt for Ctrl-C and `Terminated` for the others."""

    def __init__(self, *, owns_process: bool = True) -> None:
        """`owns_process`: see `reliable_sigint`."""
        self.owns_process = owns_process
        self.leaving = False  # the command has ended: Ctrl-C ends the process, as exceptions would disturb its shutdown
        self.waits = self.terminated = False  # deferred, see `interrupts_wait`; `Terminated` was raised
        self.came = self.noted = 0  # the deferred signal; the stop signal that a run received
        self.last, self.last_time = 0, -math.inf  # the newest signal that raised an exception

    def __call__(self, signum: int, frame: FrameType | None = None) -> None:
        """Called by Python between two instructions of the main thread."""
        if self.leaving:
            os._exit(128 + signum)
        if self.terminated and signum != signal.SIGINT:
            return  # launchers and terminals send several; the first one has to be able to clean up
        if self.waits:
            self.came = self.came or signum
            return
        self.last, self.last_time = signum, time.monotonic()
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.terminated = True
        raise Terminated(signum)


def _interrupts() -> Interrupts | None:
    """The handler that `reliable_sigint` has installed, if one is there."""
    handlers = (signal.getsignal(signum) for signum in STOP_SIGNALS)
    return next((handler for handler in handlers if isinstance(handler, Interrupts)), None)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Defer stop signals until the block ends: the block is short, and a library would break if it were interrupted."""
    handler = _interrupts()
    if handler is None:
        yield
        return
    handler.waits = True
    try:
        yield
    finally:
        handler.waits = False
        came, handler.came = handler.came, 0
        if came:
            handler(came)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: at shutdown Python restores the default handlers, and the kernel would kill the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def just_interrupted() -> int:
    """The signal that came a moment ago: some libraries turn its exception into an error of their own."""
    handler = _interrupts()
    is_new = handler is not None and time.monotonic() - handler.last_time < _SECONDS_TO_PASS_ON
    return handler.last if handler is not None and is_new else 0


def handles_interrupts() -> bool:
    """True in a process of the command line."""
    handler = _interrupts()
    return handler is not None and handler.owns_process


def note_stop(signum: int) -> None:
    """Record that a stop signal ended a run, for `noted_stop`; further signals are ignored."""
    handler = _interrupts()
    if handler is not None:
        handler.noted, handler.terminated = signum, True


def noted_stop() -> int:
    """The signal of `note_stop`; 0 if there was none."""
    handler = _interrupts()
    return 0 if handler is None else handler.noted


@contextmanager
def reliable_sigint(*, owns_process: bool = True) -> Iterator[Interrupts]:
    """Install handlers of the stop signals that survive `__del__` and weakref callbacks; ignored signals stay ignored.

    The handlers raise an exception. Python prints and drops an exception that is raised while it calls a `__del__` or a
    weakref callback; it is raised again then. A main thread that a signal other than Ctrl-C does not end, because it
    waits in a library for another process, is ended after some seconds. Only the main thread is changed: Python allows
    no handlers elsewhere. Without `owns_process`, as in a notebook, only Ctrl-C is handled; nothing ends the process.
    """
    interrupts = Interrupts(owns_process=owns_process)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    default = [signum for signum in STOP_SIGNALS if owns_process and signal.getsignal(signum) is signal.SIG_DFL]
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    hook, main = sys.unraisablehook, threading.get_ident()
    left = threading.Event()

    def raise_again(of: "sys.UnraisableHookArgs") -> None:
        if isinstance(of.exc_value, KeyboardInterrupt | Terminated):
            interrupts.terminated = False
            signum = of.exc_value.signum if isinstance(of.exc_value, Terminated) else signal.SIGINT
            threading.Thread(target=come_again, args=(signum,), daemon=True).start()
        else:
            hook(of)

    def come_again(signum: int) -> None:
        if not left.wait(_SECONDS_TO_COME_AGAIN):
            signal.pthread_kill(main, signum)

    def end_in_time(signum: int) -> None:
        def end() -> None:
            if not left.wait(_SECONDS_TO_END):
                os._exit(128 + signum)

        if signum in default:
            threading.Thread(target=end, daemon=True).start()

    with watched_signals(end_in_time), handled(default, interrupts):
        if mine:
            signal.signal(signal.SIGINT, interrupts)
        sys.unraisablehook = raise_again
        try:
            yield interrupts
        finally:
            sys.unraisablehook = hook
            left.set()
            if mine and not interrupts.leaving:
                signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def handled(signums: Iterable[int], handler: Callable[..., None] | signal.Handlers) -> Iterator[None]:
    """Install a handler of some signals for a block, in the main thread; an ignored SIGHUP stays (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in signums}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:
        del before[signal.SIGHUP]
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, signal.SIG_DFL if old is None else old)


@contextmanager
def watched_signals(watch: Callable[[int], None]) -> Iterator[None]:
    """Call `watch` in a thread with each handled signal, also where no handler runs: in kernels, collectives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def read() -> None:
        while number := os.read(read_end, 1):
            watch(number[0])
        os.close(read_end)

    old_descriptor = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=read, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_descriptor)
        os.close(write_end)  # ends the thread


def ignored(signum: int) -> AbstractContextManager[None]:
    """Ignore a signal for a block, also in processes that are started there."""
    return handled([signum], signal.SIG_IGN)


_GONE = (errno.EIO, errno.EPIPE)  # a closed terminal; a pipe whose reader has ended


class _LastingFile(io.FileIO):
    """A file that drops what cannot be written."""

    needs_reader = False  # if True, a pipe whose reader has ended raises BrokenPipeError
    error: OSError | None = None  # why something was dropped, if not because the terminal or the reader is gone

    def write(self, data: Any) -> int:
        """The number of bytes of the buffer that were written or dropped."""
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno == errno.EPIPE and self.needs_reader:
                raise
            if error.errno in _GONE:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            else:  # there may be room again later
                self.error = error
            return len(data)


def open_closed_streams(*, needs_output: bool) -> None:
    """Open the null device for closed standard streams; with `needs_output`, writing to stdout then fails."""
    read, write = os.O_RDONLY, os.O_WRONLY
    modes = (("stdin", read, "r"), ("stdout", read if needs_output else write, "w"), ("stderr", write, "w"))
    for descriptor, (name, flags, mode) in enumerate(modes):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, flags)  # the lowest free descriptor, which is the closed one
            keep = null == descriptor
            setattr(sys, name, os.fdopen(null, mode, encoding="utf-8", errors="backslashreplace", closefd=not keep))


def lost_output(stream: TextIO) -> OSError | None:
    """The error because of which a stream that `lasting` returned has dropped output; None if it has dropped none."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw.error if isinstance(raw, _LastingFile) else None


def outlives_reader(stream: TextIO) -> bool:
    """True if writing continues without a reader: a BrokenPipeError then has another cause."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return isinstance(raw, _LastingFile) and not raw.needs_reader


def lasting(stream: TextIO, *, needs_reader: bool = False) -> TextIO:
    """The stream of the same file, which survives its terminal, its disk and, unless `needs_reader`, its reader."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _LastingFile(stream.fileno(), "w", closefd=False)
    raw.needs_reader = needs_reader
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


_FORWARDED_SIGNALS = (*STOP_SIGNALS, SAVE_SIGNAL)
_SECONDS_BETWEEN_CALLS = 5.0  # of what is called while a command runs


class Children:
    """Starts commands one after the other; `stopped_by` is the first signal to stop that has come."""

    def __init__(self) -> None:
        """No command runs yet."""
        self.stopped_by: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent: list[int] = []  # signals that came while no command ran

    def run(
        self, words: list[str], output: Path | None = None, while_it_runs: Callable[[], None] = lambda: None
    ) -> int:
        """Run a command to its end, in a session of its own; return its exit code, 128 + n after signal n.

        Every few seconds `while_it_runs` is called, whose errors of the disk do not end the command.
        """
        package = Path(sheeprlhf.__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
        sys.stdout.flush()
        self._unsent.clear()
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED_SIGNALS)  # the command inherits no handler of this process
        try:
            if self.stopped_by is not None:
                return 128 + self.stopped_by
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sheeprlhf", *words],
                stdin=subprocess.DEVNULL,
                env={**child_environment(), "PYTHONPATH": path, OUTPUT_FILE: "" if output is None else str(output)},
                start_new_session=True,
                preexec_fn=_prepare_child,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED_SIGNALS)
        while self._unsent:  # another thread took the signal while the command started
            self._process.send_signal(self._unsent.pop(0))
        code = None
        while code is None:
            try:
                code = self._process.wait(_SECONDS_BETWEEN_CALLS)
            except subprocess.TimeoutExpired:
                with suppress(OSError):
                    while_it_runs()
        self._process = None
        return 128 - code if code < 0 else code

    def forward_signal(self, signum: int, frame: FrameType | None = None) -> None:
        """A signal handler."""
        if signum != SAVE_SIGNAL and self.stopped_by is None:
            self.stopped_by = signum
        if self._process is None:
            self._unsent.append(signum)
        else:
            self._process.send_signal(signum)


def _prepare_child() -> None:
    """In the new process, before the command: where nothing can be saved yet, or ever, SIGUSR1 does nothing."""
    signal.signal(SAVE_SIGNAL, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED_SIGNALS)
    die_with_parent()


@contextmanager
def children() -> Iterator[Children]:
    """Forward signals to stop or to save to the running command, each as often as it arrives, and wait for it."""
    started = Children()
    with watched_signals(lambda _: None), handled(_FORWARDED_SIGNALS, started.forward_signal):
        yield started
