"""WHO runs it: scheduler, signals and the admin socket."""
