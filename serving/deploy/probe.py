"""Is a server ready? The health check of an image that has no curl: python -m serving.deploy.probe URL."""

from __future__ import annotations

import http.client
import sys
import urllib.error
import urllib.request

SECONDS = 2.0


def main(arguments: list[str]) -> int:
    """0 where the URL answers 200 within two seconds, else 1 with the reason on stderr."""
    if len(arguments) != 1:
        print("usage: python -m serving.deploy.probe URL", file=sys.stderr)
        return 2
    # Proxies of the environment are for the way out; this asks the own container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(arguments[0], timeout=SECONDS) as answer:
            return 0 if answer.status == 200 else 1
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = error.read(300).decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else str(error)
        print(reason, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
