"""Which process of a cluster this one is, by TF_CONFIG, and whether another one is there. Imports no TensorFlow."""

import dataclasses
import json
import os
import socket

ROLES = ("chief", "ps", "worker")
FOLLOWED = 75  # the exit code of a server or worker that the chief ended when it failed
FORM = (
    '{"cluster": {"chief": ["host:port"], "ps": ["host:port", ...], "worker": ["host:port", ...]}, '
    '"task": {"type": "ps", "index": 0}}'
)


class ClusterError(RuntimeError):
    """Something is wrong with a cluster; the text is one line that says what to do."""


def name(role, index):
    """A process as users know it: "chief", "ps 1", "worker 0"."""
    return role if role == "chief" else f"{role} {index}"


def device(role, index):
    """A process's CPU, for `tf.device`."""
    return f"/job:{role}/replica:0/task:{index}/device:CPU:0"


@dataclasses.dataclass(frozen=True)
class Config:
    """What TF_CONFIG says, checked.

    Attributes:
        cluster: {"chief": ["host:port"], "ps": ["host:port", ...], "worker": ["host:port", ...]}.
        role: of this process, one of `ROLES`.
        index: among those of its role.

    """

    cluster: dict
    role: str
    index: int

    @property
    def name(self):
        return name(self.role, self.index)

    def tasks(self, *roles):
        """(role, index) of each process, in the order of the roles; without roles, of all."""
        return [(role, index) for role in roles or ROLES for index in range(len(self.cluster[role]))]

    def address(self, role, index=0):
        """(host, port) of a process."""
        host, _, port = self.cluster[role][index].rpartition(":")
        return host.strip("[]"), int(port)


def read(environ=os.environ):
    """The configuration that TF_CONFIG holds, or None where there is none: a process by itself.

    Raises:
        ClusterError: TF_CONFIG is not of the form `FORM`, or does not fit together.

    """
    text = environ.get("TF_CONFIG")
    if not text:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ClusterError(f"TF_CONFIG is no JSON ({error}): set it to {FORM}") from None
    for key in ("cluster", "task"):
        if not isinstance(found, dict) or not isinstance(found.get(key), dict):
            raise ClusterError(f'TF_CONFIG lacks "{key}": set it to {FORM}')
    for key in ("type", "index"):
        if key not in found["task"]:
            raise ClusterError(f'TF_CONFIG\'s task lacks "{key}": set it to {FORM}')
    cluster, role, index = found["cluster"], found["task"]["type"], str(found["task"]["index"])
    for one in (*cluster, role):
        if one == "evaluator":
            raise ClusterError("TF_CONFIG names an evaluator: leave it out, the chief evaluates")
        if one not in ROLES:
            raise ClusterError(f"TF_CONFIG names the role {one!r}: it must be one of {', '.join(ROLES)}")
    _check_addresses(cluster)
    count = len(cluster[role])
    if not (index.isascii() and index.isdecimal() and int(index) < count):
        raise ClusterError(
            f"TF_CONFIG's task is {role} {index}: its index must be in [0, {count}), as many as {role} has"
        )
    return Config({one: cluster[one] for one in ROLES}, role, int(index))


def _check_addresses(cluster):
    """Raises ClusterError unless every role has its addresses, each of them one of its own."""
    owners = {}
    for role in ROLES:
        addresses = cluster.get(role)
        if not addresses or not isinstance(addresses, list):
            raise ClusterError(
                f'TF_CONFIG\'s cluster has no {role}: give it at least one address, "{role}": ["host:port"]'
            )
        if role == "chief" and len(addresses) > 1:
            raise ClusterError(f"TF_CONFIG's cluster has {len(addresses)} chiefs: name one")
        for index, address in enumerate(addresses):
            host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
            if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
                raise ClusterError(
                    f"TF_CONFIG's address of {name(role, index)} is {address!r}: it must be host:port, "
                    "the port from 1 to 65535"
                )
            if address in owners:
                raise ClusterError(
                    f"TF_CONFIG gives {owners[address]} and {name(role, index)} one address, {address}: "
                    "give each its own"
                )
            owners[address] = name(role, index)


def answers(address, seconds):
    """Whether something listens at an address; the system takes the connection, however busy the process is.

    Args:
        address: (host, port).
        seconds: the limit.

    Returns:
        Its (number, port), for which no name is looked up again, or None.

    """
    try:
        with socket.create_connection(address, seconds) as connection:
            peer = connection.getpeername()
            return peer[:2] if peer != connection.getsockname() else None  # a free port here can reach itself
    except OSError:
        return None


def listening(config):
    """A socket that listens at this process's port, closed by `with`.

    Raises:
        ClusterError: the port is in use, or may not be had.

    """
    _, port = config.address(config.role, config.index)
    try:
        return socket.create_server(("", port))
    except OSError as error:
        raise ClusterError(
            f"{config.name} cannot have port {port} ({os.strerror(error.errno or 0)}): "
            "end the process that has it, or give another port in TF_CONFIG"
        ) from None
