"""Two hosts on one machine: network namespaces with an address and a host name each, and a link between them that can be cut."""

import os
import subprocess
from pathlib import Path

HOSTS = {"host1": "198.19.0.1", "host2": "198.19.0.2"}  # 198.18.0.0/15 is for tests of networks


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class TwoHosts:
    """The hosts, named by this process, so that several tests may have theirs; `close` removes them."""

    def __init__(self, folder: Path) -> None:
        self.names = {host: f"{host}-{os.getpid()}" for host in HOSTS}
        self.etc_hosts = folder / "hosts"
        self.etc_hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{at} {name}\n" for name, at in HOSTS.items()))
        first, second = self.names.values()
        try:
            for name in self.names.values():
                ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
            for host, address in HOSTS.items():
                ip("-n", self.names[host], "addr", "add", f"{address}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    ip("-n", self.names[host], "link", "set", device, "up")
            subprocess.run(self.command("host1", "true"), check=True, capture_output=True, text=True)
        except BaseException:
            self.close()
            raise

    def command(self, host: str, *words: str) -> list[str]:
        """The command line that runs these words on a host."""
        shell = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.names[host]}", "unshare", "--uts", "--mount"]
        return [*enter, "sh", "-c", shell, "sh", host, str(self.etc_hosts), *words]

    def set_link(self, state: str) -> None:
        """`up`, or `down`: nothing that one host sends arrives at the other."""
        ip("-n", self.names["host2"], "link", "set", "eth0", state)

    def close(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
