"""The few things that a platform hands to this very process, kept aside before the rest is dropped.

`entry` empties the environment of whatever libraries would follow by themselves. A container's own
role is found through variables that are new with every task, so no file can name them: these three
are kept here, and read only where a connection says `method: container` without an address.
"""

from __future__ import annotations

CONTAINER = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
)
kept: dict[str, str] = {}
