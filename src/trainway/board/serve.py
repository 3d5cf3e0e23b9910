"""`trainway board`: the server from its start to Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from trainway.board.server import BoardServer
from trainway.board.watch import Board


def serve_board(
    directory: str | Path,
    *,
    host: str,
    port: int,
    open_browser: bool = False,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
) -> None:
    """Serve the page over the runs below `directory` until SIGINT or SIGTERM. Nothing is written.

    Args:
        host: address to listen on.
        port: 0 lets the system choose one.
        say: takes the page's address; warn: what the user should know.

    Raises:
        ConfigError: there is no such directory.
        EnvironmentFault: the port is in use, or the host is not this machine's.
    """
    board = Board(Path(directory))
    with BoardServer(board, host, port) as server, _until_signalled(server):
        if not server.is_local:
            warn(
                f"warning: whoever reaches {host} sees configurations, logs and samples of these runs: the board asks "
                "for no password; `ssh -L` or `trainway tunnel` shows it to you alone"
            )
        say(f"{server.url} shows the runs in {board.place.root}; Ctrl-C ends it")
        if open_browser:
            import webbrowser

            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        server.serve_forever(poll_interval=0.5)


@contextmanager
def _until_signalled(server: BoardServer) -> Iterator[None]:
    """SIGINT and SIGTERM end the server, as the end of its work and not as an error."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return

    def end(number: int, frame: FrameType | None) -> None:
        # from another thread: it waits for the one that serves, which is this one
        threading.Thread(target=server.shutdown, daemon=True).start()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
