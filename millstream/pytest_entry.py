"""What pytest loads by the entry point `millstream`: the plugin, under the name that `-p` and conftest.py give it.

pytest refuses a module that comes under two names. This way the plugin may be asked for once more.
"""

pytest_plugins = ("millstream.pytest_plugin",)
