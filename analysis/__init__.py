"""From run directories to figures: loading, statistics, claims and drawing. See docs/analysis.md."""
