"""WHO says yes: the built-in authority, its hashes, its spool and its decision."""
