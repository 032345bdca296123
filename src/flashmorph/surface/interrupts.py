"""Ctrl-C and SIGTERM, and time limits for what strangers wrote. Imports next to nothing, since it is loaded first.

Files are written atomically, so a process may end at any moment; what remains is to report it, and not to hang.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from flashmorph.errors import UserError

SENTENCE = "interrupted; the same command again goes on from here"
ANEW = "interrupted; the same command again begins anew"
_KEEP_NOTHING = ("transplant", "estimate", "evaluate", "bench", "generate", "export", "report", "hosts", "env")
"""Commands that leave nothing behind before they are done."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOP = 0
_PATIENCE_SECONDS = 10.0
"""Seconds for a command to exit by itself, which removes temporary files."""
_TEMPLATE_SECONDS = 20
"""Of computing: a chat template is a program."""


class Interrupted(SystemExit):
    """Raised by a signal; the program exits with 128 plus the signal's number."""


class _TooLong(BaseException):
    """No `Exception`: it must pass through code that goes on after those."""


class _Listener:
    """Hears signals at once, also while the program is inside of a long call of a library.

    Python runs handlers between two of its own instructions only. The number of a signal is written into a socket
    without waiting for that, and a thread reads it.
    """

    def __init__(self, together: bool, speaks: bool):
        self.heard = 0
        self._together, self._speaks, self._raised = together, speaks, False
        self._lock = threading.RLock()
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before: dict[int, Any] = {}

    def start(self) -> None:
        """Listen. A signal that is ignored stays so."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._fd_before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def stop(self) -> None:
        """Leave signals to whom they belonged before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._mouth.send(bytes([_STOP]))

    def forget(self) -> None:
        """Be an ordinary process, after a fork: the parent listens."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)

    def hear(self, number: int) -> None:
        """Print it, the first time."""
        with self._lock:
            if not self.heard:
                self.heard = number
                if self._speaks:
                    _say(sentence())

    def _handle(self, number: int, frame: Any) -> None:
        self.hear(number)
        # Under torchrun each rank may be inside of a collective: a thread ends it.
        if not self._raised and not self._together:
            self._raised = True
            raise Interrupted(128 + number)

    def _listen(self) -> None:
        number = self._next(None)
        if not number:
            return
        self.hear(number)
        if self._together or self._next(time.monotonic() + _PATIENCE_SECONDS) != _STOP:
            leave(128 + self.heard)

    def _next(self, deadline: float | None) -> int | None:
        """The next number that means something here; None where there is none in time."""
        while True:
            self._ear.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                number = self._ear.recv(1)[0]
            except TimeoutError:
                return None
            if number in (_STOP, *_SIGNALS):
                return number


_listener: _Listener | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Within this, Ctrl-C and SIGTERM print `sentence()` and raise `Interrupted`; a second one exits at once.

    So does the first one under torchrun with several ranks, of which rank 0 prints. Whatever the interruption
    leads to (a library may turn it into another error, or go on), it ends as `Interrupted`, at the latest after some
    seconds. Inside of itself, and in another thread than the main one, it changes nothing.
    """
    global _listener
    if _listener or threading.current_thread() is not threading.main_thread():
        yield
        return
    together = os.environ.get("WORLD_SIZE", "1") != "1"
    listener = _Listener(together, speaks=os.environ.get("RANK", "0") == "0")
    _listener = listener
    try:
        listener.start()
        yield
    finally:
        listener.stop()
        _listener = None
        if listener.heard:
            raise Interrupted(128 + listener.heard) from None


def _forget() -> None:
    global _listener
    if _listener:
        _listener.forget()
        _listener = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def leave(code: Any) -> NoReturn:
    """End this process at once, whatever threads it has."""
    if sys.__stdout__ and sys.__stdout__.isatty():
        os.write(1, b"\x1b[?25h")  # A progress bar hides the cursor.
    os._exit(code)


def sentence() -> str:
    """The message of a command that is interrupted."""
    return ANEW if sys.argv[1:2] and sys.argv[1] in _KEEP_NOTHING else SENTENCE


def _say(sentence: str) -> None:
    """A line on stderr, also from the middle of a print."""
    try:
        fd = sys.stderr.fileno()
        os.write(fd, f"{os.linesep if os.isatty(fd) else ''}{sentence}{os.linesep}".encode())
    except (OSError, ValueError, AttributeError):  # Closed, or a test's.
        print(sentence, file=sys.stderr)


@contextmanager
def time_limit(seconds: float, sentence: str) -> Iterator[None]:
    """Give what a stranger wrote, such as a template, so many seconds of computing.

    It reaches what runs in Python, in the main thread, and not on Windows: elsewhere there is no limit.

    Raises:
        UserError: `sentence`, when they are over.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except _TooLong:
        raise UserError(sentence) from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


template_limit = time_limit(
    _TEMPLATE_SECONDS,
    f"the teacher's chat template takes more than {_TEMPLATE_SECONDS} seconds for one conversation: does it come to an "
    "end? Mend it, or go without conversations",
)
"""For functions that put one conversation into words."""
