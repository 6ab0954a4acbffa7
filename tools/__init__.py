"""The commands. A wheel brings them as ``carafe_plugin.tools``: ``python -m carafe_plugin.tools.train CONFIG``."""
