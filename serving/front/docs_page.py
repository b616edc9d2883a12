"""`/docs`: one page without anything from elsewhere; it reads `/openapi.json` and lets one try each request."""

from __future__ import annotations

from pathlib import Path

PAGE = (Path(__file__).parent / "docs.html").read_bytes()
