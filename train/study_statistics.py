"""The interval of a study: by how much a method differs from the student alone, over seeds and files.

Both sides of a pair share the seed (initial weights, order of the data) and the test recording, so what is averaged is
the difference d[s, f] of seed s on file f. Seeds and files are both samples of what one wants to speak about, and both
are effects common to a whole row or column of d: forty files of three seeds are not a hundred and twenty measurements.
With the two-way random model

    d[s, f] = mu + a[s] + b[f] + e[s, f]

the mean over S seeds and F files has the variance var(a)/S + var(b)/F + var(e)/(S F). It is estimated by

    V = v_s / S + v_f / F,  v_s the sample variance of the seeds' means, v_f that of the files' means,

which counts the last term twice and so errs on the wide side, and the interval is mean +- t sqrt(V), with the degrees
of freedom of Satterthwaite (Biometrics Bulletin 2, 1946) for a sum of two estimates,

    df = V^2 / ((v_s/S)^2 / (S - 1) + (v_f/F)^2 / (F - 1)).

Where the seeds disagree df falls to S - 1 (t = 4.3 for three seeds), where they agree it rises towards that of a paired
test over files. Drawn 1,000 times from the model with 3 seeds and 40 files, it held mu in 92 % of cases (var(b) = 0, or
all three alike) to 97 % (var(a) = 0), with 5 seeds in 95 to 96 %, and with 2, which are too few where seeds differ, in
86 to 98 %. Three seeds differing, a bootstrap of seeds and files, which knows only ten different samples of them, held
it in 76 %, and a t interval over the seeds' means, which knows nothing of the files, in 83 %.
"""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval.

    Attributes:
        mean: of all differences.
        low, high: the bounds; None where there is one seed and one file, which tell nothing of a spread.
        over: what the interval speaks for: "seeds and files", "files" (one seed), "seeds" (one file) or "nothing".
        seeds, files: how many of each there were.
    """

    mean: float
    low: float | None
    high: float | None
    over: str
    seeds: int
    files: int

    @property
    def verdict(self) -> str:
        """ "higher" or "lower" where the interval leaves out 0, else "undecided"."""
        if self.low is None or self.high is None:
            return "undecided"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "undecided"


def paired_interval(differences: np.ndarray, level: float = 0.95) -> Interval:
    """The interval of the module's docstring.

    Args:
        differences: d [S, F], finite: a row a seed, a column a file.
        level: of confidence, between 0 and 1.

    Raises:
        ValueError: for another shape, no element, an element that is not finite, or a level that is none.
    """
    from scipy.special import stdtrit

    d = np.asarray(differences, np.float64)
    if d.ndim != 2 or not d.size or not np.isfinite(d).all():
        raise ValueError(f"expected finite differences [seeds, files], got shape {list(d.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"a level of confidence lies between 0 and 1, got {level}")
    # Of each side with two members or more: the variance of the mean that it stands for, and its degrees of freedom.
    parts = [(np.var(means, ddof=1) / len(means), len(means) - 1) for means in (d.mean(1), d.mean(0)) if len(means) > 1]
    seeds, files = d.shape
    over = " and ".join(name for name, count in (("seeds", seeds), ("files", files)) if count > 1) or "nothing"
    mean = float(d.mean())
    if not parts:
        return Interval(mean, None, None, over, seeds, files)
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(mean, mean, mean, over, seeds, files)
    degrees = variance**2 / sum(part**2 / degree for part, degree in parts)
    half = float(stdtrit(degrees, (1 + level) / 2) * np.sqrt(variance))
    return Interval(mean, mean - half, mean + half, over, seeds, files)
