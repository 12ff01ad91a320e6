"""Act as a service: answer /readyz, record start and stop, and fail in the given mode.

    python fake_service.py PORT JOURNAL NAME [stubborn | broken | clumsy]

Appends "<NAME> start <pid>" and "<NAME> stop" to JOURNAL. GET /crash ends it with exit code 1.
"""

import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def note(text: str) -> None:
    with open(sys.argv[2], "a") as journal:
        journal.write(f"{sys.argv[3]} {text}\n")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/crash":
            os._exit(1)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


def stop(_signum: int, _frame: object) -> None:
    if mode != "stubborn":
        note("stop")
        os._exit(1 if mode == "clumsy" else 0)


mode = sys.argv[4] if len(sys.argv) > 4 else ""
note(f"start {os.getpid()}")
if mode == "broken":
    sys.stderr.write("tailrace: settings are not usable\n")
    sys.exit(2)
signal.signal(signal.SIGTERM, stop)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
