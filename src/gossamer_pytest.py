"""What pytest loads wherever Gossamer is installed: nothing, unless the conformance kit is among its arguments.

A module beside the package, since importing `gossamer` imports torch, and other people's tests are not to wait for it.
"""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config, args):
    if any(arg.partition("::")[0].startswith("gossamer.conformance") for arg in args):
        early_config.pluginmanager.import_plugin("gossamer.conformance.plugin")
