"""Memory that a process keeps: under Linux, glibc hands a block above 32 MiB back to the system as soon as it is freed,
and what is computed into the next one begins with page faults. A detector at 800 x 1333 pixels has dozens of them.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from mmengine.logging import print_log

# By the numbers that mallopt has for them. Kept: blocks of every size come from the heap, which is never trimmed.
_MMAP_THRESHOLD, _MMAP_MAX, _TRIM_THRESHOLD = -3, -4, -1
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
# What glibc arrives at by itself once a process has freed a block of 32 MiB.
_HANDED_BACK = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
_SETTINGS = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")


def add_memory_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-keep-memory``, which :func:`keep_memory` reads."""
    parser.add_argument(
        "--no-keep-memory",
        dest="keep_memory",
        action="store_false",
        help="on a CPU under Linux: hand freed memory back to the system, as processes usually do, which takes time "
        "(default: keep it for the next tensors)",
    )


def keep_memory(args: argparse.Namespace, device: str) -> bool:
    """Have glibc keep this process's freed memory for the next tensors, and say so in the log.

    Not where ``args`` say no, or where the user has chosen an allocator or what is set here, which is said, too; nor
    where the device is no CPU or there is no glibc. What this process forks, a DataLoader's workers for example, hands
    memory back: every one would hold its own.

    Returns:
        bool: whether it is kept.
    """
    if not device.startswith("cpu") or (libc := _glibc()) is None:
        return False
    if not args.keep_memory:
        reason: str | None = "--no-keep-memory"
    else:
        reason = _chosen_setting(os.environ) or _other_allocator(libc)
    if reason is None and not _keep(libc):
        reason = "mallopt refused"
    if reason:
        print_log(f"Freed memory is left to the allocator: {reason}", "current")
    else:
        print_log("Freed memory is kept for the next tensors (--no-keep-memory: handed back to the system)", "current")
    return reason is None


def _glibc() -> ctypes.CDLL | None:
    """The symbols of this process, where its C library is glibc."""
    if sys.platform != "linux":
        return None
    symbols = ctypes.CDLL(None)
    return symbols if hasattr(symbols, "gnu_get_libc_version") else None


def _chosen_setting(environment: Mapping[str, str]) -> str | None:
    """What of the environment sets for glibc's malloc what is set here.

    Example:
        >>> _chosen_setting({"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=0"})
        'GLIBC_TUNABLES sets trim_threshold'
    """
    tunables = [setting.partition("=")[0] for setting in environment.get("GLIBC_TUNABLES", "").split(":")]
    for setting in _SETTINGS:
        if environment.get(variable := f"MALLOC_{setting.upper()}_"):
            return f"{variable} is set"
        if f"glibc.malloc.{setting}" in tunables:
            return f"GLIBC_TUNABLES sets {setting}"
    return None


class _Found(ctypes.Structure):
    """What dladdr finds out about an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _other_allocator(symbols: ctypes.CDLL) -> str | None:
    """Which library's malloc took the place of glibc's, as jemalloc or tcmalloc do by LD_PRELOAD."""

    def library(symbol: str) -> str:
        found = _Found()
        symbols.dladdr(ctypes.cast(getattr(symbols, symbol), ctypes.c_void_p), ctypes.byref(found))
        return os.path.realpath(os.fsdecode(found.file or b""))

    # A program that is linked to fixed addresses may have an entry of its own, which leads to glibc's.
    if (malloc := library("malloc")) in (library("gnu_get_libc_version"), os.path.realpath(sys.executable)):
        return None
    return f"{Path(malloc).name} has another one"


@functools.cache
def _keep(symbols: ctypes.CDLL) -> bool:
    """Once for a process."""
    os.register_at_fork(after_in_child=functools.partial(_set, symbols, _HANDED_BACK))
    return _set(symbols, _KEPT)


def _set(symbols: ctypes.CDLL, values: Mapping[int, int]) -> bool:
    return all([symbols.mallopt(parameter, value) for parameter, value in values.items()])
