"""Bytes that really moved: the kernel's counters of this process's sockets and files (Linux)."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Iterator, Tuple

import psutil

FDS = Path("/proc/self/fd")
ACKNOWLEDGED = 120
"""Place of tcpi_bytes_acked in Linux's struct tcp_info, two numbers of 64 bits: acknowledged by the peer, received."""


def socket_bytes() -> Tuple[int, int]:
    """Bytes (sent, received) over the TCP sockets that are open now, since each was opened.

    Raises:
        ValueError: not on Linux.
    """
    if not FDS.is_dir():
        raise ValueError("bytes of sockets are counted by Linux only; run this benchmark there")
    sent = received = 0
    for one in _tcp_sockets():
        with one:
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            acknowledged, got = struct.unpack_from("<QQ", info, ACKNOWLEDGED)
            sent, received = sent + acknowledged, received + got
    return sent, received


def file_bytes() -> Tuple[int, int]:
    """Bytes (written, read) by this process through system calls; memory-mapped reads are not in them."""
    counters = psutil.Process().io_counters()
    return int(counters.write_chars), int(counters.read_chars)


def _tcp_sockets() -> Iterator[socket.socket]:
    """Copies of this process's connected TCP sockets."""
    for entry in os.listdir(FDS):
        try:
            if not os.readlink(FDS / entry).startswith("socket:"):
                continue
            copy = socket.socket(fileno=os.dup(int(entry)))
        except OSError:  # closed since it was listed
            continue
        if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
            yield copy
        else:
            copy.close()
