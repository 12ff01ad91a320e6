"""A subscriber as a process of its own, so that a test can kill it: prints one line of JSON for each event it gets.

    python sse_reader.py URL [LAST_EVENT_ID]

Ends with the response. Only the standard library, so that it starts fast.
"""

import json
import sys
import urllib.request


def main(url: str, last_id: str = "") -> None:
    request = urllib.request.Request(url, headers={"Last-Event-ID": last_id} if last_id else {})
    id_, kind, data = "", "message", ""
    with urllib.request.urlopen(request, timeout=120) as response:
        for raw in response:
            field, _, value = raw.decode().rstrip("\r\n").partition(": ")
            if field == "id":
                id_ = value
            elif field == "event":
                kind = value
            elif field == "data":
                data += value
            elif not field and data:
                sys.stdout.write(json.dumps({"id": id_, "kind": kind, "event": json.loads(data)}) + "\n")
                sys.stdout.flush()
                kind, data = "message", ""


if __name__ == "__main__":
    main(*sys.argv[1:])
