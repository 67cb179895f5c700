"""WHERE a version is published: one adapter per kind of store, behind `ports.Destination`."""
