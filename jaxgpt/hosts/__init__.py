"""The processes that train together: how they find each other, what they tell each other, how they end.

A host here is a process; on a machine there may be several. Nothing else in the package knows about processes.
"""

from __future__ import annotations

from jaxgpt.hosts.ending import GONE, SharedStop, joined
from jaxgpt.hosts.exchange import ALONE, Hosts, code_version, is_whole, whole, without_hosts
from jaxgpt.hosts.joining import connect, detected

__all__ = [
    "ALONE", "GONE", "Hosts", "SharedStop", "code_version", "connect", "detected", "is_whole", "joined", "whole",
    "without_hosts",
]  # fmt: skip
