"""Run a command without a network, except for loopback: `python -m tests.no_network COMMAND ...`."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path


_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


@cache
def can_leave() -> bool:
    """Return whether the kernel lets this user's processes leave the network."""
    return subprocess.run([sys.executable, "-m", "tests.no_network", "true"], check=False).returncode == 0


def leave() -> None:
    """Leave the network, by moving this process into a new network namespace.

    Raises:
        OSError: The kernel does not allow the new namespace.
    """
    user, group, libc = os.getuid(), os.getgid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


if __name__ == "__main__":
    leave()
    os.execvp(sys.argv[1], sys.argv[1:])
