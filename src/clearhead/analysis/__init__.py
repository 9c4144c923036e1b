"""Numbers shown to a reader: statistics, comparisons, sections of the report."""
