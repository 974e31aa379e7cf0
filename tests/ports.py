"""Ports for tests that must name one before anybody listens there."""

from __future__ import annotations

from tessera.serve.here import Here

free_port = Here({}).port  # each is kept until this process ends
