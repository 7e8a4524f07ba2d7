"""Makes tests/ importable, so that every folder's tests find `fakes`."""
