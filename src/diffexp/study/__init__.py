"""The experiments: the paper's figures, equal tuning, statistics, verdicts; ``diffexp reproduce`` and ``compare``."""
