"""Devices behind the system's OpenSSH: keys, jump hosts and aliases are ssh's own business, host keys are always checked.

ssh -T ... -o BatchMode=yes -o StrictHostKeyChecking=yes [-l user] [-p port] [-i identity] -- host COMMAND
"""

from __future__ import annotations

import os

from toolchain.errors import LostLinkError, UnreachableError
from toolchain.profiler.transports.pipe import COMMAND, Pipe, last_line

_OPTIONS = (
    "BatchMode=yes",  # never asks
    "StrictHostKeyChecking=yes",
    "UpdateHostKeys=no",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",  # a link that is silent for 15 s is cut
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
)
SSH_FAILED = 255


class Ssh(Pipe):
    """One ssh process for each exchange: a cut link leaves nothing half open."""

    def words(self) -> list[str]:
        device = self.device
        words = ["ssh", "-T"]
        for option in _OPTIONS:
            words += ["-o", option]
        if device.known_hosts:
            words += ["-o", f"UserKnownHostsFile={os.path.expanduser(device.known_hosts)}"]
        if device.user:
            words += ["-l", device.user]
        if device.port:
            words += ["-p", str(device.port)]
        if device.identity:
            words += ["-o", "IdentitiesOnly=yes", "-i", os.path.expanduser(device.identity)]
        return [*words, "--", device.host, COMMAND]

    def failure(self, code: int, said: str) -> UnreachableError:
        device = self.device
        place = f"{device.host}:{device.port}" if device.port else device.host
        known = f"'[{device.host}]:{device.port}'" if device.port else device.host
        if device.known_hosts:
            known = f"{known} -f {device.known_hosts}"
        by_hand = f"ssh {f'-p {device.port} ' if device.port else ''}{f'{device.user}@' if device.user else ''}{device.host}"
        if "HOST IDENTIFICATION HAS CHANGED" in said:
            return UnreachableError(
                f"expected {place} to have the host key that known_hosts holds, got another: it is not the same machine, or somebody "
                "is in between; nothing was sent",
                f"if it was set up anew, type: ssh-keygen -R {known}, then {by_hand}, and compare the fingerprint",
            )
        if "Host key verification failed" in said:
            return UnreachableError(
                f"expected a host key of {place} in known_hosts, found none; nothing was sent",
                f"type: {by_hand}, and compare the fingerprint",
            )
        if "Permission denied" in said:
            return UnreachableError(
                f"expected {place} to let us in with a key, got: {last_line(said, code)}", f"type: ssh-copy-id {by_hand[4:]}"
            )
        if code in (SSH_FAILED, -9, -15):
            return LostLinkError(f"no link to {place}: {last_line(said, code)}", f"try: {by_hand}")
        return UnreachableError(f"the doorkeeper on {device.name!r} ended without a reply: {last_line(said, code)}")
