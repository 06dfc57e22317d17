"""One self-contained HTML page about runs: python -m train.report FOLDER ... [--baseline LABEL] [--out FILE]

A folder is an experiment, with one folder a run, or a run by itself; several are compared on one page. It shows
whatever they hold: scores and differences from a baseline, curves, how each training went, spectrograms, audio,
attention maps, configurations.
"""

from train.report.page import report

__all__ = ["report"]
