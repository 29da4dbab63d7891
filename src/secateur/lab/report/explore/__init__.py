"""Reports of explorations: one view a section, on one page."""
