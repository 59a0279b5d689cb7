"""Folders of runs: files, records, reports, a run built again from its folder, several seeds."""
