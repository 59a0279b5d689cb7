"""The teacher of a run: trained, cached, shared between runs, recognised by a key."""
