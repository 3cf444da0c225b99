#!/usr/bin/env python3
"""Tell Holdfast that a request is processed. Standard library only.

As a command, which returns when the word is durable:

    python3 report.py --url http://127.0.0.1:8081 --token-file token UUID processed

As a module, for an API:

    reporter = report.Reporter("http://127.0.0.1:8081", token_file="token")
    reporter.report(uuid, "processed", attempt)  # never blocks
    reporter.close(timeout=10)                   # at the end of the API

What gets lost (a full queue, an acker that is away for too long, a kill of the
API) is only the confirmation: the request stays replayable, and comes again
with the same UUID.
"""

import argparse
import email.utils
import http.client
import json
import logging
import queue
import random
import sys
import threading
import time
import urllib.error
import urllib.request

log = logging.getLogger("holdfast")


class Refused(Exception):
    """The acker will not take the events; index is the one at fault, or None."""

    def __init__(self, message, index=None):
        super().__init__(message)
        self.index = index


class Unavailable(Exception):
    """The events were not confirmed; trying again may help."""

    def __init__(self, message, retry_after=0.0):
        super().__init__(message)
        self.retry_after = retry_after


def post(url, events, token=None, timeout=10):
    """Delivers the events once and returns when they are durable."""
    request = urllib.request.Request(
        url.rstrip("/") + "/v1/completions",
        data=json.dumps(events).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    if token:
        request.add_header("Authorization", "Bearer " + token)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            if answer.status == 202:  # nothing else promises that they are durable
                return
            raise Unavailable(f"the acker answered {answer.status}")
    except urllib.error.HTTPError as error:
        with error:
            text = error.read(65536).decode(errors="replace")
            if error.code in (400, 413):
                raise Refused(f"the acker answered {error.code}: {text}", index_of(text)) from None
            raise Unavailable(f"the acker answered {error.code}: {text}", seconds(error.headers.get("Retry-After"))) from None
    except (OSError, http.client.HTTPException) as error:  # refused, reset, timeout
        raise Unavailable(str(error)) from None


def index_of(text):
    """The index in an answer that names the event at fault, or None."""
    try:
        index = json.loads(text).get("item")
    except (ValueError, AttributeError):
        return None
    return index if isinstance(index, int) else None


def seconds(retry_after):
    """A Retry-After header in seconds, two minutes at most."""
    if not retry_after:
        return 0.0
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(wait, 0.0), 120.0)


class Reporter:
    """Delivers events in the background, in batches, until it is closed."""

    def __init__(self, url, token_file=None, max_queue=10000, max_batch=500, flush_every=0.05):
        urllib.request.Request(url)  # raises ValueError here rather than in the thread
        self._url = url
        self._token_file = token_file
        self._max_batch = max_batch
        self._flush_every = flush_every
        self._queue = queue.Queue(max_queue)
        self._closing = threading.Event()  # set by close()
        self._deadline = None  # set before _closing
        self._thread = threading.Thread(target=self._run, name="holdfast-report", daemon=True)
        self._thread.start()

    def report(self, uuid, outcome, attempt=1, detail=""):
        """Queues an event. Raises queue.Full, and after close() RuntimeError."""
        if self._closing.is_set():
            raise RuntimeError("the reporter is closed")
        event = {"id": uuid, "outcome": outcome, "attempt": int(attempt)}
        if detail:
            event["detail"] = detail[:1000]
        self._queue.put_nowait(event)

    def close(self, timeout=10):
        """Delivers what is queued, for at most that many seconds. Call it when
        no thread reports any more."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join()

    def _run(self):
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                batch = [self._queue.get(timeout=self._flush_every)]
            except queue.Empty:
                continue
            self._closing.wait(self._flush_every)  # for company
            try:
                while len(batch) < self._max_batch:
                    batch.append(self._queue.get_nowait())
            except queue.Empty:
                pass
            self._deliver(batch)

    def _deliver(self, batch):
        wait = 0.1
        while batch:
            try:
                post(self._url, batch, self._token())
                return
            except Refused as error:  # all or nothing: set the one at fault aside
                if error.index is not None and 0 <= error.index < len(batch):
                    log.warning("completion dropped: %s: %s", batch.pop(error.index), error)
                elif len(batch) == 1:
                    log.warning("completion dropped: %s: %s", batch.pop(), error)
                else:
                    half = len(batch) // 2
                    self._deliver(batch[:half])
                    batch = batch[half:]
            except Unavailable as error:
                pause = error.retry_after or wait * random.uniform(0.5, 1)
                if self._closing.is_set():
                    left = self._deadline - time.monotonic()
                    if left <= 0:
                        log.warning("%d completions dropped: %s", len(batch), error)
                        return
                    time.sleep(min(pause, left))
                else:
                    log.warning("completions not delivered, trying again: %s", error)
                    self._closing.wait(pause)  # close() cuts it short
                wait = min(wait * 2, 15)

    def _token(self):
        if not self._token_file:
            return None
        try:
            with open(self._token_file, encoding="ascii") as file:
                return file.read().strip()
        except (OSError, ValueError) as error:
            raise Unavailable(f"no token: {error}") from None


def main():
    parser = argparse.ArgumentParser(description="Tell Holdfast what became of a request.")
    parser.add_argument("--url", default="http://127.0.0.1:8081", help="base address of the acker")
    parser.add_argument("--token-file", help="file with the acker's bearer token")
    parser.add_argument("--attempt", type=int, default=1, help="the X-Request-Attempt received")
    parser.add_argument("--detail", default="", help="a short text for people")
    parser.add_argument("uuid", help="the X-Request-UUID received")
    parser.add_argument("outcome", choices=("processed", "failed"))
    args = parser.parse_args()
    token = None
    if args.token_file:
        with open(args.token_file, encoding="ascii") as file:
            token = file.read().strip()
    event = {"id": args.uuid, "outcome": args.outcome, "attempt": args.attempt}
    if args.detail:
        event["detail"] = args.detail
    try:
        post(args.url, [event], token)
    except (Refused, Unavailable) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
