"""Load tests: requests that arrive when they are due, however slow the server is, sent by Locust's client."""
