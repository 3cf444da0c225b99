#!/usr/bin/env python3
"""An API in Python that stores the UUID with its work and reports completion.

    PORT=9000 DB=calls.db ACKER_URL=http://127.0.0.1:8081 TOKEN_FILE=token python3 api.py
"""

import contextlib
import http.server
import json
import logging
import os
import queue
import signal
import sqlite3
import threading

from report import Reporter

DB = os.environ["DB"]

SCHEMA = """CREATE TABLE IF NOT EXISTS calls (
    id           INTEGER PRIMARY KEY,
    request_uuid TEXT NOT NULL UNIQUE,
    body         BLOB NOT NULL
)"""


def store(uuid, body):
    """Stores a call and its UUID in one transaction and returns the call's id."""
    with contextlib.closing(sqlite3.connect(DB, timeout=10)) as db:
        with db:  # commits, or rolls back on an exception
            db.execute(
                "INSERT INTO calls (request_uuid, body) VALUES (?, ?) ON CONFLICT (request_uuid) DO NOTHING",
                (uuid, body),
            )
            # When that changed no row the work is done already, and other
            # writes of this request would be skipped here.
            (call,) = db.execute("SELECT id FROM calls WHERE request_uuid = ?", (uuid,)).fetchone()
    return call


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        uuid = self.headers.get("X-Request-UUID")
        attempt = self.headers.get("X-Request-Attempt", "1")
        length = self.headers.get("Content-Length")
        if not uuid or length is None:
            self.answer(400, {"error": "X-Request-UUID or Content-Length is missing"})
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return  # the body broke off: nobody waits for an answer
        try:
            call = store(uuid, body)
        except sqlite3.Error as error:
            logging.error("call not stored: %s", error)
            self.report(uuid, "failed", attempt, "not stored")
            self.answer(500, {"error": "not stored"})
            return
        self.report(uuid, "processed", attempt)  # after the commit, never before
        self.answer(201, {"id": call})

    def report(self, *event):
        try:
            self.server.reporter.report(*event)
        except queue.Full:  # the request stays replayable
            logging.warning("completion dropped: queue full")

    def answer(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # server_close() waits for the requests under way
    request_queue_size = 128


def main():
    with contextlib.closing(sqlite3.connect(DB)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(SCHEMA)
    server = Server(("127.0.0.1", int(os.environ.get("PORT", "9000"))), Handler)
    server.reporter = Reporter(os.environ["ACKER_URL"], os.environ.get("TOKEN_FILE"))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
    server.server_close()
    server.reporter.close(timeout=10)


if __name__ == "__main__":
    main()
