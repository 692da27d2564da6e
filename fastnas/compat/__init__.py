"""Modules whose names and signatures existing scripts import: :mod:`.darts` and :mod:`.pc_darts`."""
