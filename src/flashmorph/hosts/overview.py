"""All hosts as one table: which teachers, which settings, what serves them, and who has none."""

from typing import Any

from flashmorph.hosts import ALL_HOSTS, host_settings
from flashmorph.hosts.refused import REFUSED


def overview() -> dict[str, Any]:
    """The content of `flashmorph hosts --json`: `hosts`, and `refused` families with their reasons."""
    hosts = [
        {
            "host": host.name,
            "model_type": host.model_type,
            "teachers": dict(host.teachers),
            "options": {option: mixer.name for option, mixer in host.mixers.items()},
            "settings": {
                name: {"default": value, "about": host.settings[name]} for name, value in host_settings(host).items()
            },
            "serves": [engine.to_dict() for engine in host.engines],
        }
        for host in ALL_HOSTS
    ]
    return {"hosts": hosts, "refused": dict(REFUSED)}
