"""WHERE a version is published: one adapter per kind of store, behind `ports.Destination`."""

import platform

# SECURITY: SDKs name the platform in their user agent, for which `platform` would run whatever is
# called `uname` in PATH [measured: azure-core]. Nobody needs the name of the processor.
vars(platform.uname())["processor"] = ""
