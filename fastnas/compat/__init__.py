"""The names that existing scripts import: :mod:`.darts`, :mod:`.pc_darts`, :mod:`.drnas` and :mod:`.smooth_darts`."""
