"""The commands. A wheel brings them as ``carafe_plugin.tools``: ``python -m carafe_plugin.tools.train CONFIG``."""

from carafe_plugin._require import require

require("mmengine", __name__)
