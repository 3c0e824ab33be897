"""Plug-ins that the lab's SkyPilot API server loads: they fit it to a machine with two cores and no internet.

Copied into the lab's folder as a module of its own; knows nothing of the project.
"""

import os

from sky.server import plugins


class NetworkIsHere(plugins.BasePlugin):
    """Before SkyPilot believes that a cluster is gone it asks two public addresses: here it asks its own server."""

    def install(self, extension_context: plugins.ExtensionContext) -> None:
        from sky.backends import backend_utils

        backend_utils._TEST_IP_LIST[:] = [os.environ["SKYPILOT_API_SERVER_ENDPOINT"] + "/api/health"]


class OneController(plugins.BasePlugin):
    """One process that looks after managed jobs, where SkyPilot would start one for each 2 GB of memory."""

    def install(self, extension_context: plugins.ExtensionContext) -> None:
        from sky.utils import controller_utils

        controller_utils.MAX_CONTROLLERS = 1
